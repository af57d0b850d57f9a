"""The tables of docs/uptraining.md about students of a teacher from scratch are those of the files in docs/results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.half_cache.runner import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "uptraining.md").read_text(encoding="utf-8")
SECTION = TEXT.split("\n### A teacher from scratch\n")[1].split("\n### ")[0]


def found(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in lines]


def test_three_seeds() -> None:
    results = found("2026-11-29-shares-110m-seeds-h200.json")
    part = SECTION.split("**Three seeds")[1].split("**All students")[0]
    expected = [[cell.replace("-0.00", "0.00") for cell in row] for row in rows(table(results["students"]))]
    assert rows(part) == expected
    above: dict[str, list[float]] = {}
    for student in results["students"]:
        above.setdefault(student["kind"], []).append(100 * (student["ppl"] / student["teacher_ppl"] - 1))
        assert math.log(student["ppl"]) == pytest.approx(student["loss"])
    gqa, mla, (control,) = above["gqa"], above["mla_4"], above["control"]
    assert (
        f"gqa ends {min(gqa):.1f} to {max(gqa):.1f} % above the teacher, mla_4 {min(mla):.1f} to {max(mla):.1f} % and "
        f"the control {control:.1f} %"
    ) in " ".join(part.split())
    assert f"loss of {results['teacher']['loss']:.4f}" in part


def test_one_seed() -> None:
    results = found("2026-11-28-shares-110m-h200.json")
    written = {row[0]: row for row in rows(SECTION.split("**All students")[1])}
    for student in results["students"]:
        cells, suites = written[student["kind"]], results["suites"][student["student"]]["copying"]
        start = 100 * (student["start_loss"] / student["teacher_loss"] - 1)
        numbers = [student["share"], start, student["above_teacher_percent"], student["loss"], student["ppl"]]
        shown = [f"{number:.{digits}f}" for number, digits in zip(numbers, (3, 2, 2, 4, 2), strict=True)]
        copied = [suites[f"distance={n}"] for n in (128, 512)]
        shown += [f"{student['ar_loss']:.3f}"]
        shown += [f"{c['accuracy']:.1f} ± {c['accuracy_stderr']:.1f}" for c in copied]
        assert cells[2:] == shown, student["student"]


def test_kinds_on_a_cpu() -> None:
    """Every student of the first files, alone or as the mean of its seeds, is a row."""
    part = TEXT.split("\n### Kinds and recipes, on two CPU cores\n")[1].split("**The loss on attention's outputs.**")[0]
    first, more = (found(f"{name}-2-cpu.json")["students"] for name in ("2026-11-27-shares", "2026-11-29-shares-kinds"))
    known = {student["student"] for student in first}
    assert [s["loss"] for s in more if s["student"] == "fusedkv"] == [
        s["loss"] for s in first if s["student"] == "fusedkv"
    ]
    expected = rows(table([*first, *(student for student in more if student["student"] not in known)]))
    tables = [row for row in rows(part) if row[0] != "student"]
    assert sorted(tables) == sorted(row for row in expected if row[0] != "student")
