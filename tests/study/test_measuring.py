"""Evaluations of a point end one by one, and those that have ended are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from cllm.commands import study_point
from cllm.study.measuring import clear_unfinished, keep_records, records_of

COMMANDS = [["--suite", "copying"], ["--suite", "mqar"], ["--suite", "ruler"]]
MARKS = ["a", "b", "c"]


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[str], dict[str, int]]:
    """The job file of a point, its folder, the suites that were measured, and the exit status of each."""
    folder, measured, statuses = tmp_path / "p.evaluation", [], {"copying": 0, "mqar": 143, "ruler": 0}

    def evaluate(words: list[str]) -> int:
        suite, out = words[words.index("--suite") + 1], Path(words[words.index("--out") + 1])
        measured.append(suite)
        out.mkdir(parents=True)
        (out / "all.json").write_text(json.dumps({"suite": suite, "run": "r", "loss": 1.0}))
        return statuses[suite]

    monkeypatch.setattr("cllm.commands.evaluate.main", evaluate)
    job = tmp_path / "p.json"
    job.write_text(json.dumps({"run": "r", "out": str(folder), "commands": COMMANDS, "marks": MARKS}))
    return job, folder, measured, statuses


def test_an_evaluation_that_was_killed_goes_on_with_the_suite_that_it_was_at(point) -> None:
    job, folder, measured, statuses = point
    assert study_point.main([str(job)]) == 143
    assert [record["suite"] for record in records_of(folder, MARKS)] == ["copying"]
    statuses["mqar"] = 0
    assert study_point.main([str(job)]) == 0
    assert measured == ["copying", "mqar", "mqar", "ruler"]
    assert [record["suite"] for record in records_of(folder, MARKS)] == ["copying", "mqar", "ruler"]


def test_one_that_is_refused_leaves_the_others_and_is_tried_again(point) -> None:
    job, folder, measured, statuses = point
    statuses["mqar"] = 2
    assert study_point.main([str(job)]) == study_point.main([str(job)]) == 2
    assert measured == ["copying", "mqar", "ruler", "mqar"]
    assert [record["suite"] for record in records_of(folder, MARKS)] == ["copying", "ruler"]


def test_records_of_other_words_or_another_version_are_measured_again(point) -> None:
    _, folder, _, statuses = point
    statuses["mqar"] = 0
    study_point.main([str(point[0])])
    assert records_of(folder, ["a", "x", "c"])[1]["suite"] == "ruler"
    clear_unfinished(folder, ["a", "x"])
    assert sorted(path.name for path in folder.iterdir()) == ["00", "00.done"]


def test_a_result_gets_the_records_of_what_has_ended(finished: Path, chaos: ModuleType, tmp_path: Path, point) -> None:
    job, folder, *_ = point
    study_point.main([str(job)])
    result = Path(shutil.copy(next((finished / "results").glob("*.json")), tmp_path))
    content = json.loads(result.read_text())
    result.write_text(json.dumps(content | {"evaluated": None, "evaluations": []}))
    kept = keep_records(result, folder, MARKS)
    assert (kept.evaluated, [record["suite"] for record in kept.content["evaluations"]]) == (None, ["copying"])
    complete = content | {"evaluated": "e", "evaluations": [{"suite": "piqa"}]}
    result.write_text(json.dumps(complete))
    assert keep_records(result, folder, MARKS).content == complete, "a complete evaluation is not replaced by a part"
