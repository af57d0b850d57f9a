"""Rows of the training benchmark and their table."""

from __future__ import annotations

import statistics

import torch

from benchmarks.record import Row
from benchmarks.train.contender import Contender
from cllm.model.sizes import count_parameters
from cllm.train.throughput import peak_flops


def rows_of(contenders: list[Contender], first: Contender, tokens: int, device: torch.device) -> list[Row]:
    """A row per contender, with its time as a multiple of that of `first`. `tokens`: those of a step."""
    peak = peak_flops(device)
    rows = []
    base = statistics.median(t for r in first.rounds for t in r)
    for c in contenders:
        medians = [statistics.median(r) for r in c.rounds]
        ms = statistics.median(t for r in c.rounds for t in r)
        rows.append(
            {
                "name": c.name,
                "parameters": count_parameters(c.model),
                "ms": ms,
                "round_medians_ms": medians,
                "tokens_per_s": tokens / ms * 1000,
                "mfu": c.flops_per_token * tokens / ms * 1000 / peak if peak else None,
                "peak_gib": c.peak_gib,
                "time_vs_first": ms / base,
                "loss": c.last_loss,
            }
        )
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print the table."""
    wide = max(23, *(len(row["name"]) for row in rows), 0) + 1
    print(f"{'contender':<{wide}}{'M params':>9}{'ms':>9}{'spread':>15}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}{'time':>7}")
    for row in rows:
        medians = row["round_medians_ms"]
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
        print(
            f"{row['name']:<{wide}}{row['parameters'] / 1e6:>9.1f}{row['ms']:>9.2f}"
            f"{f'{min(medians):.1f}..{max(medians):.1f}':>15}{row['tokens_per_s']:>11,.0f}{mfu:>7}"
            f"{'-' if row['peak_gib'] is None else format(row['peak_gib'], '.1f'):>7}{row['time_vs_first']:>7.3f}"
        )
