"""The figure of a sweep: increase of perplexity against bytes of cache, one colour a design, one shape a method.

A few points far above all others would flatten the axis. They are drawn in a band at its upper edge, with an arrow and
their value. The axis is logarithmic beyond 1 % if the points need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure, scale_bytes
from cllm.evaluate.points import TRAINED, Point, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_LINEAR = 1.0
"""Percent up to which a logarithmic axis is linear."""
_SMALL = 5.0
"""Percent up to which the entire axis is linear."""
_FAR = 10.0
"""A point is drawn at the edge if it is more than so many times the next lower one."""
_SHARE = 4
"""At most one of so many points is drawn at the edge."""
_TRAINED_SHAPE = "D"
_SHAPES = "os^vPX*hp<>d"
_HEADROOM, _FOOTROOM, _BAND = 0.1, 0.08, 0.12
"""Shares of the axis above the highest point, below the lowest, and of the band at the upper edge."""


def largest_shown(values: Sequence[float]) -> float:
    """The largest of `values` that is drawn to scale.

    Values are beyond it if they are infinite, or if they are a quarter of all or fewer and the least of them is more
    than 10 times the next one and more than 10 %.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return 0.0
    for n_beyond in range(min(len(values) // _SHARE, len(finite) - 1), 0, -1):
        if finite[-n_beyond] > _FAR * max(finite[-n_beyond - 1], _LINEAR):
            return finite[-n_beyond - 1]
    return finite[-1]


def shapes(found: Sequence[Point]) -> dict[str, str]:
    """The marker of every method, and of runs as trained."""
    methods = sorted({point.method for point in found if point.spec != TRAINED})
    return {TRAINED: _TRAINED_SHAPE} | {name: _SHAPES[i % len(_SHAPES)] for i, name in enumerate(methods)}


def colours(found: Sequence[Point]) -> dict[str, str]:
    """The colour of every design, as `#rrggbb`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    designs = list(dict.fromkeys(point.design for point in found))
    few, many = colormaps["tab10"], colormaps["turbo"]
    return {
        design: to_hex(few(i) if len(designs) <= 10 else many((i + 0.5) / len(designs)))
        for i, design in enumerate(designs)
    }


def figure(found: Sequence[Point], scores: Scores | None = None) -> Figure:
    """Draw increases of perplexity against bytes a token; the front is a line and its points are named.

    With `scores`, draw these in place of increases; points without a score are left out.
    """
    better = "up" if scores is not None and scores.higher_is_better else "down"
    head = "Perplexity" if scores is None else scores.head
    figure, axes = new_figure(10.5, 6.5, f"{head} against bytes of cache: {better} and left is better")
    found = [point for point in found if scores is None or point.score is not None]
    axes.set_xlabel("bytes a token in bf16 (log scale)")
    scale_bytes(axes, [point.bytes_per_token for point in found], margin=1.5)
    limit = edge = math.inf
    if scores is None:
        limit = largest_shown([point.increase_percent for point in found])
        edge = _scale_increases(axes, [point.increase_percent for point in found], limit)
    else:
        axes.set_ylabel(scores.head)
    shape, colour = shapes(found), colours(found)

    def at(point: Point) -> tuple[float, float]:
        height = point.increase_percent if point.score is None else point.score
        return point.bytes_per_token, min(height, edge)

    for point in found:
        trained = point.spec == TRAINED
        axes.plot(
            *at(point), shape[TRAINED if trained else point.method], color=colour[point.design],
            markersize=8.5 if trained else 6, markeredgecolor="black" if trained else "white",
            markeredgewidth=1 if trained else 0.5, zorder=4 if trained else 3,
        )  # fmt: skip
    front = sorted(at(point) for point in found if point.front)
    axes.plot(*zip(*front, strict=True), color="0.5", linewidth=1, zorder=2)
    axes.legend(handles=_handles(shape, colour), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.draw_without_rendering()  # fixes the layout, which the positions of labels depend on
    beyond = [point for point in found if scores is None and point.increase_percent > limit]
    tips = [_arrow(axes, *at(point)) for point in beyond]
    named = [p for p in found if p in beyond or p.spec == TRAINED or p.front]
    named.sort(key=lambda p: (p not in beyond, p.spec != TRAINED))  # those that matter most get the best positions
    names = [_name(point, point in beyond) for point in named]
    others = [at(point) for point in found if point not in named]
    place_labels(axes, [at(point) for point in named], names, avoid=[*others, *tips], line=front, size=7)
    return figure


def _name(point: Point, beyond: bool) -> str:
    name = point.run if point.spec == TRAINED else point.spec
    if not beyond:
        return name
    value = f"{point.increase_percent:+,.0f} %" if math.isfinite(point.increase_percent) else "infinite"
    return f"{name}: {value}"


def _scale_increases(axes: Axes, values: Sequence[float], limit: float) -> float:
    """Scale the y-axis to `values` up to `limit`. Returns the height at which points beyond `limit` are drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, SymmetricalLogLocator

    shown = [value for value in values if value <= limit] or [limit]
    axes.set_ylabel("increase of perplexity, %")
    locator: MaxNLocator | SymmetricalLogLocator = MaxNLocator(8)
    if max(map(abs, shown)) > _SMALL:
        axes.set_yscale("symlog", linthresh=_LINEAR, linscale=0.4)
        axes.set_ylabel("increase of perplexity, % (logarithmic beyond 1)")
        locator = SymmetricalLogLocator(base=10, linthresh=_LINEAR, subs=(1, 2, 5))
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array([min(shown), limit]))
    span = max(high - low, 1e-3)
    band = _BAND * span if any(value > limit for value in values) else 0.0
    ends = (low - _FOOTROOM * span, high + 0.6 * _HEADROOM * span, high + _HEADROOM * span + 0.4 * band,
            high + _HEADROOM * span + band)  # fmt: skip
    bottom, floor, edge, top = scale.inverted().transform(np.array(ends))
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in locator.tick_values(bottom, floor) if tick <= floor]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom, top)
    if band:
        axes.axhspan(floor, top, color="0.95", linewidth=0, zorder=0)
        axes.text(
            0.005, 0.99, "off the scale", transform=axes.transAxes, ha="left", va="top", fontsize=7, color="0.4"
        )  # fmt: skip
    return float(edge)


def _arrow(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Draw an arrow up from a point at the edge. Returns the data coordinates of its middle."""
    axes.annotate(
        "", (x, y), (0, 14), textcoords="offset points",
        arrowprops={"arrowstyle": "<|-", "color": "0.3", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 3},
    )  # fmt: skip
    _, height = axes.transData.transform((x, y))
    figure = axes.get_figure()
    assert figure is not None
    _, middle = axes.transData.inverted().transform((0, height + 11 * figure.dpi / 72))
    return x, float(middle)


def _handles(shape: dict[str, str], colour: dict[str, str]) -> list[Line2D]:
    """The legend: designs with their colours, then methods with their shapes."""
    from matplotlib.lines import Line2D

    def head(text: str) -> Line2D:
        return Line2D([], [], linestyle="", label=f"$\\bf{{{text}}}$")

    return [
        head("design"),
        *(Line2D([], [], linestyle="", marker="s", color=c, markersize=7, label=name) for name, c in colour.items()),
        head("compression"),
        *(
            Line2D([], [], linestyle="", marker=mark, color="0.35", markersize=7 if name == TRAINED else 6, label=name)
            for name, mark in shape.items()
        ),
        Line2D([], [], color="0.5", linewidth=1, label="front"),
    ]
