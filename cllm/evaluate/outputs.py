"""The files of a comparison: a table as CSV and Markdown, a figure, and both as TensorBoard events."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.errors import UserError
from cllm.evaluate.events import write_events
from cllm.files import RESULTS, mark_new, remove_files, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """An empty figure, its size in inches, and its axes with a title and a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def scale_bytes(axes: Axes, values: list[float], *, margin: float) -> None:
    """Make the x-axis logarithmic, labelled in bytes, from the least value / `margin` to the largest x `margin`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(min(values) / margin, max(values) * margin)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(byte_label))
    axes.margins(y=0.12)


def byte_label(n: float, _: object = None) -> str:
    """`1.5 KiB`: three digits and a unit."""
    for scale, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def png(figure: Figure) -> bytes:
    """A figure as an encoded picture."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def write_outputs(folder: Path, name: str, *, csv: str, markdown: str, figure: Figure) -> list[Path]:
    """Write `NAME.csv`, `.md` and `.png` into `folder`, and the Markdown and figure as TensorBoard events.

    Earlier files of the same names are replaced, and so are earlier events of the same name in a folder that cllm made.

    Returns:
        The three files' paths.

    Raises:
        UserError: if the folder cannot be written.
    """
    files = [folder / f"{name}.{suffix}" for suffix in ("csv", "md", "png")]
    picture = png(figure)
    try:
        mark_new(folder, RESULTS)
        write_atomic(files[0], csv)
        write_atomic(files[1], markdown)
        write_atomic(files[2], picture)
        remove_files(folder, RESULTS, f"events.out.tfevents.*.{name}")
        write_events(folder, name, picture, markdown, suffix=f".{name}")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    return files
