"""A comparison as CSV, Markdown, a figure and TensorBoard events."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import tables
from cllm.evaluate.comparison import EVALUATED, TRAINING, Comparison, Row
from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure, scale_bytes, write_outputs
from cllm.tables import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASH = "–"
_NOTES = (
    "KV resident and read: bytes a token of context, held by the cache and read to decode one token; × mha: relative "
    "to the same model with full attention in every layer.",
    f"from: `{EVALUATED}` was measured by evaluate.py over strided windows, `{TRAINING}` is the last validation of the "
    "training.",
)


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
    """`training`, or `training, step 250 of 500` if the run has trained on since."""
    if row.source is None:
        return _DASH
    older = row.step is not None and row.step < row.last_step
    return f"{row.source}, step {row.step} of {row.last_step}" if older else row.source


def _columns(comparison: Comparison) -> Sequence[Column[Row]]:
    def difference(row: Row) -> str:
        is_baseline = row.run == comparison.baseline.run and row.perplexity is not None
        return "baseline" if is_baseline else _signed(row.perplexity_vs_baseline)

    def of_suite(name: str) -> Column[Row]:
        number = comparison.suite_numbers[name]
        return Column(number.head, lambda row: number.form(row.suites[name]) if name in row.suites else _DASH)

    return (
        Column("run", lambda row: row.run, left=True),
        Column("design", lambda row: row.design, left=True),
        Column("parameters", lambda row: _count(row.parameters)),
        Column("KV resident", lambda row: f"{row.kv_resident:,.0f}"),
        Column("× mha", lambda row: f"{row.kv_resident_vs_mha:.2f}"),
        Column("KV read", lambda row: f"{row.kv_read:,.0f}"),
        Column("× mha", lambda row: f"{row.kv_read_vs_mha:.2f}"),
        Column("tokens", lambda row: _count(row.tokens)),
        Column("loss", lambda row: _number(row.loss, ".4f")),
        Column("perplexity", lambda row: _number(row.perplexity, ".3f" if (row.perplexity or 0) < 1e4 else ".3g")),
        Column("difference", difference),
        Column("bits/byte", lambda row: _number(row.bits_per_byte, ".4f")),
        Column("tokens/s", lambda row: _number(row.tokens_per_s, ",.0f")),
        *map(of_suite, comparison.suite_numbers),
        Column("from", _source, left=True),
    )


def markdown_table(comparison: Comparison) -> str:
    """The table alone."""
    return tables.markdown(_columns(comparison), comparison.rows)


def markdown(comparison: Comparison) -> str:
    """The table, its warnings and the meaning of its columns."""
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
    """The rows with full precision; an empty cell was not measured."""
    names = [field.name for field in dataclasses.fields(Row) if field.name != "suites"]
    rows = (_plain(row, comparison) for row in comparison.rows)
    return tables.csv_text([*names, *comparison.suite_numbers], rows)


def _plain(row: Row, comparison: Comparison) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    suites = values.pop("suites")
    return values | {name: suites.get(name) for name in comparison.suite_numbers}


def figure(comparison: Comparison) -> Figure:
    """Perplexity against the resident cache, the baseline's perplexity as a line."""
    from matplotlib.ticker import LogLocator

    rows = [row for row in comparison.rows if row.perplexity is not None]
    figure, axes = new_figure(8, 5, "Perplexity against resident KV cache: down and left is better")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    axes.set_xlabel("resident KV cache, bytes a token (log scale)")
    axes.set_ylabel("perplexity" + (f" on {comparison.set_name}" if comparison.set_name else ", validation"))
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
    scale_bytes(axes, caches, margin=1.6)
    if max(caches) < 4 * min(caches):
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    figure.draw_without_rendering()  # fixes limits and layout, which the positions of labels depend on
    points = [(row.kv_resident, row.perplexity or 0.0) for row in rows]
    place_labels(axes, points, [row.run for row in rows], levels=[base.perplexity] if base.perplexity else [])
    return figure


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison into `folder` as `write_outputs` does. Returns the files' paths. Raises `UserError`."""
    return write_outputs(
        folder,
        "comparison",
        csv=csv_text(comparison),
        markdown=markdown(comparison),
        figure=figure(comparison),
    )
