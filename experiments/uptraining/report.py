"""Results: one file each, and all of them as rows.json and table.md."""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.record import Row
from cllm.environment import environment
from cllm.files import write_atomic
from experiments.uptraining.setup import Folders


def write_result(folders: Folders, name: str, row: Row) -> None:
    """Write a row, which is then never measured again, and publish all rows: a command may be killed at any time."""
    write_atomic(folders.result(name), json.dumps({"name": name, **row}, indent=2) + "\n")
    folders.result(_failed(name)).unlink(missing_ok=True)
    publish(folders)


def write_failure(folders: Folders, name: str, why: str) -> None:
    """Write a row with the failure of `name`, which the next command tries again."""
    print(f"{name}: failed: {why}", flush=True)
    row = {"kind": "failed", "name": name, "error": " ".join(why.split())[:500]}
    write_atomic(folders.result(_failed(name)), json.dumps(row, indent=2) + "\n")
    publish(folders)


def has_failed(folders: Folders, name: str) -> bool:
    """Whether the last attempt of `name` failed."""
    return folders.result(_failed(name)).exists()


def _failed(name: str) -> str:
    return f"failed-{name}"


def read_rows(folders: Folders) -> list[Row]:
    """All rows, sorted by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folders.result("x").parent.glob("*.json"))]


def publish(folders: Folders) -> str:
    """Write rows.json and table.md with every result so far; returns the text of table.md."""
    rows, size = read_rows(folders), json.loads(folders.size.read_text(encoding="utf-8"))
    text = markdown(rows)
    data = json.dumps({"size": size, "environment": _environment(), "rows": rows}, indent=1) + "\n"
    for folder in filter(None, (folders.out, folders.copies)):
        write_atomic(folder / "rows.json", data)
        write_atomic(folder / "table.md", text)
    return text


_environment = functools.cache(environment)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    text = [[_cell(value) for value in row] for row in rows]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(heads))]
    lines = [heads, ["---:" if right else "---" for right in numeric], *text]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def markdown(rows: Sequence[Row]) -> str:
    """All tables that have rows."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    parts = []
    for row in kinds["base"]:
        parts.append(
            f"Base model: {row['parameters']:,} parameters, {row['tokens']:,} tokens ({row['unique_tokens']:,} "
            f"different ones), validation loss {row['loss']:.4f}, perplexity {row['ppl']:.2f}, "
            f"{row['seconds']:.0f} s.\n"
        )
    for row in kinds["import"]:
        parts.append(
            f"Import: logits differ by at most {row['largest_difference']:.2g} in fp32, best token the same in "
            f"{row['same_best_token']} of {row['tokens']}{'' if row['equal'] else ': NOT the same model'}.\n"
        )
    if kinds["start"]:
        parts.append("Before training:\n\n" + _starts(kinds["start"], next(iter(kinds["base"]), None)))
    if kinds["run"]:
        parts.append("After training:\n\n" + _runs(kinds["run"]))
    if kinds["step_time"]:
        parts.append("Step times:\n\n" + _step_times(kinds["step_time"]))
    if kinds["failed"]:
        parts.append("Failed:\n\n" + "".join(f"- {row['name']}: {row['error']}\n" for row in kinds["failed"]))
    return "\n".join(parts)


def _starts(rows: Sequence[Row], base: Row | None) -> str:
    by_method: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_method[row["plan"], row["method"]].append(row)
    lines = []
    for (plan, method), group in by_method.items():
        losses = [row["loss"] for row in group]
        above = None if base is None else 100 * (statistics.mean(losses) / base["loss"] - 1)
        ppl = statistics.mean(row["ppl"] for row in group)
        lines.append([plan, method, len(group), min(losses), max(losses), ppl, above, group[0]["seconds"]])
    heads = ["plan", "method", "seeds", "lowest loss", "highest loss", "perplexity", "% above the teacher", "seconds"]
    return table(heads, lines)


def _runs(rows: Sequence[Row]) -> str:
    keys = ["plan", "method", "loss_kind", "trainable", "percent", "lr", "batch", "seed", "start_loss", "loss", "ppl"]
    keys += ["above_teacher_percent", "recovery_percent", "kv_bytes_per_token", "kv_vs_teacher", "seconds"]
    heads = ["plan", "method", "loss", "trained", "% of tokens", "lr", "sequences a step", "seed", "start", "val loss"]
    heads += ["perplexity", "% above the teacher", "recovery %", "cache bytes a token", "of the teacher's", "seconds"]
    ordered = sorted(rows, key=lambda row: tuple(row[key] for key in keys[:8]))
    return table(heads, [[row[key] for key in keys] for row in ordered])


def _step_times(rows: Sequence[Row]) -> str:
    keys = ("plan", "trainable", "way", "compiled", "tokens", "steps", "ms", "spread_ms", "against_plain")
    heads = ["plan", "trained", "step", "compiled", "tokens", "steps", "ms", "10-90 % spread, ms", "of the plain step"]
    return table(heads, [[row[key] for key in keys] for row in rows])
