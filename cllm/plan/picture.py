"""The plan as a picture: layers as boxes from the bottom up, slots as rails, reads as arrows.

Every owner whose slot other layers read has a rail beside the boxes, on the left for keys and on the right for values.
An arrow leads from the rails that a layer reads into its box, with a dot on each of them; a rail that is crossed
without a dot is not read. Slots that a layer mixes into its own are drawn as reads through learned weights. A layer
whose output the owners of higher layers project has a line along its top and a rail on the left, with an arrow into
each of them. Every turn of a loop has a bracket on the right. All lines are horizontal or vertical and stay outside of
the boxes, so a plan of any depth can be read. Lengths are in inches; an artist's `gid` states which layer, read or turn
it stands for.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cllm.plan.describe import owns_text, sees_text
from cllm.plan.kinds import Source
from cllm.plan.plan import Half, KVPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

_ROW, _BOX = 0.235, 0.175
"""Distance between layers, and height of a box."""
_GAP, _MARGIN = 0.11, 0.2
"""Between a box's edge or columns and its text; around the picture."""
_FIRST_LANE, _LANE = 0.34, 0.19
"""From a box to the nearest rail, and from one rail to the next."""
_SPREAD = {1: 0.0, 2: 0.09, 3: 0.11}
"""Height of the lines at one side of a box, by their number: from the lowest to the highest."""
_ABOVE = 0.015
"""From the top of a box to the line of its output."""
_BRACKET, _TICK = 0.16, 0.05
"""From the outermost rail to the brackets of a loop, and the length of their ends."""
_TEXT, _TITLE = 7.5, 10.0
"""Font sizes in points."""
_TITLE_WIDTH = 48
"""Characters of a line of the title."""
_What = Literal["keys", "values", "output"]
"""A half of a layer's slot, which others read, or its output, which others project."""
_COLOURS: dict[_What, str] = {"keys": "#d95f02", "values": "#6a51a3", "output": "#00806a"}
_LEFT: tuple[_What, ...] = ("keys", "output")
_RIGHT: tuple[_What, ...] = ("values",)
_PLAIN, _OTHER, _STATE = "#3a78b5", "#2e8b57", "#a0522d"
"""Colours of slots of keys and values, of other slots such as latents, and of recurrent states."""
_LOOP = "0.25"
"""Colour of the brackets of a loop."""


@dataclass(frozen=True, slots=True)
class _Rail:
    """The reads of one owner's slot, or the projections of one layer's output."""

    what: _What
    owner: int
    readers: tuple[int, ...]
    """Layers that read it, mix it into their own or project it; of a slot, the owner is among them only if it reads
    other slots too."""
    lane: int
    """Position outwards from the boxes, from 0."""

    @property
    def name(self) -> str:
        return f"{self.what} of {self.owner}"


