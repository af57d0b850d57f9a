"""Students of an uptraining experiment as models of a table: their caches, losses and, where measured, their scores.

Two forms of results are read. `experiments.half_cache` writes `students`, with the suites of each in `suites`.
`experiments.uptraining` writes `rows` of the kinds `base` and `run`; of the runs that train one plan with one share of
the base's tokens, the one with the lowest loss is a row.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.measured_model import Measured
from cllm.evaluate.records import check_record, optional_number

_TEACHER = "teacher"
_CONTROL = "control"


def has_students(content: dict[str, Any]) -> bool:
    """Whether a JSON file is of one of the two forms."""
    if isinstance(content.get("students"), list):
        return True
    rows = content.get("rows")
    return isinstance(rows, list) and any(isinstance(row, dict) and row.get("kind") == "base" for row in rows)


def read_students(file: Path, content: dict[str, Any]) -> Iterator[Measured]:
    """The teacher and its students. Raises `UserError` for a number or text of a wrong kind, by its key."""
    yield from _of_half_cache(file, content) if "students" in content else _of_uptraining(file, content)


def _of_half_cache(file: Path, content: dict[str, Any]) -> Iterator[Measured]:
    students = [row for row in content["students"] if isinstance(row, dict) and isinstance(row.get("student"), str)]
    if not students:
        raise UserError(f"{file}: students has no objects with `student`, `loss` and `bytes_per_token`")
    teacher = _teacher(content) or file.stem
    first = students[0]
    own = optional_number(first, file, "teacher_bytes_per_token")
    numbers = {_TEACHER: (optional_number(first, file, "teacher_loss"), own)}
    for row in students:
        size = optional_number(row, file, "bytes_per_token")
        loss = optional_number(row, file, "loss") if row.get("finished", True) else None
        numbers[row["student"]] = loss, own if size is None else size
    suites = content.get("suites")
    for name, (loss, size) in numbers.items():
        records = tuple(_records(file, name, suites.get(name) if isinstance(suites, dict) else None))
        label = {_TEACHER: teacher, _CONTROL: f"{teacher}, trained as the students"}.get(name, f"{teacher} as {name}")
        yield Measured(
            name=f"{file.stem}/{name}",
            label=label,
            alike=f"{file.stem}/{name}",
            kv_bytes=size,
            loss=loss,
            text=f"validation of {file.stem}",
            records=records,
        )


def _teacher(content: dict[str, Any]) -> str | None:
    """The teacher's name, or that of its folder from the command that the file was made with."""
    if isinstance(name := content.get("name"), str):
        return name
    command = content.get("command")
    words = shlex.split(command) if isinstance(command, str) else []
    return next((Path(after).name for word, after in itertools.pairwise(words) if word == "--teacher"), None)


def _records(file: Path, name: str, suites: Any) -> Iterator[dict[str, Any]]:
    """Records of a student. Their options are not in the file; its name stands for them."""
    for suite, tasks in suites.items() if isinstance(suites, dict) else ():
        for task, numbers in tasks.items() if isinstance(tasks, dict) else ():
            if isinstance(numbers, dict):
                record = {"suite": suite, "run": name, "spec": None, "task": task, "settings": {"file": file.name}}
                check_record(record | numbers, file)
                yield record | numbers


def _of_uptraining(file: Path, content: dict[str, Any]) -> Iterator[Measured]:
    rows = [row for row in content["rows"] if isinstance(row, dict)]
    best: dict[tuple[Any, ...], tuple[float, dict[str, Any]]] = {}
    for row in rows:
        loss = optional_number(row, file, "loss")
        if row.get("kind") not in ("base", "run") or loss is None:
            continue
        key = row["kind"], row.get("plan"), row.get("percent")
        if key not in best or loss < best[key][0]:
            best[key] = loss, row
    base = next((row for row in rows if row.get("kind") == "base"), {})
    size = optional_number(base, file, "parameters")
    scale = "" if size is None else f" of {size / 1e6:.0f}M"
    full = next((row["kv_bytes_per_token"] / row["kv_vs_teacher"] for row in rows if row.get("kv_vs_teacher")), None)
    for (kind, plan, percent), (loss, row) in best.items():
        label = f"base{scale}" if kind == "base" else f"base{scale} as {plan}, {percent:g} % of its tokens"
        yield Measured(
            name=f"{file.stem}/{row['name']}",
            label=label,
            alike=f"{file.stem}/{kind}/{plan}/{percent}",
            kv_bytes=full if kind == "base" else optional_number(row, file, "kv_bytes_per_token"),
            kv_vs_mha=1.0 if kind == "base" else optional_number(row, file, "kv_vs_teacher"),
            loss=loss,
            text=f"validation of {file.stem}",
            facts={"file": file.stem},
        )
