"""The tables of docs/uptraining.md about students of a teacher from scratch, and that of docs/plans.md about random
sources, are those of the files in docs/results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments import random_sources
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


def test_random_sources() -> None:
    results = found("2026-11-29-random-sources-1m-cpu.json")["results"]
    text = (DOCS / "plans.md").read_text(encoding="utf-8")
    part = text.split("\n### Measured at 1.1 M parameters\n")[1].split("\n## ")[0]
    assert random_sources.table(results) in part
    losses = {(row["method"], row["cache_percent"], row["seed"]): row for row in results}

    def differences(method: str, other: str, cache: int, key: str = "loss") -> list[float]:
        return [losses[method, cache, seed][key] - losses[other, cache, seed][key] for seed in range(3)]

    def span(values: list[float]) -> str:
        assert min(values) > 0, "of one sign with every seed"
        return f"{min(values):.3f} to {max(values):.3f}"

    half, quarter = (differences("plain", "all", cache) for cache in (50, 25))
    for cache in (50, 25):
        for seed in range(3):
            rise = {m: losses[m, cache, seed]["loss"] - losses[m, 100, seed]["loss"] for m in ("none", "plain", "all")}
            assert rise["all"] < min(rise["none"], rise["plain"])
            others = [losses[method, cache, seed]["loss"] for method in ("none", "plain", "all", "owners")]
            assert losses["scratch", cache, seed]["loss"] < min(others)
    rules = [abs(value) for cache in (100, 50, 25) for value in differences("owners", "all", cache)]
    after = differences("plain", "all", 25, "adapted_loss")
    scratch = differences("scratch", "none", 100)
    teachers = [row for row in results if (row["method"], row["cache_percent"]) == ("none", 100)]
    base = [row["loss"] for row in teachers]
    rough = [row["adapted_loss"] - row["loss"] for row in teachers]
    for signs in (differences("plain", "all", 50, "adapted_loss"), scratch):
        assert min(signs) < 0 < max(signs), "of either sign"
    written = " ".join(part.split())
    for sentence in (
        f"at 50 % of the cache `all` is {span(half)} below `plain`, at 25 % {span(quarter)}",
        f"with `all` the loss at 100 % is {span(differences('all', 'plain', 100))} above that of `plain`",
        f"`scratch` is {-min(scratch):.3f} below to {max(scratch):.3f} above the teacher there",
        f"the losses of `owners` and `all` differ by at most {max(rules):.3f}",
        f"differ by up to {max(base) - min(base):.3f} among themselves",
        f"`all` is {span(after)} below `plain` at 25 %",
        f"they raise the loss of the teacher at 100 % by {span(rough)}",
    ):
        assert sentence in written, sentence
