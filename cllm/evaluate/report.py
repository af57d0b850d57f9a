"""A comparison as CSV, Markdown, a figure and TensorBoard events."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cllm.errors import UserError
from cllm.evaluate.comparison import EVALUATED, TRAINING, Comparison, Row
from cllm.evaluate.events import write_events
from cllm.evaluate.labels import place_labels
from cllm.files import RESULTS, mark_new, remove_files, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EVENTS = ".comparison"
_DASH = "–"
_NOTES = (
    "KV resident and read: bytes a token of context, held by the cache and read to decode one token; × mha: relative "
    "to the same model with full attention in every layer.",
    f"from: `{EVALUATED}` was measured by evaluate.py over strided windows, `{TRAINING}` is the last validation of the "
    "training.",
)


class _Column(NamedTuple):
    head: str
    cell: Callable[[Row], str]
    left: bool = False


def _signed(value: float | None) -> str:
    return _DASH if value is None else f"{value:+.1f} %"


def _number(value: float | None, form: str) -> str:
    return _DASH if value is None else format(value, form)


def _count(n: float) -> str:
    """`1.23 M`: three digits and a unit."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= 0.9995 * scale:
            return f"{n / scale:.3g}{unit}" if n < 999.5 * scale else f"{n / scale:.0f}{unit}"
    return f"{n:.0f}"


def _source(row: Row) -> str:
    """`training`, or `training, step 250 of 500` where the run has trained on since."""
    if row.source is None:
        return _DASH
    older = row.step is not None and row.step < row.last_step
    return f"{row.source}, step {row.step} of {row.last_step}" if older else row.source


_COLUMNS = (
    _Column("run", lambda row: row.run, left=True),
    _Column("design", lambda row: row.design, left=True),
    _Column("parameters", lambda row: _count(row.parameters)),
    _Column("KV resident", lambda row: f"{row.kv_resident:,.0f}"),
    _Column("× mha", lambda row: f"{row.kv_resident_vs_mha:.2f}"),
    _Column("KV read", lambda row: f"{row.kv_read:,.0f}"),
    _Column("× mha", lambda row: f"{row.kv_read_vs_mha:.2f}"),
    _Column("tokens", lambda row: _count(row.tokens)),
    _Column("loss", lambda row: _number(row.loss, ".4f")),
    _Column("perplexity", lambda row: _number(row.perplexity, ".3f" if (row.perplexity or 0) < 1e4 else ".3g")),
    _Column("difference", lambda row: _signed(row.perplexity_vs_baseline)),
    _Column("bits/byte", lambda row: _number(row.bits_per_byte, ".4f")),
    _Column("tokens/s", lambda row: _number(row.tokens_per_s, ",.0f")),
    _Column("from", _source, left=True),
)


def markdown_table(comparison: Comparison) -> str:
    """The table alone, columns aligned, so that it reads as well in a terminal."""
    rows = [[column.cell(row) for column in _COLUMNS] for row in comparison.rows]
    for cells, row in zip(rows, comparison.rows, strict=True):
        if row.run == comparison.baseline.run and row.perplexity is not None:
            cells[[column.head for column in _COLUMNS].index("difference")] = "baseline"
    heads = [column.head for column in _COLUMNS]
    widths = [max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    rule = [
        "-" * width if column.left else "-" * (width - 1) + ":" for column, width in zip(_COLUMNS, widths, strict=True)
    ]
    lines = []
    for cells in (heads, rule, *rows):
        padded = [
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, column, width in zip(cells, _COLUMNS, widths, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """The table, its warnings and what its columns mean."""
    which = f"on `{comparison.set_name}`" if comparison.set_name else "on the main validation set"
    parts = [f"Runs compared {which}; differences are of perplexity to `{comparison.baseline.run}`."]
    parts.append(markdown_table(comparison))
    if comparison.warnings:
        parts.append("\n".join(f"- **Warning**: {line}" for line in comparison.warnings))
    return "\n\n".join(parts + list(_NOTES)) + "\n"


def terminal(comparison: Comparison) -> str:
    """The table and its warnings."""
    return "\n".join([markdown_table(comparison), *(f"warning: {line}" for line in comparison.warnings)])


def csv_text(comparison: Comparison) -> str:
    """The rows with full precision; empty cells are what was not measured."""
    out = io.StringIO()
    fields = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in comparison.rows)
    return out.getvalue()


def byte_label(n: float, _: object = None) -> str:
    """`1.5 KiB`: three digits and a unit."""
    for scale, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def figure(comparison: Comparison) -> Figure:
    """Perplexity against the resident cache, the baseline's perplexity as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for row in comparison.rows if row.perplexity is not None]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("resident KV cache, bytes a token (log scale)")
    axes.set_ylabel("perplexity" + (f" on {comparison.set_name}" if comparison.set_name else ", validation"))
    axes.set_title("Perplexity against resident KV cache: down and left is better", loc="left", fontsize=11)
    if not rows:
        axes.text(0.5, 0.5, "no run has a loss on this set", ha="center", transform=axes.transAxes, color="0.4")
        return figure
    base = comparison.baseline
    for source, face in ((EVALUATED, "tab:blue"), (TRAINING, "white")):
        some = [row for row in rows if row.source == source and row.run != base.run]
        axes.plot(
            [row.kv_resident for row in some], [row.perplexity or 0.0 for row in some], "o", markersize=8,
            markeredgecolor="tab:blue", markerfacecolor=face, markeredgewidth=1.5, zorder=3,
            label={EVALUATED: "evaluate.py", TRAINING: "last validation of the training"}[source] if some else None,
        )  # fmt: skip
    if base.perplexity is not None:
        axes.axhline(base.perplexity, color="tab:red", linewidth=1, linestyle=(0, (5, 4)), zorder=2)
        axes.plot(
            base.kv_resident, base.perplexity, "D", markersize=8, markeredgecolor="tab:red", markeredgewidth=1.5,
            markerfacecolor="tab:red" if base.source == EVALUATED else "white", zorder=3, label=f"baseline: {base.run}",
        )  # fmt: skip
    caches = [row.kv_resident for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(caches) / 1.6, max(caches) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5) if max(caches) < 4 * min(caches) else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(byte_label))
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    figure.draw_without_rendering()  # fixes limits and layout, which the labels are placed by
    points = [(row.kv_resident, row.perplexity or 0.0) for row in rows]
    place_labels(axes, points, [row.run for row in rows], levels=[base.perplexity] if base.perplexity else [])
    return figure


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `comparison.csv`, `.md` and `.png`, and the table and figure as TensorBoard events, into `folder`.

    Earlier files of the same names, and earlier comparisons' events, are replaced. Returns the three files' paths.
    Raises `UserError` where the folder cannot be written.
    """
    files = [folder / f"comparison.{suffix}" for suffix in ("csv", "md", "png")]
    drawing, text = figure(comparison), markdown(comparison)
    try:
        mark_new(folder, RESULTS)
        write_atomic(files[0], csv_text(comparison))
        write_atomic(files[1], text)
        partial = folder / f".comparison.partial-{os.getpid()}.png"
        drawing.savefig(partial)
        partial.replace(files[2])
        remove_files(folder, RESULTS, f"events.out.tfevents.*{_EVENTS}")
        write_events(folder, "comparison", files[2].read_bytes(), text, suffix=_EVENTS)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    return files
