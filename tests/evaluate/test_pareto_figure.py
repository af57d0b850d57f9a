"""The figure of a sweep: shapes, colours, labels and an axis that outliers do not flatten."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure
from cllm.evaluate.pareto_figure import figure, largest_shown
from cllm.evaluate.points import TRAINED, Point

DESIGNS = {"mha": (98304, 0.0), "cla": (49152, 2.1), "fusedkv_lite": (49152, -1.2), "yoco": (28000, 3.9)}
SPECS = ("xkv:group=4,ratio={}", "svd:ratio={}", "minicache:start={}", "kivi:bits={},group=32",
         "xkv:group=4,ratio={}+kivi:bits=4")  # fmt: skip


def _points(seed: int, *, outlier: float = 1.0, scale: float = 40.0, n: int = 40) -> list[Point]:
    """Made-up points of four designs and five methods; one increase is `outlier` times the largest of the others."""
    draw = random.Random(seed)
    values = [(design, TRAINED, float(size), increase) for design, (size, increase) in DESIGNS.items()]
    for design, template in draw.sample([(design, spec) for design in DESIGNS for spec in SPECS] * 5, n - len(values)):
        ratio = draw.choice([2, 3, 4, 6, 8])
        size, base = map(float, DESIGNS[design])
        size /= ratio * (3.5 if "+" in template else 1) * draw.uniform(0.9, 1.1)
        values.append((design, template.format(ratio), size, base + scale * draw.uniform(0.02, 1) * (ratio / 8) ** 2))
    most, chosen = max(value[3] for value in values), draw.randrange(len(DESIGNS), n)
    design, spec, size, increase = values[chosen]
    values[chosen] = (design, spec, size, most * outlier if outlier > 1 else increase)
    points = [_point(design, spec, size, increase) for design, spec, size, increase in values]
    return [dataclasses.replace(p, front=not any(_beats(q, p) for q in points)) for p in points]


def _point(design: str, spec: str, size: float, increase: float) -> Point:
    return Point(
        run=f"{design}-45m", design=design, spec=spec, bytes_per_token=size, ratio_to_own=1.0, ratio_to_mha=1.0,
        perplexity=10 * (1 + increase / 100), increase_percent=increase, compression_share_of_prefill=None,
        weight_bytes=0, front=False,
    )  # fmt: skip


def _beats(one: Point, other: Point) -> bool:
    at, than = (one.bytes_per_token, one.increase_percent), (other.bytes_per_token, other.increase_percent)
    return at[0] <= than[0] and at[1] <= than[1] and at != than


def _markers(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_marker() != "None"]


def _labels(axes: Axes, renderer: Any) -> dict[Text, Bbox]:
    return {text: Text.get_window_extent(text, renderer) for text in axes.texts if text.get_text()}


def _check_labels(axes: Axes, renderer: Any) -> None:
    labels, frame = _labels(axes, renderer), axes.get_window_extent(renderer)
    marks = [axes.transData.transform(line.get_xydata())[0] for line in _markers(axes)]
    (front,) = [Path(axes.transData.transform(line.get_xydata())) for line in axes.lines if line not in _markers(axes)]
    for label, box in labels.items():
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.overlaps(other) for another, other in labels.items() if another is not label)
        assert not any(box.contains(*mark) for mark in marks)
        assert not front.intersects_bbox(box, filled=False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_labels_cover_nothing_and_an_outlier_does_not_flatten_the_axis(seed, outlier) -> None:
    points = _points(seed, outlier=outlier)
    drawing = figure(points)
    renderer = FigureCanvasAgg(drawing).get_renderer()
    (axes,) = drawing.axes
    _check_labels(axes, renderer)
    words = sorted(label.get_text() for label in _labels(axes, renderer))
    highest = max(points, key=lambda point: point.increase_percent)
    expected = [p.run if p.spec == TRAINED else p.spec for p in points if p.front or p.spec == TRAINED]
    if outlier > 1:
        expected += [f"{highest.spec}: {highest.increase_percent:+,.0f} %", "off the scale"]
    assert words == sorted(expected)
    frame = axes.get_window_extent(renderer)
    heights = sorted(axes.transData.transform(line.get_xydata())[0][1] for line in _markers(axes))
    assert frame.y0 < heights[0] < heights[-1] < frame.y1
    assert (heights[-2] - heights[0]) / frame.height > 0.7
    tall = axes.get_legend().get_window_extent(renderer)
    assert frame.x1 <= tall.x0 < tall.x1 <= drawing.bbox.x1
    bands = [patch.get_window_extent(renderer) for patch in axes.patches]
    assert len(bands) == (outlier > 1)
    for band in bands:  # without a scale
        assert heights[-2] < band.y0 < heights[-1]
        assert not [tick for tick in axes.get_yticks() if axes.transData.transform((1, tick))[1] > band.y0 + 1]


def test_a_shape_is_a_method_and_a_colour_a_design() -> None:
    points = _points(0, outlier=30)
    (axes,) = figure(points).axes
    shapes: dict[str, set[str]] = {}
    colours: dict[str, set[str]] = {}
    for point, mark in zip(points, _markers(axes), strict=True):
        assert mark.get_xdata()[0] == point.bytes_per_token
        shapes.setdefault(point.method, set()).add(mark.get_marker())
        colours.setdefault(point.design, set()).add(to_hex(mark.get_color()))
    assert set(shapes) == {TRAINED, "xkv", "svd", "minicache", "kivi", "xkv+kivi"}
    for kinds in (shapes, colours):
        assert all(len(kind) == 1 for kind in kinds.values())
        assert len(set.union(*kinds.values())) == len(kinds)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(shapes) | set(colours) <= set(legend)


def test_more_designs_than_base_colours_stay_apart() -> None:
    points = [_point(f"design-{i}", TRAINED, 100.0 + i, float(i)) for i in range(14)]
    (axes,) = figure([dataclasses.replace(points[0], front=True), *points[1:]]).axes
    assert len({to_hex(mark.get_color()) for mark in _markers(axes)}) == 14


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 200], 6),  # one far outlier of eight
        ([0, 1, 2, 3, 4, 5, 45, 200], 200),  # a ladder, in which no step is of a factor above 10
        ([0, 1, 2, 3, 4, 5, 150, 200], 5),  # two outliers
        ([0, 1, 2, 3, 4, 150, 160, 200], 200),  # three of eight are no outliers
        ([0, 0.1, 0.1, 0.2, 8], 8),  # little, if much more than the others
        ([0, 1, 2, math.inf], 2),
        ([math.inf], 0),
        ([5], 5),
    ],
)
def test_what_is_shown_to_scale(values, limit) -> None:
    assert largest_shown(values) == limit


def test_an_infinite_perplexity_is_drawn_at_the_edge() -> None:
    points = _points(1)
    points[-1] = dataclasses.replace(points[-1], increase_percent=math.inf, perplexity=math.inf, front=False)
    drawing = figure(points)
    renderer = FigureCanvasAgg(drawing).get_renderer()
    assert f"{points[-1].spec}: infinite" in [text.get_text() for text in _labels(drawing.axes[0], renderer)]
    _check_labels(drawing.axes[0], renderer)


def test_one_point_has_a_figure() -> None:
    assert figure([dataclasses.replace(_point("mha", TRAINED, 100.0, 0.0), front=True)])


def test_labels_without_a_free_position_are_left_out_and_lines_cross_no_label() -> None:
    drawing, axes = new_figure(4, 3, "crowd")
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(0.3, 0.7, (60, 2))]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    drawing.draw_without_rendering()
    labels = place_labels(axes, points, [f"a long name of point {i}" for i in range(60)])
    renderer = FigureCanvasAgg(drawing).get_renderer()
    boxes = _labels(axes, renderer)
    assert set(boxes) == set(labels)
    assert 5 < len(labels) < 60
    assert not [1 for a in boxes for b in boxes if a is not b and boxes[a].overlaps(boxes[b])]
    assert not [1 for box in boxes.values() for at in axes.transData.transform(points) if box.contains(*at)]
    drawing.draw_without_rendering()  # updates the leaders
    leaders = [cast(Any, text).arrow_patch.get_path() for text in axes.texts if not text.get_text()]
    assert leaders
    for leader in leaders:
        assert not any(leader.intersects_bbox(box, filled=False) for box in boxes.values())
