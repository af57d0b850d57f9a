"""Candidates as pictures: loss against cache with the front, and KV heads against sharing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cllm.errors import UserError
from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure
from cllm.planner.candidates import Candidate, Request
from cllm.planner.conditions import Conditions
from cllm.planner.report import GB, grid, reference_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINEAR = 0.01
"""Nats up to which the axis of losses is linear."""
_GREY = "0.88"
_WIDTH = 90
"""Most characters of a line of the title."""


def front_figure(found: Sequence[Candidate], request: Request, conditions: Conditions) -> Figure:
    """Change of the loss against bytes of cache, of the candidates with a measured loss; the front is a line.

    Candidates without a measured loss are ticks at the lower edge. Raises `UserError` if there is nothing to draw.
    """
    if not found:
        raise UserError("--picture: there is no candidate to draw")
    figure, axes = new_figure(10.5, 6.5, f"Change of the loss against cache, measured on\n{_wrapped(conditions)}")
    axes.set_xscale("log")
    axes.set_xlabel(f"GB of cache, {request.text}")
    axes.set_ylabel(
        f"change of the loss against {reference_name(found)}, nats a token (logarithmic beyond {_LINEAR:g})"
    )
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=1.5)
    shown = [(c.cache_bytes / GB, loss, c) for c in found if (loss := c.loss_change) is not None]
    designs = list(dict.fromkeys(c.design for *_, c in shown))
    _scatter(axes, shown, designs)
    axes.plot([c.cache_bytes / GB for c in found if c.loss_change is None],
              [0.015] * sum(c.loss_change is None for c in found), "|", color="0.6", markersize=9,
              transform=axes.get_xaxis_transform(), label="no measured loss")  # fmt: skip
    room = min((request.budget - c.weight_bytes) / GB for c in found)
    sizes = [c.cache_bytes / GB for c in found]
    if 0 < room < 1.5 * max(sizes):
        axes.axvspan(room, 1e12, color=_GREY, zorder=0, label="beyond the budget")
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.margins(y=0.12)
    line = sorted((x, y) for x, y, c in shown if c.front)
    axes.plot(*zip(*line, strict=True), color="0.4", linewidth=1, zorder=2) if line else None
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.draw_without_rendering()  # fixes the layout, which the positions of labels depend on
    named = [(x, y, c) for x, y, c in shown if c.front]
    others = [(x, y) for x, y, c in shown if not c.front]
    place_labels(axes, [(x, y) for x, y, _ in named], [c.name for *_, c in named], avoid=others, line=line, size=7)
    return figure


def _wrapped(conditions: Conditions) -> str:
    return textwrap.fill(conditions.description, _WIDTH)


def _scatter(axes: Axes, shown: Sequence[tuple[float, float, Candidate]], designs: Sequence[str]) -> None:
    from matplotlib import colormaps

    colour = {design: colormaps["tab10"](i % 10) for i, design in enumerate(designs)}
    for x, y, c in shown:
        marker = "D" if c.spec is None else "o"
        if c.loss_range is not None:
            low, high = c.loss_range
            axes.plot([x, x], [low, high], color=colour[c.design], linewidth=1, alpha=0.5, zorder=2)
        plain = c.spec is None
        axes.plot(
            x, y, marker, color=colour[c.design], markersize=8 if plain else 5.5, alpha=1 if c.fits else 0.35,
            markeredgecolor="black" if plain else "white", markeredgewidth=0.7, zorder=3,
        )  # fmt: skip
    for design in designs:
        axes.plot([], [], "s", color=colour[design], label=design)
    axes.plot([], [], "D", color="white", markeredgecolor="black", label="no compression")


def heads_figure(found: Sequence[Candidate], request: Request, conditions: Conditions) -> Figure:
    """Cache by sharing (rows) and KV heads (columns), with the change of the loss where it was measured."""
    from matplotlib.colors import LogNorm

    names, heads, cells = grid(found)
    if not cells:
        raise UserError("--view heads: no design with KV heads; give --designs")
    data = [[cells[n, h].cache_bytes / GB if (n, h) in cells else float("nan") for h in heads] for n in names]
    figure, axes = new_figure(3.2 + 1.3 * len(heads), 1.6 + 0.36 * len(names), "Cache in GB by sharing and KV heads")
    axes.grid(visible=False)
    known = [c.cache_bytes / GB for c in cells.values()]
    norm = LogNorm(min(known), max(known) * 1.0001)
    image = axes.imshow(data, aspect="auto", cmap="YlGnBu", norm=norm)
    for (name, h), c in cells.items():
        loss = "" if c.loss_change is None else f"\n{c.loss_change:+.3f}"
        mark = "* " if c.front else "" if c.fits else "x "
        axes.text(heads.index(h), names.index(name), f"{mark}{c.cache_bytes / GB:.3g}{loss}", ha="center", va="center",
                  fontsize=7, color="white" if norm(c.cache_bytes / GB) > 0.6 else "black")  # fmt: skip
    axes.set_xticks(range(len(heads)), [str(h) for h in heads])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"KV heads; {request.text}\n"
                    "second line: change of the loss, nats; *: on the front; x: does not fit\n"
                    f"losses of {_wrapped(conditions)}")  # fmt: skip
    figure.colorbar(image, ax=axes, label="GB")
    return figure
