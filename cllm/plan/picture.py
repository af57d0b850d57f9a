"""The plan as a picture: layers as boxes from the bottom up, slots as rails, reads as arrows.

Every owner whose slot other layers read has a rail beside the boxes, on the left for keys and on the right for values.
An arrow leads from the rails that a layer reads into its box, with a dot on each of them; a rail that is crossed
without a dot is not read. Slots that a layer mixes into its own are drawn as reads through learned weights. All lines
are horizontal or vertical and stay outside of the boxes, so a plan of any depth can be read. Lengths are in inches; an
artist's `gid` states which layer or read it stands for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
_APART = 0.045
"""Height above the centre of a box at which arrows end, and below it at which rails begin, in a box with both."""
_TEXT, _TITLE = 7.5, 10.0
"""Font sizes in points."""
_TITLE_WIDTH = 48
"""Characters of a line of the title."""
_COLOURS: dict[Half, str] = {"keys": "#d95f02", "values": "#6a51a3"}
_PLAIN, _OTHER, _STATE = "#3a78b5", "#2e8b57", "#a0522d"
"""Colours of slots of keys and values, of other slots such as latents, and of recurrent states."""


@dataclass(frozen=True, slots=True)
class _Rail:
    """The reads of one owner's slot."""

    owner: int
    readers: tuple[int, ...]
    """Layers that read it or mix it into their own; the owner is among them only if it reads other slots too."""
    lane: int
    """Position outwards from the boxes, from 0."""


def _rails(plan: KVPlan, half: Half) -> list[_Rail]:
    """The rails of one side. Rails that share a lane have no row in common; short ones are nearest to the boxes."""
    readers: dict[int, tuple[int, ...]] = {}
    for owner, reading in plan.readers(half).items():
        layers = sorted({*reading, *plan.mixers(owner)})
        if any(i != owner for i in layers):
            readers[owner] = tuple(i for i in layers if i != owner or len(_sources(plan, half, i)) > 1)
    spans = {j: (min(j, *layers), max(j, *layers)) for j, layers in readers.items()}
    taken: list[list[tuple[int, int]]] = []
    rails = []
    for owner, (first, last) in sorted(spans.items(), key=lambda item: (item[1][1] - item[1][0], item[0])):
        free = (n for n, lane in enumerate(taken) if all(last < low or high < first for low, high in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        rails.append(_Rail(owner, readers[owner], lane))
    return rails


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
    rails: dict[Half, list[_Rail]] = {"keys": _rails(plan, "keys"), "values": _rails(plan, "values")}
    lanes = max((rail.lane + 1 for side in rails.values() for rail in side), default=0)
    side = _FIRST_LANE + (lanes - 1) * _LANE if lanes else 0.0
    figure = Figure()
    legend = _legend(figure, plan, rails)
    extent = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    lines = textwrap.wrap(title, _TITLE_WIDTH) or [""]
    title_height = len(lines) * 1.35 * _TITLE / 72
    drawing = columns.width + 2 * side
    width = max(drawing, extent.width / figure.dpi, *(_width(line, _TITLE) for line in lines)) + 2 * _MARGIN
    rows_height = len(plan) * _ROW
    height = rows_height + extent.height / figure.dpi + title_height + 2.5 * _MARGIN
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    left = (width - columns.width) / 2
    axes.set(xlim=(-left, width - left), ylim=(-_MARGIN - _ROW / 2, height - _MARGIN - _ROW / 2))
    figure.text(0.5, 1 - 0.7 * _MARGIN / height, "\n".join(lines), ha="center", va="top", fontsize=_TITLE, gid="title")
    legend.set_bbox_to_anchor((0.5, 1 - (_MARGIN + title_height) / height), transform=figure.transFigure)
    _draw_boxes(axes, plan, columns)
    for half, edge, outwards in (("keys", 0.0, -1), ("values", columns.width, 1)):
        _draw_rails(axes, plan, half, rails[half], edge, outwards)  # type: ignore[index, arg-type]
    return figure


def _draw_boxes(axes: Axes, plan: KVPlan, columns: _Columns) -> None:
    from matplotlib.patches import Rectangle

    for i, layer in enumerate(plan.layers):
        windowed = _is_windowed(plan, i)
        y = i * _ROW
        axes.add_patch(
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


def _draw_rails(axes: Axes, plan: KVPlan, half: Half, rails: Sequence[_Rail], edge: float, outwards: int) -> None:
    """Draw the rails on the side of `edge`, the boxes' left or right edge; `outwards` is -1 or 1."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    colour = _COLOURS[half]
    sources = {rail.owner for rail in rails}
    read_by: dict[int, list[_Rail]] = {}
    for rail in rails:
        for i in rail.readers:
            read_by.setdefault(i, []).append(rail)

    def x_of(rail: _Rail) -> float:
        return edge + outwards * (_FIRST_LANE + rail.lane * _LANE)

    def y_in(i: int) -> float:
        return i * _ROW + (_APART if i in sources else 0.0)

    for rail in rails:
        y_out = rail.owner * _ROW - (_APART if rail.owner in read_by else 0.0)
        heights = [y_out, *map(y_in, rail.readers)]
        x, name = x_of(rail), f"{half} of {rail.owner}"
        for xs, ys, gid in (
            ((edge, x), (y_out, y_out), name),
            ((x, x), (min(heights), max(heights)), f"rail of {name}"),
        ):
            axes.add_line(Line2D(xs, ys, color=colour, linewidth=1.1, solid_capstyle="projecting", gid=gid))
    for i, read in read_by.items():
        farthest = max(read, key=lambda rail: rail.lane)
        axes.add_patch(
            FancyArrowPatch(
                (x_of(farthest), y_in(i)), (edge, y_in(i)), arrowstyle="-|>", mutation_scale=7.5, shrinkA=0, shrinkB=0,
                linewidth=0.9, color=colour, gid=f"{half} into {i}",
            )
        )  # fmt: skip
        for rail in read:
            stored = _is_stored(plan, half, i, rail.owner)
            dot = Line2D(
                [x_of(rail)], [y_in(i)], marker="o" if stored else "D", color=colour, markersize=3.2 if stored else 3.4,
                markerfacecolor=colour if stored else "white", gid=f"{half} of {rail.owner} into {i}", zorder=3,
            )  # fmt: skip
            axes.add_line(dot)


def _legend(figure: Figure, plan: KVPlan, rails: dict[Half, list[_Rail]]) -> Legend:
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
    for half, side in rails.items():
        if side:
            handles.append(Line2D([], [], color=_COLOURS[half], label=f"reads {half} of another layer"))
    forms = {
        _is_stored(plan, half, i, rail.owner) for half, side in rails.items() for rail in side for i in rail.readers
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
