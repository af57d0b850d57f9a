"""The evaluations of a point, which end one by one: records of those that have ended survive what ends the others.

Records of the n-th evaluation are in `n/` of the point's folder. When it has ended, `n.done` is written with the hash
of its words and of the code. A repeated evaluation skips those whose mark is there, and a result gets their records
while the others still run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cllm.files import json_files, write_atomic
from cllm.study.results import Result, read_result, with_evaluations, write_result
from cllm.trust import read_object


def mark_of(folder: Path, n: int) -> Path:
    """The file that says that the n-th evaluation has ended."""
    return folder / f"{n:02d}.done"


def has_ended(folder: Path, n: int, mark: str) -> bool:
    """Whether the n-th evaluation has ended, with the words and the code that `mark` is the hash of."""
    try:
        return mark_of(folder, n).read_text(encoding="utf-8").strip() == mark
    except (OSError, UnicodeDecodeError):
        return False


def clear_unfinished(folder: Path, marks: Sequence[str]) -> None:
    """Delete the records of evaluations that have not ended, or had other words or another version of the code."""
    kept = {f"{n:02d}" for n, mark in enumerate(marks) if has_ended(folder, n, mark)}
    for path in folder.glob("*"):
        if path.stem not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(folder: Path, n: int, mark: str, run: Callable[[Path], int]) -> int:
    """Run the n-th evaluation, unless it has ended before.

    Args:
        folder: of the point's evaluations.
        n: number of the evaluation.
        mark: the hash of its words and of the code.
        run: writes its records into the folder it is given, and returns its exit status.

    Returns:
        The exit status.
    """
    if has_ended(folder, n, mark):
        return 0
    records = folder / f"{n:02d}"
    shutil.rmtree(records, ignore_errors=True)
    mark_of(folder, n).unlink(missing_ok=True)
    if (status := run(records)) == 0:
        write_atomic(mark_of(folder, n), mark + "\n")
    return status


def count_ended(folder: Path, marks: Sequence[str]) -> int:
    """How many evaluations have ended."""
    return sum(has_ended(folder, n, mark) for n, mark in enumerate(marks))


def records_of(folder: Path, marks: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the evaluations that have ended, in their order."""
    ended = [n for n, mark in enumerate(marks) if has_ended(folder, n, mark)]
    return [read_object(file) for n in ended for file in json_files(folder / f"{n:02d}")]


def evaluation_intervals(folder: Path, marks: Sequence[str], since: float) -> list[tuple[float, float]]:
    """When the evaluations that have ended after `since` computed, by the `seconds` of their records.

    Seconds of each set and spec count once: the records of all tasks of a suite repeat them.

    Returns:
        (begin, end) of each evaluation, in seconds since the epoch; its end is taken to be that of its computation.
    """
    found = []
    for n, mark in enumerate(marks):
        if not has_ended(folder, n, mark) or (ended := mark_of(folder, n).stat().st_mtime) < since:
            continue
        longest: dict[tuple[Any, Any], float] = {}
        for file in json_files(folder / f"{n:02d}"):
            record = read_object(file)
            key = record.get("set"), record.get("spec")
            longest[key] = max(longest.get(key, 0.0), record.get("seconds") or 0.0)
        found.append((ended - sum(longest.values()), ended))
    return found


def keep_records(result: Path, folder: Path, marks: Sequence[str]) -> Result:
    """Write the records of the evaluations that have ended into a result that has no complete evaluation yet."""
    found = read_result(result)
    if found.evaluated is None:
        records = records_of(folder, marks)
        if len(records) > len(found.content["evaluations"]):
            content = with_evaluations(found.content, records, None)
            write_result(result, content)
            return Result(result, content)
    return found
