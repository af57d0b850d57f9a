"""Rows of a decoding benchmark as tables and plots.

A row is one contender at one point. It is compared with the baseline design at the same point: full attention of all
heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.record import Row

GIB = 2**30
COLORS = [f"C{n}" for n in range(10)]
MARKERS = "os^vDPXp<>d"  # 11 markers and 10 colours: their numbers share no factor, so pairs repeat late
FAILURES = (
    ("error", "step"),
    ("ttft_error", "time to first token"),
    ("ttft_without_exit_error", "time to first token without early exit"),
)
"""Keys of a row with the error of a failed measurement, and the name of that measurement."""


def relate(rows: list[Row], capacity: list[Row]) -> None:
    """Add the multiples of the baseline's step, time to first token and capacity to every row."""
    base = {(row["context"], row["batch"]): row for row in rows if row["is_baseline"]}
    for row in rows:
        other = base.get((row["context"], row["batch"]), {})
        for name in ("step", "ttft"):
            row[f"{name}_vs_baseline"] = _ratio(row, other, f"{name}_ms")
        row["step_vs_design"] = None
        if row["peer_of"] is not None:
            own = next((r for r in rows if r["design"] == row["peer_of"] and same_point(r, row)), {})
            row["step_vs_design"] = _ratio(row, own, "step_ms")
    first = next((row for row in capacity if row["is_baseline"]), {})
    for row in capacity:
        for what, key in (("context", "context"), ("batch", "batch")):
            row[f"{what}_vs_baseline"] = _ratio(row.get(what) or {}, first.get(what) or {}, key)


def same_point(a: Row, b: Row) -> bool:
    return (a["context"], a["batch"]) == (b["context"], b["batch"])


