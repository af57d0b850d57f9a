"""Labels for the points of a figure that do not cover each other, a point, a line, or the edge.

Labels are placed one after the other, each at the nearest free position around its point. A label that is not next to
its point is connected to it by a line, which crosses no other label. If a label has no free position it is tried in
smaller fonts, and left out if none is free either: what it names is in the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_DISTANCES = (7, 14, 24, 38, 56, 80, 105, 135, 170, 210)
"""Typographic points between a point and its label, nearest tried first."""
_DIRECTIONS = (0, 90, 270, 180, 45, 315, 135, 225, 20, 340, 160, 200, 65, 295, 115, 245)
"""Degrees, preferred first: right, above, below, left, then between them."""
_SIZES = (1.0, 0.85, 0.7)
"""Sizes of the font that are tried, relative to the one asked for."""
_LEADER = 14  # from this distance on, a line connects label and point
_MARKER = 5.5  # half the side of the square around a point that labels avoid
_SPACE = 1.0  # around a label


@dataclass(frozen=True, slots=True)
class _Place:
    """A position of a label: extents in pixels."""

    box: Bbox
    leader: Path | None
    """From the point to the nearest spot of the box."""


class _Canvas:
    """The extents in pixels that a new label must not cover."""

    def __init__(self, inside: Bbox, taken: Sequence[Bbox], lines: Sequence[Path]):
        self._inside = inside
        self._taken = np.array([box.extents for box in taken]).reshape(-1, 4)  # n, (x0, y0, x1, y1)
        self._labels: list[Bbox] = []
        self._lines = list(lines)

    def is_free(self, place: _Place) -> bool:
        box = place.box
        if not (self._inside.x0 <= box.x0 and box.x1 <= self._inside.x1):
            return False
        if not (self._inside.y0 <= box.y0 and box.y1 <= self._inside.y1):
            return False
        x0, y0, x1, y1 = self._taken.T
        if ((x0 < box.x1) & (box.x0 < x1) & (y0 < box.y1) & (box.y0 < y1)).any():
            return False
        if any(line.intersects_bbox(box, filled=False) for line in self._lines):
            return False
        return place.leader is None or not any(
            place.leader.intersects_bbox(label, filled=False) for label in self._labels
        )

    def add(self, place: _Place) -> None:
        self._taken = np.vstack([self._taken, place.box.extents])
        self._labels.append(place.box)
        if place.leader is not None:
            self._lines.append(place.leader)


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    *,
    avoid: Sequence[tuple[float, float]] = (),
    levels: Sequence[float] = (),
    line: Sequence[tuple[float, float]] = (),
    size: float = 9,
) -> list[Annotation]:
    """Annotate points with their names at the nearest free positions. Returns the labels that have one.

    Args:
        axes: their limits and scales must be final.
        points: data coordinates.
        names: one for each of `points`.
        avoid: further points that labels do not cover, in data coordinates.
        levels: heights of horizontal lines that labels do not cover, in data coordinates.
        line: points of a line through them that labels do not cover, in data coordinates.
        size: of the font, in typographic points.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    renderer, pixel = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    side = 2 * _MARKER * pixel
    taken = [_box(x, y, side, side) for x, y in axes.transData.transform([*points, *avoid])]
    for level in levels:
        _, y = axes.transData.transform((axes.get_xlim()[0], level))
        taken.append(Bbox.from_extents(inside.x0, y - pixel, inside.x1, y + pixel))
    lines = [Path(axes.transData.transform(line))] if len(line) > 1 else []
    canvas, labels = _Canvas(inside, taken, lines), []
    for point, name in zip(points, names, strict=True):
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=size)
        place = _find(canvas, label, axes.transData.transform(point), renderer, pixel)
        if place is None:
            label.remove()
            continue
        canvas.add(place)
        labels.append(label)
        if place.leader is not None:
            dx, dy = (np.diff(place.leader.vertices, axis=0)[0] / pixel).tolist()
            axes.annotate("", point, (dx, dy), textcoords="offset points", arrowprops=_leader(), zorder=1)
    return labels


def _find(canvas: _Canvas, label: Annotation, at: np.ndarray, renderer: RendererAgg, pixel: float) -> _Place | None:
    """Move `label` of the point `at` (pixels) to its nearest free position, which is returned."""
    size = label.get_fontsize()
    for scale in _SIZES:
        label.set_fontsize(scale * size)  # type: ignore[operator]
        extent = label.get_window_extent(renderer)
        for dx, dy, place in _places(at, extent.width, extent.height, pixel):
            if canvas.is_free(place):
                label.set_position((dx / pixel, dy / pixel))
                return place
    return None


def _places(at: np.ndarray, width: float, height: float, pixel: float) -> Iterator[tuple[float, float, _Place]]:
    """Positions of a label of this size around `at`, nearest first, with the offset of its centre; all in pixels."""
    x, y = at
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            right, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            dx, dy = right * (distance * pixel + width / 2), up * (distance * pixel + height / 2)
            box = _box(x + dx, y + dy, width + 2 * _SPACE * pixel, height + 2 * _SPACE * pixel)
            leader = None
            if distance >= _LEADER:
                leader = Path([(x, y), (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))])
            yield dx, dy, _Place(box, leader)


def _leader() -> dict[str, object]:
    return {"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
