"""Labels for the points of a figure that do not cover each other, a point, or the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_DISTANCES = (7, 14, 24, 38, 56, 80, 105)
"""Typographic points between a point and its label, nearest tried first."""
_DIRECTIONS = (0, 90, 270, 180, 45, 315, 135, 225)
"""Degrees, preferred first: right, above, below, left, then the corners."""
_LEADER = 14  # from this distance on, a line connects label and point
_MARKER = 5.5  # half the side of the square around a point that labels avoid


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    *,
    levels: Sequence[float] = (),
    size: float = 9,
) -> list[Annotation]:
    """Annotate each point (data coordinates) with its name at the nearest free position.

    Horizontal lines at the heights `levels` (data coordinates) are not covered either. Axis limits and scales must be
    final. If no position is free, the label goes where it covers least.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixel = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    centres = [axes.transData.transform(point) for point in points]
    taken = [_box(x, y, 2 * _MARKER * pixel, 2 * _MARKER * pixel) for x, y in centres]
    for level in levels:
        _, y = axes.transData.transform((1.0, level))
        taken.append(Bbox.from_extents(inside.x0, y - pixel, inside.x1, y + pixel))
    labels = []
    for point, (x, y), name in zip(points, centres, names, strict=True):
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=size)
        extent = label.get_window_extent(renderer)
        best, least = (0.0, 0.0), math.inf
        for distance in _DISTANCES:
            for degrees in _DIRECTIONS:
                right, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
                dx = right * (distance * pixel + extent.width / 2)
                dy = up * (distance * pixel + extent.height / 2)
                box = _box(x + dx, y + dy, extent.width + 2 * pixel, extent.height + 2 * pixel)
                covered = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
                if covered < least - 1e-6:
                    best, least, chosen, away = (dx / pixel, dy / pixel), covered, box, distance
        label.set_position(best)
        taken.append(chosen)
        if away >= _LEADER:
            axes.annotate("", point, best, textcoords="offset points", arrowprops=_leader()).set_zorder(1)
        labels.append(label)
    return labels


def _leader() -> dict[str, object]:
    return {"arrowstyle": "-", "color": "0.7", "linewidth": 0.7, "shrinkA": 5, "shrinkB": 3}


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
