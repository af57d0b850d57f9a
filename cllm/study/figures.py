"""The figures of a study: learning curves, loss against cache bytes, scores over designs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure, scale_bytes
from cllm.statistics import Mean
from cllm.study.summary import Row, Score, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TILTED = 15
"""More labels of designs stand upright, or they would cover each other."""
_MOST_SCORES = 12
"""Evaluations that the figure of scores shows."""
_TITLE_WIDTH = 52
"""Characters in a line of a title in the figure of scores."""


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, as `#rrggbb`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    few, many = colormaps["tab10"], colormaps["turbo"]
    names = list(dict.fromkeys(labels))
    return {name: to_hex(few(i) if len(names) <= 10 else many((i + 0.5) / len(names))) for i, name in enumerate(names)}


def curves_figure(summary: Summary, rows: Sequence[Row], tag: str, what: str, unit: str = "nats per token") -> Figure:
    """Draw a tag of the training against tokens, the mean of a row's seeds as a line, each seed thinly.

    The legend has the lines in the order of their ends, from the top.
    """
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure(9, 5.5, f"{what} against training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{what}, {unit}")
    colour = colours([row.label for row in summary.rows])
    shown, lines = [], []
    for row in rows:
        if len(curve := row.curve(tag)) < 2:
            continue
        for result in row.results if len(row.results) > 1 else ():
            axes.plot(*zip(*result.curve(tag), strict=True), color=colour[row.label], linewidth=0.5, alpha=0.5)
        style: dict[str, Any] = {"color": colour[row.label], "label": row.label, "linewidth": 1.6, "markersize": 2.5}
        (line,) = axes.plot(*zip(*curve, strict=True), "o-", **style)
        lines.append((curve[-1][1], line))
        shown += [value for t, value in curve if t > 0.1 * row.tokens]
    if shown:  # the fall at the beginning would flatten the rest
        room = 0.08 * (max(shown) - min(shown)) + 1e-6
        axes.set_ylim(min(shown) - room, max(shown) + room)
        by_end = [line for _, line in sorted(lines, key=lambda pair: pair[0], reverse=True)]
        axes.legend(handles=by_end, frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def pareto_figure(summary: Summary, rows: Sequence[Row]) -> Figure:
    """Draw the final loss against resident cache bytes; a bar is the standard error over seeds."""
    figure, axes = new_figure(8, 5, "Loss against resident KV cache: down and left is better")
    axes.set_xlabel("resident KV cache, bytes a token in bf16 (log scale)")
    axes.set_ylabel("validation loss, nats per token; bar: ± standard error")
    colour = colours([row.label for row in summary.rows])
    points = [(resident_bytes(row), row.loss.mean) for row in rows]
    for row, point in zip(rows, points, strict=True):
        axes.errorbar(*point, yerr=row.loss.error, fmt="o", color=colour[row.label], markersize=7, capsize=4, zorder=3)
    scale_bytes(axes, [x for x, _ in points], margin=1.6)
    figure.draw_without_rendering()  # fixes limits and layout, which the positions of labels depend on
    bars = [(x, y + sign * (row.loss.error or 0)) for row, (x, y) in zip(rows, points, strict=True) for sign in (-1, 1)]
    place_labels(axes, points, [row.label for row in rows], avoid=bars)
    return figure


def resident_bytes(row: Row) -> float:
    """Bytes of cache per token of the context, in bf16."""
    return row.first.content["summary"]["kv_bytes_per_token"]["resident"]


def scores_figure(summary: Summary) -> Figure | None:
    """Draw the first number of each evaluation over the designs, with its standard error; None without evaluations."""
    from matplotlib.figure import Figure

    first: dict[str, tuple[Score, dict[str, Mean]]] = {}
    for score, means in summary.scores:
        first.setdefault(score.label, (score, means))
    shown = list(first.values())[:_MOST_SCORES]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), dpi=120, layout="constrained")
    colour = colours([row.label for row in summary.rows])
    for n, (score, means) in enumerate(shown):
        axes = figure.add_subplot(lines, columns, n + 1)
        axes.spines[["top", "right"]].set_visible(False)
        title = re.sub(r",(?=\S)", ", ", f"{score.label}: {score.head}")  # lines end at spaces
        axes.set_title(textwrap.fill(title, _TITLE_WIDTH), loc="left", fontsize=7)
        for i, (label, mean) in enumerate(means.items()):
            axes.errorbar(i, mean.mean, yerr=_bar(mean), fmt="o", color=colour[label], markersize=5, capsize=3)
        upright: dict[str, Any] = {"rotation": 90, "fontsize": max(3.0, min(7.0, 170 / len(means)))}
        tilted: dict[str, Any] = {"rotation": 40, "ha": "right", "fontsize": 7}
        axes.set_xticks(range(len(means)), list(means), **(upright if len(means) > _MOST_TILTED else tilted))
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
    return figure


def _bar(mean: Mean) -> float | None:
    return mean.error