def _rails(plan: KVPlan, side: Sequence[_What]) -> list[_Rail]:
    """The rails of one side. Rails that share a lane have no row in common; short ones are nearest to the boxes."""
    readers = {(what, owner): layers for what in side for owner, layers in _readers(plan, what).items()}
    spans = {rail: (min(rail[1], *layers), max(rail[1], *layers)) for rail, layers in readers.items()}
    taken: list[list[tuple[int, int]]] = []
    rails = []
    for rail, (first, last) in sorted(spans.items(), key=lambda item: (item[1][1] - item[1][0], item[0][1])):
        free = (n for n, lane in enumerate(taken) if all(last < low or high < first for low, high in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        rails.append(_Rail(*rail, readers[rail], lane))
    return rails


def _readers(plan: KVPlan, what: _What) -> dict[int, tuple[int, ...]]:
    """The layers with an arrow from the slot, or the output, of each layer that has a rail."""
    if what == "output":
        return {n: tuple(j for j in plan.owners if plan.owned(j).input == n) for n in plan.inputs}
    readers: dict[int, tuple[int, ...]] = {}
    for owner, reading in plan.readers(what).items():
        layers = sorted({*reading, *plan.mixers(owner)})
        if any(i != owner for i in layers):
            readers[owner] = tuple(i for i in layers if i != owner or len(_sources(plan, what, i)) > 1)
    return readers


def _sources(plan: KVPlan, half: Half, i: int) -> tuple[int, ...]:
    return (plan.keys(i) if half == "keys" else plan.values(i)).layers


def _is_stored(plan: KVPlan, half: Half, i: int, owner: int) -> bool:
    """Whether layer `i` takes a half of the slot of `owner` as it is, without learned weights."""
    if owner in plan.mixes(i):
        return False
    return plan.reads_at_once(i) or (plan.keys(i) if half == "keys" else plan.values(i)).is_stored


def _is_windowed(plan: KVPlan, i: int) -> bool:
    """Whether layer `i` sees a window of every slot that it reads."""
    return all(window is not None for _, window in plan.attended(i))


def _sees(plan: KVPlan, i: int) -> str:
    text = sees_text(plan, i).replace("all", "", 1) if len(plan.attended(i)) == 1 else sees_text(plan, i)
    return f"{text or 'all'} but itself" if plan.reads_above(i) else text


@functools.lru_cache(maxsize=1024)
def _width(text: str, size: float) -> float:
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=size).get_extents().width / 72 if text.strip() else 0.0


def _fill(own: Source | None, windowed: bool) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    if own is None:
        return to_rgb("white")
    colour = to_rgb(_PLAIN if own.is_plain else _STATE if own.is_state else _OTHER)
    red, green, blue = (1 - 0.3 * (1 - part) if windowed else part for part in colour)
    return red, green, blue


@dataclass(frozen=True, slots=True)
class _Columns:
    """Horizontal positions in a box, from its left edge: the layer's number, what it owns, and what it sees."""

    number: float
    owns: float
    sees: float
    width: float

    @classmethod
    def of(cls, plan: KVPlan) -> _Columns:
        owns = max((_width(text, _TEXT) for text in {owns_text(plan, j) for j in plan.owners}), default=0.0)
        sees = max(_width(text, _TEXT) for text in {_sees(plan, i) for i in range(len(plan))})
        number = _GAP + _width("0" * len(str(len(plan) - 1)), _TEXT)
        right = number + _GAP + owns + (2 * _GAP + sees if sees else 0.0)
        return cls(number, number + _GAP, right, right + _GAP)


def plan_figure(plan: KVPlan, title: str) -> Figure:
    """Draw the plan. The figure is as large as its layers, texts and rails need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _Columns.of(plan)
    left, right = _rails(plan, _LEFT), _rails(plan, _RIGHT)
    side, brackets = max(_reach(left), _reach(right)), columns.width + _reach(right) + _BRACKET
    loop = max((_width(turn, _TEXT) for turn in _turns(plan)), default=0.0)
    ends = max(columns.width + side, brackets + _GAP + loop if loop else 0.0)
    figure = Figure()
    legend = _legend(figure, plan, [*left, *right])
    extent = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    lines = textwrap.wrap(title, _TITLE_WIDTH) or [""]
    title_height = len(lines) * 1.35 * _TITLE / 72
    drawing = side + ends
    width = max(drawing, extent.width / figure.dpi, *(_width(line, _TITLE) for line in lines)) + 2 * _MARGIN
    rows_height = len(plan) * _ROW
    height = rows_height + extent.height / figure.dpi + title_height + 2.5 * _MARGIN
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    start = (width - drawing) / 2 + side
    axes.set(xlim=(-start, width - start), ylim=(-_MARGIN - _ROW / 2, height - _MARGIN - _ROW / 2))
    figure.text(0.5, 1 - 0.7 * _MARGIN / height, "\n".join(lines), ha="center", va="top", fontsize=_TITLE, gid="title")
    legend.set_bbox_to_anchor((0.5, 1 - (_MARGIN + title_height) / height), transform=figure.transFigure)
    _draw_boxes(axes, plan, columns)
    _draw_rails(axes, plan, left, columns.width, -1)
    _draw_rails(axes, plan, right, columns.width, 1)
    _draw_loop(axes, plan, brackets)
    return figure


def plan_png(plan: KVPlan, title: str) -> bytes:
    """The picture of `plan_figure` as a PNG file."""
    file = io.BytesIO()
    plan_figure(plan, title).savefig(file, format="png", dpi=110)
    return file.getvalue()


def _reach(rails: Sequence[_Rail]) -> float:
    """From a box to the outermost rail."""
    return _FIRST_LANE + max(rail.lane for rail in rails) * _LANE if rails else 0.0


def _turns(plan: KVPlan) -> dict[str, tuple[int, int]]:
    """The lowest and the highest layer of every turn of the loop, by its label."""
    loop = plan.loop
    if loop is None:
        return {}
    return {loop.turn(i): (i, i + loop.count - 1) for i in range(loop.first, loop.last + 1, loop.count)}


def _draw_boxes(axes: Axes, plan: KVPlan, columns: _Columns) -> None:
    from matplotlib.patches import Rectangle

    for i, layer in enumerate(plan.layers):
        windowed = _is_windowed(plan, i)
        y = i * _ROW
        axes.add_artist(
            Rectangle(
                (0, y - _BOX / 2), columns.width, _BOX, facecolor=_fill(layer.own, windowed), edgecolor="0.25",
                linewidth=0.8, linestyle=(0, (3, 2)) if windowed else "-", gid=f"layer {i}",
            )
        )  # fmt: skip
        colour = "black" if layer.own is None or windowed else "white"
        owns = owns_text(plan, i)
        for x, text, align in ((columns.number, str(i), "right"), (columns.owns, owns, "left"),
                               (columns.sees, _sees(plan, i), "right")):  # fmt: skip
            if text:
                axes.text(x, y, text, ha=align, va="center_baseline", fontsize=_TEXT, color=colour)


def _draw_rails(axes: Axes, plan: KVPlan, rails: Sequence[_Rail], width: float, outwards: int) -> None:
    """Draw the rails of one side of boxes of this width, on the left if `outwards` is -1, on the right if it is 1."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    edge = width if outwards == 1 else 0.0
    heights = _heights(rails)
    into: dict[tuple[_What, int], list[_Rail]] = {}
    for rail in rails:
        for i in rail.readers:
            into.setdefault((rail.what, i), []).append(rail)

    def x_of(rail: _Rail) -> float:
        return edge + outwards * (_FIRST_LANE + rail.lane * _LANE)

    for rail in rails:
        x, colour, is_output = x_of(rail), _COLOURS[rail.what], rail.what == "output"
        y_out = rail.owner * _ROW + _BOX / 2 + _ABOVE if is_output else heights["from", rail.what, rail.owner]
        ys = [y_out, *(heights["into", rail.what, i] for i in rail.readers)]
        inner = edge if not is_output else width - edge
        for line, gid in (
            (((inner, x), (y_out, y_out)), rail.name),
            (((x, x), (min(ys), max(ys))), f"rail of {rail.name}"),
        ):
            axes.add_artist(Line2D(*line, color=colour, linewidth=1.1, solid_capstyle="projecting", gid=gid))
    for (what, i), read in into.items():
        farthest, y, colour = max(read, key=lambda rail: rail.lane), heights["into", what, i], _COLOURS[what]
        axes.add_artist(
            FancyArrowPatch(
                (x_of(farthest), y), (edge, y), arrowstyle="-|>", mutation_scale=7.5, shrinkA=0, shrinkB=0,
                linewidth=0.9, color=colour, gid=f"{what} into {i}",
            )
        )  # fmt: skip
        for rail in read:
            stored = what == "output" or _is_stored(plan, what, i, rail.owner)
            dot = Line2D(
                [x_of(rail)], [y], marker="o" if stored else "D", color=colour, markersize=3.2 if stored else 3.4,
                markerfacecolor=colour if stored else "white", gid=f"{rail.name} into {i}", zorder=3,
            )  # fmt: skip
            axes.add_artist(dot)


def _heights(rails: Sequence[_Rail]) -> dict[tuple[Literal["into", "from"], _What, int], float]:
    """Heights of the lines between boxes and the rails of one side, by direction, kind and layer.

    From the top of a box they are: what the layer reads, the slot that others read, and the output that it projects.
    """
    lines: dict[int, set[tuple[int, Literal["into", "from"], _What]]] = {}
    for rail in rails:
        for i in rail.readers:
            lines.setdefault(i, set()).add((2 if rail.what == "output" else 0, "into", rail.what))
        if rail.what != "output":
            lines.setdefault(rail.owner, set()).add((1, "from", rail.what))
    heights = {}
    for i, found in lines.items():
        spread = _SPREAD[len(found)]
        for n, (_, direction, what) in enumerate(sorted(found)):
            heights[direction, what, i] = i * _ROW + spread / 2 - n * spread / max(1, len(found) - 1)
    return heights


def _draw_loop(axes: Axes, plan: KVPlan, x: float) -> None:
    """Draw a bracket at `x` beside the layers of every turn of the plan's loop."""
    from matplotlib.lines import Line2D

    for turn, (first, last) in _turns(plan).items():
        low, high = first * _ROW - _BOX / 2, last * _ROW + _BOX / 2
        xs, ys = (x - _TICK, x, x, x - _TICK), (low, low, high, high)
        axes.add_artist(Line2D(xs, ys, color=_LOOP, linewidth=1.1, solid_joinstyle="miter", gid=turn))
        axes.text(
            x + _GAP, (low + high) / 2, turn, ha="left", va="center_baseline", fontsize=_TEXT, color=_LOOP,
        )  # fmt: skip


def _legend(figure: Figure, plan: KVPlan, rails: Sequence[_Rail]) -> Legend:
    """The legend of what the plan has, not yet in its place."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = []
    nouns = {plan.owned(j).noun: plan.owned(j) for j in plan.owners}
    handles += [
        Patch(facecolor=_fill(own, False), edgecolor="0.25", label=f"owns a {noun}") for noun, own in nouns.items()
    ]
    if plan.borrowers:
        handles.append(Patch(facecolor="white", edgecolor="0.25", label="owns nothing"))
    if any(_is_windowed(plan, i) for i in range(len(plan))):
        label = "sees a sliding window"
        handles.append(Patch(facecolor="0.9", edgecolor="0.25", linestyle=(0, (3, 2)), label=label))
    labels: dict[_What, str] = {half: f"reads {half} of another layer" for half in ("keys", "values")}
    labels["output"] = "projected from the output of a lower layer"
    for what, label in labels.items():
        if any(rail.what == what for rail in rails):
            handles.append(Line2D([], [], color=_COLOURS[what], label=label))
    if (loop := plan.loop) is not None:
        label = f"turn of a loop: {loop.weights} x {loop.times}, with the same weights"
        handles.append(Line2D([], [], color=_LOOP, marker="$]$", markersize=6, linestyle="", label=label))
    forms = {
        _is_stored(plan, rail.what, i, rail.owner) for rail in rails if rail.what != "output" for i in rail.readers
    }
    dots = ((True, "o", "0.3", "reads the slot as stored"), (False, "D", "white", "reads through learned weights"))
    for stored, marker, face, label in dots:
        if stored in forms and forms != {True}:
            style: dict[str, Any] = {"color": "0.3", "marker": marker, "markersize": 3.6, "markerfacecolor": face}
            handles.append(Line2D([], [], label=label, linestyle="", **style))
    return figure.legend(
        handles=handles, loc="upper center", ncols=1, fontsize=_TEXT, frameon=False, borderaxespad=0, borderpad=0.2,
        handlelength=1.6, labelspacing=0.35,
    )  # fmt: skip