def _ratio(row: Row, other: Row, key: str) -> float | None:
    a, b = row.get(key), other.get(key)
    return None if a is None or b is None else a / b


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Steps and times to first token, one line a row, and then the failures."""
    wide = _width(rows)
    lines = [
        f"{'design':<{wide}}{'point':>12}{'step ms':>9}{'spread':>16}{'tokens/s':>10}{'x bound':>8}{'x base':>7}"
        f"{'cache GiB':>11}{'peak GiB':>11}{'resident':>10}{'read':>9}{'TTFT ms':>10}{'x base':>7}{'no exit':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row['design']:<{wide}}{point_name(row):>12}{_of(row, 'step_ms', '.3f'):>9}{_spread(row, 'step_ms'):>16}"
            f"{_of(row, 'tokens_per_s', ',.0f'):>10}{_of(row, 'step_vs_bound', '.2f'):>8}"
            f"{_of(row, 'step_vs_baseline', '.2f'):>7}{_of(row, 'cache_bytes', '.4g', GIB):>11}"
            f"{_of(row, 'peak_bytes', '.4g', GIB):>11}{_of(row, 'kv_resident_per_token', ',.0f'):>10}"
            f"{_of(row, 'kv_read_per_token', ',.0f'):>9}{_of(row, 'ttft_ms', ',.1f'):>10}"
            f"{_of(row, 'ttft_vs_baseline', '.2f'):>7}{_of(row, 'ttft_without_exit_ms', ',.1f'):>10}"
        )
    lines += [""] + [
        f"{row['design']} against {row['peer_of']} at {point_name(row)}: {row['step_vs_design']:.2f} times its step"
        for row in rows
        if row.get("step_vs_design") is not None
    ]
    for row in rows:
        for key, what in FAILURES:
            if row.get(key) is not None:
                lines.append(f"{row['design']} {point_name(row)} {what} failed: {row[key]}")
    return "\n".join(lines).rstrip()


def capacity_table(capacity: list[Row]) -> str:
    """Longest contexts and largest batches within the budget, one line a design."""
    first, wide = capacity[0], _width(capacity)
    lines = [
        f"within {first['budget_bytes'] / GIB:g} GiB, batches at {first['batch_context']} tokens:",
        f"{'design':<{wide}}{'context':>12}{'x base':>7}{'GiB':>10}"
        f"{'batch':>7}{'x base':>7}{'GiB':>10}{'tokens/s':>10}",
    ]
    for row in capacity:
        context, batch = row.get("context") or {}, row.get("batch") or {}
        lines.append(
            f"{row['design']:<{wide}}{_of(context, 'context', ','):>12}{_of(row, 'context_vs_baseline', '.2f'):>7}"
            f"{_of(context, 'used_bytes', '.4g', GIB):>10}{_of(batch, 'batch', ','):>7}"
            f"{_of(row, 'batch_vs_baseline', '.2f'):>7}{_of(batch, 'used_bytes', '.4g', GIB):>10}"
            f"{_of(batch, 'tokens_per_s', ',.0f'):>10}"
        )
        for what in (context, batch):
            if note := what.get("error") or what.get("unbounded"):
                lines.append(f"    {note}")
    return "\n".join(lines)


def generated_table(rows: list[Row]) -> str:
    """Times of `generate`, one line a contender and point, and then the failures."""
    wide = _width(rows)
    lines = [
        f"{'generate()':<{wide}}{'point':>12}{'ms a token':>11}{'spread':>18}{'tokens/s':>10}{'settled after ms':>18}"
    ]
    for row in rows:
        lines.append(
            f"{row['design']:<{wide}}{point_name(row):>12}{_of(row, 'generate_ms', '.3f'):>11}"
            f"{_spread(row, 'generate_ms'):>18}"
            f"{_of(row, 'generate_tokens_per_s', ',.0f'):>10}{_of(row, 'generate_settled_after_ms', ',.0f'):>18}"
        )
    lines += [f"{row['design']} {point_name(row)} failed: {row['error']}" for row in rows if row.get("error")]
    return "\n".join(lines)


def _width(rows: list[Row]) -> int:
    return max((len(row["design"]) for row in rows), default=0) + 1


def point_name(row: Row) -> str:
    return f"{row['context']}x{row['batch']}"


def _spread(row: Row, key: str) -> str:
    low, high = row.get(f"{key}_range") or (None, None)
    return "-" if low is None else f"{low:.2f}..{high:.2f}"


def _of(row: Row, key: str, form: str, unit: int = 1) -> str:
    value = row.get(key)
    return "-" if value is None else format(value / unit if unit > 1 else value, form)


# ---- plots -----------------------------------------------------------------------------------------------------------


def write_plots(rows: list[Row], stem: str, folders: Iterable[Path]) -> list[Path]:
    """Draw `STEM-memory.png` and `STEM-tokens.png` in each of `folders`: memory and tokens/s against context.

    Each contender is a line and each batch size a panel. Dotted lines are the bounds from bytes read.
    """
    rows = [row for row in rows if row.get("step_ms") is not None]
    written = []
    for name, draw, label in (("memory", _memory, "weights and cache, GiB"), ("tokens", _tokens, "tokens/s")):
        figure = _figure(rows, draw, label)
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{stem}-{name}.png"
            figure.savefig(file, dpi=130)
            written.append(file)
    return written


def _figure(rows: list[Row], draw: Any, label: str) -> Figure:
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["design"] for row in rows))
    figure = Figure(figsize=(max(6.4, 4.4 * len(batches) + 2.2), 4.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(batches)), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches, strict=False):
        for n, name in enumerate(names):
            line = sorted((r for r in rows if r["design"] == name and r["batch"] == batch), key=lambda r: r["context"])
            if line:
                draw(axes, line, {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)]})
        axes.set(xscale="log", yscale="log", xlabel="context, tokens", title=f"batch {batch}")
        contexts = sorted({r["context"] for r in rows if r["batch"] == batch})
        axes.set_xticks(contexts, [_short(c) for c in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    return figure


def _memory(axes: Axes, line: list[Row], style: dict[str, Any]) -> None:
    _line(axes, line, [(r["weight_bytes"] + r["cache_bytes"]) / GIB for r in line], style)


def _tokens(axes: Axes, line: list[Row], style: dict[str, Any]) -> None:
    _line(axes, line, [r["tokens_per_s"] for r in line], style)
    if line[0]["peer_of"] is None:
        bound = [1000 * r["batch"] / r["bound_ms"] for r in line]
        axes.plot([r["context"] for r in line], bound, color=style["color"], linestyle=":", marker="_")


def _line(axes: Axes, line: list[Row], values: list[float], style: dict[str, Any]) -> None:
    peer = line[0]["peer_of"] is not None
    dashed: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"} if peer else {}
    axes.plot([r["context"] for r in line], values, label=line[0]["design"], **style, **dashed)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
