"""Rows and tables of the scaling benchmark."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.scaling.cases import Case
from benchmarks.scaling.profile import read_profiles
from cllm.config import Config
from cllm.runs import RunFolder
from cllm.train.breakdown import PARTS

RATE = "throughput/tokens_per_s"


def summarise(case: Case, config: Config, folder: RunFolder) -> dict[str, Any]:
    """A run's row of the table, from its metrics without the first rows and the profiled steps."""
    timed = [row for row in folder.metrics() if RATE in row and row["step"] <= case.group.steps]
    used = timed[case.group.skip_rows :]

    def median(tag: str) -> float | None:
        values = [row[tag] for row in used if row.get(tag) is not None]
        return statistics.median(values) if values else None

    rates = [row[RATE] for row in used]
    return {
        "name": case.name,
        "group": case.group.name,
        "strategy": case.strategy,
        "devices": case.devices,
        "micro_batch": config.train.micro_batch,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
        "rows": len(used),
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "mfu": median("throughput/mfu"),
        "peak_gib": max(row["memory/peak_gib"] for row in used),
        "data_wait": median("throughput/data_wait"),
        "parts_ms": {part: median(f"time/{part}_ms") for part in PARTS},
        "loss": used[-1]["train/loss"],
        "losses": {row["step"]: row["train/loss"] for row in timed},
        "profile_ms": read_profiles(folder.path),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Speeds, relative to a run on one GPU or, without such a run, to the first one."""
    base = next((row for row in rows if row["devices"] == 1), rows[0])
    head = f"{'strategy':<9}{'GPUs':>5}{'tokens/s':>11}{'spread':>20}{'ratio':>7}{'a GPU':>7}{'MFU':>7}{'GiB':>6}"
    head += "".join(f"{part.replace('_', ' '):>12}" for part in PARTS)
    lines = [head + f"{'NCCL':>8}{'exposed':>9}{'straggling':>12}"]
    for row in sorted(rows, key=lambda row: (row["devices"], row["strategy"])):
        ratio = row["tokens_per_s"] / base["tokens_per_s"]
        low, high = row["tokens_per_s_range"]
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        line = (
            f"{row['strategy']:<9}{row['devices']:>5}{row['tokens_per_s']:>11,.0f}{f'{low:,.0f}..{high:,.0f}':>20}"
            f"{ratio:>7.3f}{ratio * base['devices'] / row['devices']:>7.3f}{mfu:>7}{row['peak_gib']:>6.1f}"
        )
        line += "".join(f"{row['parts_ms'][part]:>9.1f} ms" for part in PARTS)
        if (profile := row["profile_ms"]) and profile["step"]:
            line += f"{100 * profile['communication'] / profile['step']:>7.1f}%"
            line += f"{100 * profile['exposed'] / profile['step']:>8.1f}%{profile['straggling']:>9.1f} ms"
        lines.append(line)
    return "\n".join(lines)


def loss_table(rows: list[dict[str, Any]]) -> str:
    """Losses of runs that take the same steps, and their differences from those of the first run."""
    first = rows[0]["losses"]
    lines = [f"{'strategy':<9}{'GPUs':>5}{'sequences at once':>19}{'last loss':>11}{'largest difference':>20}"]
    for row in rows:
        common = first.keys() & row["losses"].keys()
        difference = max(abs(first[step] - row["losses"][step]) for step in common)
        lines.append(
            f"{row['strategy']:<9}{row['devices']:>5}{row['micro_batch']:>19}{row['loss']:>11.4f}{difference:>20.4f}"
        )
    return "\n".join(lines)
