"""A comparison as CSV, Markdown, a figure and TensorBoard events."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm import tables
from cllm.counts import rounded_count
from cllm.evaluate.comparison import EVALUATED, TRAINING, Comparison
from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import new_figure, scale_bytes, write_outputs
from cllm.evaluate.quality import PERPLEXITY, Quality
from cllm.evaluate.seeds import CONSTANTS, Group, Row
from cllm.tables import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASH = "–"
_MEASURED = ("tokens", "loss", "perplexity", "bits_per_byte", "tokens_per_s")
"""Fields of `Row` that are averaged over seeds."""
_SEEDS_NOTE = (
    "Runs that differ in their seed only are one row: mean ± standard deviation (n - 1) over the seeds; differences are"
    " to the mean of the baseline's seeds."
)
_NOTES = (
    "KV resident and read: bytes a token of context in bf16, held by the cache and read to decode one token; × mha: "
    "relative to the same model with full attention in every layer.",
    f"from: `{EVALUATED}` was measured by evaluate.py over strided windows, `{TRAINING}` is the last validation of the "
    "training.",
)


def _number(group: Group, value: str | Callable[[Row], float | None], form: str) -> str:
    """The mean, and for several runs the standard deviation."""
    mean, deviation = group.mean(value), group.deviation(value)
    if mean is None:
        return _DASH
    return format(mean, form) if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _source(row: Row) -> str:
    """`training`, or `training, step 250 of 500` if the run has trained on since."""
    if row.source is None:
        return _DASH
    older = row.step is not None and row.step < row.last_step
    return f"{row.source}, step {row.step} of {row.last_step}" if older else row.source


def _columns(comparison: Comparison, *, seeds: bool) -> Sequence[Column[Group]]:
    """The columns; with `seeds`, the number of runs too."""

    quality, baseline = comparison.quality, _baseline_group(comparison, seeds=seeds)

    def difference(group: Group) -> str:
        if comparison.baseline.run in group.runs and group.mean(quality.of) is not None:
            return "baseline"
        return quality.difference(group, baseline) or _DASH

    def of_suite(name: str) -> Column[Group]:
        number = comparison.suite_numbers[name]

        def cell(group: Group) -> str:
            mean, deviation = (of(lambda row: row.suites.get(name)) for of in (group.mean, group.deviation))
            if mean is None:
                return _DASH
            return number.form(mean) + ("" if deviation is None else f" ± {number.form(deviation)}")

        return Column(number.head, cell)

    shown = [PERPLEXITY] if quality is PERPLEXITY else [PERPLEXITY, quality]

    return (
        Column("run", lambda group: group.name, left=True),
        *([Column[Group]("seeds", lambda group: str(len(group.rows)))] if seeds else []),
        Column("design", lambda group: group.rows[0].design, left=True),
        Column("parameters", lambda group: rounded_count(group.rows[0].parameters)),
        Column("KV resident, bf16", lambda group: f"{group.rows[0].kv_resident:,.0f}"),
        Column("× mha", lambda group: f"{group.rows[0].kv_resident_vs_mha:.2f}"),
        Column("KV read, bf16", lambda group: f"{group.rows[0].kv_read:,.0f}"),
        Column("× mha", lambda group: f"{group.rows[0].kv_read_vs_mha:.2f}"),
        Column("tokens", lambda group: rounded_count(group.mean("tokens") or 0)),
        Column("loss", lambda group: _number(group, "loss", ".4f")),
        *(Column[Group](q.head, functools.partial(_quality_text, q)) for q in shown),
        Column("difference", difference),
        Column("bits/byte", lambda group: _number(group, "bits_per_byte", ".4f")),
        Column("tokens/s", lambda group: _number(group, "tokens_per_s", ",.0f")),
        *(of_suite(name) for name in comparison.suite_numbers if name != quality.name),
        Column("from", lambda group: "; ".join(dict.fromkeys(map(_source, group.rows))), left=True),
    )


def _quality_text(quality: Quality, group: Group) -> str:
    return quality.text(group) or _DASH


def _baseline_group(comparison: Comparison, *, seeds: bool) -> Group:
    """The baseline by itself; with `seeds`, with the runs that differ from it in their seed only."""
    groups = comparison.groups if seeds else []
    own = (group for group in groups if comparison.baseline.run in group.runs)
    return next(own, Group.single(comparison.baseline))


def markdown_table(comparison: Comparison) -> str:
    """The table of single runs."""
    return tables.markdown(_columns(comparison, seeds=False), list(map(Group.single, comparison.rows)))


def seeds_table(comparison: Comparison) -> str:
    """The table with one row for all runs that differ in their seed only; empty without such runs."""
    if not _has_seeds(comparison):
        return ""
    return tables.markdown(_columns(comparison, seeds=True), comparison.groups)


def _has_seeds(comparison: Comparison) -> bool:
    return any(len(group.rows) > 1 for group in comparison.groups)


def markdown(comparison: Comparison) -> str:
    """The tables, their warnings and the meaning of their columns."""
    which = f"on `{comparison.set_name}`" if comparison.set_name else "on the main validation set"
    head = comparison.quality.head
    parts = [f"Runs compared {which}; differences are of {head} to `{comparison.baseline.run}`."]
    if seeds := seeds_table(comparison):
        parts += [_SEEDS_NOTE, seeds, "Single runs:"]
    parts.append(markdown_table(comparison))
    if comparison.warnings:
        parts.append("\n".join(f"- **Warning**: {line}" for line in comparison.warnings))
    return "\n\n".join(parts + list(_NOTES)) + "\n"


def terminal(comparison: Comparison) -> str:
    """The tables and their warnings."""
    seeds = seeds_table(comparison)
    heads = [_SEEDS_NOTE, seeds, "", "Single runs:"] if seeds else []
    return "\n".join([*heads, markdown_table(comparison), *(f"warning: {line}" for line in comparison.warnings)])


def csv_text(comparison: Comparison) -> str:
    """The rows with full precision; an empty cell was not measured."""
    names = [field.name for field in dataclasses.fields(Row) if field.name != "suites"]
    rows = (_plain(row, comparison) for row in comparison.rows)
    return tables.csv_text([*names, *comparison.suite_numbers], rows)


def _plain(row: Row, comparison: Comparison) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    suites = values.pop("suites")
    return values | {name: suites.get(name) for name in comparison.suite_numbers}


def seeds_csv(comparison: Comparison) -> str | None:
    """The groups with full precision: number of runs, means, and standard deviations; None if all runs differ."""
    if not _has_seeds(comparison):
        return None
    rows = []
    for group in comparison.groups:
        first = group.rows[0]
        values: dict[str, Any] = {"run": group.name, "seeds": len(group.rows), "runs": " ".join(group.runs)}
        values |= {name: getattr(first, name) for name in CONSTANTS} | {"perplexity_vs_baseline": group.vs_baseline}
        for name in _MEASURED:
            values |= {name: group.mean(name), f"{name}_std": group.deviation(name)}
        for name in comparison.suite_numbers:
            of_suite = functools.partial(_suite_number, name)
            values |= {name: group.mean(of_suite), f"{name}_std": group.deviation(of_suite)}
        rows.append(values)
    return tables.csv_text(list(rows[0]), rows)


def _suite_number(name: str, row: Row) -> float | None:
    return row.suites.get(name)


def figure(comparison: Comparison) -> Figure:
    """Draw the quality of runs against the resident cache, the baseline's quality as a line.

    Runs that differ in their seed only are one point with its standard deviation as a bar, and a small dot for each.
    """
    from matplotlib.ticker import LogLocator

    quality = comparison.quality
    groups = comparison.groups or list(map(Group.single, comparison.rows))
    shown = [(group, mean) for group in groups if (mean := group.mean(quality.of)) is not None]
    head = "Perplexity" if quality is PERPLEXITY else quality.head
    figure, axes = new_figure(8, 5, f"{head} against resident KV cache: {quality.better} and left is better")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    axes.set_xlabel("resident KV cache, bytes a token in bf16 (log scale)")
    on = f" on {comparison.set_name}" if comparison.set_name else ", validation"
    axes.set_ylabel(quality.head + (on if quality is PERPLEXITY else ""))
    if not shown:
        axes.text(0.5, 0.5, "no run has a loss on this set", ha="center", transform=axes.transAxes, color="0.4")
        return figure
    level = _draw_groups(axes, shown, comparison.baseline.run, quality)
    caches = [group.rows[0].kv_resident for group, _ in shown]
    scale_bytes(axes, caches, margin=1.6)
    if max(caches) < 4 * min(caches):
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.draw_without_rendering()  # fixes limits and layout, which the positions of labels depend on
    points = [(group.rows[0].kv_resident, mean) for group, mean in shown]
    single = [(row.kv_resident, quality.of(row) or 0.0) for group, _ in shown for row in group.rows]
    for group, mean in shown:
        bar = group.deviation(quality.of) or 0.0
        single += [(group.rows[0].kv_resident, mean + bar), (group.rows[0].kv_resident, mean - bar)]
    names = [group.name for group, _ in shown]
    place_labels(axes, points, names, avoid=single, levels=[] if level is None else [level])
    return figure


def _draw_groups(axes: Axes, shown: Sequence[tuple[Group, float]], baseline: str, quality: Quality) -> float | None:
    """Draw the points. Returns the height of the baseline's line; None if it is not among `shown`."""
    level, names = None, {EVALUATED: "evaluate.py", TRAINING: "last validation of the training"}
    legend: set[str] = set()
    for group, mean in shown:
        is_baseline, row = baseline in group.runs, group.rows[0]
        colour = "tab:red" if is_baseline else "tab:blue"
        evaluated = quality is not PERPLEXITY or all(row.source == EVALUATED for row in group.rows)
        label = f"baseline: {group.name}" if is_baseline else names[EVALUATED if evaluated else TRAINING]
        axes.errorbar(
            row.kv_resident, mean, yerr=group.deviation(quality.of), fmt="D" if is_baseline else "o", markersize=8,
            color=colour, markeredgecolor=colour, markerfacecolor=colour if evaluated else "white", capsize=4,
            markeredgewidth=1.5, zorder=3, label=None if label in legend else label,
        )  # fmt: skip
        legend.add(label)
        if len(group.rows) > 1:
            singles = [quality.of(row) or 0.0 for row in group.rows]
            axes.plot(
                [row.kv_resident] * len(singles), singles, "o", markersize=3, color="0.25", zorder=4,
                label=None if "seeds" in legend else "single seeds; bar: ± standard deviation",
            )  # fmt: skip
            legend.add("seeds")
        if is_baseline:
            level = mean
            axes.axhline(mean, color="tab:red", linewidth=1, linestyle=(0, (5, 4)), zorder=2)
    return level


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison into `folder` as `write_outputs` does. Returns the files' paths. Raises `UserError`."""
    return write_outputs(
        folder,
        "comparison",
        csv=csv_text(comparison),
        markdown=markdown(comparison),
        figure=figure(comparison),
        more={"seeds.csv": seeds_csv(comparison)},
    )
