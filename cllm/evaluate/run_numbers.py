"""Numbers in the files of a run: of its training, and of its records of suites."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.measured import records_of_run
from cllm.evaluate.measured_model import EXACT, spec_of
from cllm.evaluate.records import is_number, read_record
from cllm.evaluate.score_choice import ScoreChoice, suite_of
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.units import set_label
from cllm.files import inside, shorten
from cllm.rows import Row as MetricsRow
from cllm.runs import RunFolder
from cllm.runs.speed import median_speed


def number(file: Path, content: dict[str, Any], *keys: str) -> Any:
    """The number at the nested `keys`. Only a perplexity may be infinite. Raises `UserError` for anything else."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not is_number(value) or (math.isinf(value) and keys[-1] != "perplexity"):
        what = "null or missing" if value is None else shorten(repr(value))
        raise UserError(f"{file}: {'.'.join(keys)} is {what}; allowed: a number")
    return value


def suite_numbers(
    run: RunFolder, set_name: str, scores: Sequence[ScoreChoice]
) -> tuple[dict[str, float], dict[str, tuple[Path, dict[str, Any]]]]:
    """Numbers of the run's records of suites with columns of their own, the score among them.

    Also the records themselves, with their files.
    """
    numbers: dict[str, float] = {}
    records: dict[str, tuple[Path, dict[str, Any]]] = {}
    for suite in suites().values():
        compared = suite.compared_numbers()
        if not compared:
            continue
        record_of = set_label(set_name) if suite.takes_text else suite.name
        name = f"{run.evaluation_folder.name}/{suite.file(record_of)}"
        path = inside(run.path, name, written_in=run.path)
        if path.exists():
            record = read_record(path)
            records[suite.name] = path, record
            numbers |= {f"{suite.name}_{shown.key}": number(path, record, shown.key) for shown in compared}
            for choice in scores:
                if (
                    choice.suite.name == suite.name
                    and choice.task is None
                    and record.get(choice.number.key) is not None
                ):
                    numbers[choice.name] = number(path, record, choice.number.key)
    if searched := [choice for choice in scores if choice.name not in numbers]:
        every = records_of_run(run)
        for choice in searched:
            own = [one for one in every if suite_of(one) == choice.suite.name and spec_of(one) == EXACT]
            values = [value for one in own if (value := choice.value(one)) is not None]
            numbers |= {choice.name: values[-1].value} if values else {}
    return numbers, records


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingNumbers:
    """The values of `metrics.jsonl` that a table shows."""

    step: int
    tokens: int
    tokens_per_s: float | None
    validated: MetricsRow | None
    """The newest row with a loss on the set."""


def training_numbers(run: RunFolder, prefix: str) -> TrainingNumbers:
    """Read the rows in one pass; only rates are kept in memory, 8 bytes each."""
    newest: MetricsRow = {"step": 0, "tokens": 0}
    validated, rates = None, array("d")
    for row in run.metrics():
        newest = row
        if row.get(f"{prefix}/loss") is not None:
            validated = row
        if row.get("throughput/tokens_per_s") is not None:
            rates.append(number(run.metrics_file, row, "throughput/tokens_per_s"))
    tokens = number(run.metrics_file, newest, "tokens")
    return TrainingNumbers(step=newest["step"], tokens=tokens, tokens_per_s=median_speed(rates), validated=validated)
