"""`python -m experiments.uptraining` on a CPU with a tiny model: its results, how it resumes, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.environment import environment
from cllm.errors import EXIT_STOPPED
from experiments.uptraining import base, experiment, report, setup, steptime, students
from experiments.uptraining.__main__ import main
from experiments.uptraining.setup import Student, agenda

WORDS = "the plan says where keys and values come from and every layer reads what an owner wrote"


@pytest.fixture(scope="module", autouse=True)
def warm_students(warm_executable: Path) -> Iterator[None]:
    """Students' processes start with the training stack imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(warm_executable))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS.split(), k=draw.randint(20, 200))) for _ in range(600))
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    said = ["--tiny", "--tokens", "51200", "--corpus", str(corpus), "--out", str(out), "--device", "cpu"]
    return [*said, "--percents", "5", "--seeds", "2", "--parallel", "2", *more]


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((out / "rows.json").read_text())["rows"] if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "out"
    only = "start-|steps-|fusedkv-fit-distilled-all|mha"
    assert main(["all", *command(corpus, out, "--only", only, "--results", str(out / "copies"))]) == 0
    return out


def test_every_step_leaves_its_rows(whole: Path) -> None:
    (base,), (imported,) = rows(whole, "base"), rows(whole, "import")
    assert imported["largest_difference"] < 1e-4
    assert imported["same_best_token"] == imported["tokens"] > 0
    assert base["loss"] < 4.5, "of log 300 = 5.7 at the start: it has learnt something"
    starts = {(row["plan"], row["method"], row["seed"]) for row in rows(whole, "start")}
    assert {("fusedkv", "fit", 0), ("fusedkv", "fit", 1), ("fusedkv", "copy", 0), ("mla", "svd", 1)} <= starts
    assert ("fusedkv", "copy", 1) not in starts, "copy reads no text"
    times = {(row["trainable"], row["way"]): row for row in rows(whole, "step_time")}
    assert times.keys() == {(trained, way) for trained in ("all", "kv") for way in steptime.WAYS}
    for (trained, _), row in times.items():
        assert row["against_plain"] == pytest.approx(row["ms"] / times[trained, "plain"]["ms"])
    text = (whole / "table.md").read_text()
    assert "| fusedkv | fit | distilled | all | 5 |" in text
    assert json.loads((whole / "rows.json").read_text())["environment"].keys() == environment().keys()
    for name in ("rows.json", "table.md"):
        assert (whole / "copies" / name).read_text() == (whole / name).read_text()


def test_each_way_of_a_step_has_its_own_loss_and_stands_beside_the_plain_one(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in each step, counted; and the arithmetic, on times that are given."""
    parts: dict[str, set[str]] = {}
    forwards: Counter[tuple[str, str]] = Counter()
    way = iter(list(steptime.WAYS) * (steptime._TURNS + 1))
    times = {
        "plain": [10.0, 12.0],
        "kl": [21.0, 23.0],
        "distilled": [32.0, 34.0],
        "distilled, all layers": [43.0, 45.0],
    }

    def timed(module: Any, optimizer: Any, batch: Any, device: Any, steps: int) -> list[float]:
        name = next(way)
        if steps == steptime._WARMUP:
            hooks = [
                model.register_forward_pre_hook(lambda *_, who=who: forwards.update([(name, who)]))
                for who, model in (("student", module.model.blocks[0]), ("teacher", module._teacher[0].blocks[0]))
            ]
            parts[name] = set(module.objective(batch))
            for hook in hooks:
                hook.remove()
            return [1000.0]
        return times[name]

    monkeypatch.setattr(steptime, "time_training", timed)
    size, folders = dataclasses.replace(setup.TINY, tokens=51200), setup.Folders(whole)
    student = Student("fusedkv", "copy", "plain", "all", 5.0, 1e-3)
    found = steptime.measure_steps(folders, size, student, device=torch.device("cpu"), compiled=False, steps=2)
    assert [(row["ms"], row["against_plain"]) for row in found] == [(11, 1), (22, 2), (33, 3), (44, 4)]
    assert {row["steps"] for row in found} == {2 * steptime._TURNS}
    plain = {"objective", "next_token"}
    distilled = plain | {"kl", "hidden"}
    assert parts == {
        "plain": plain,
        "kl": plain | {"kl"},
        "distilled": distilled,
        "distilled, all layers": distilled,
    }
    reads = {(name, who): 1 for name in steptime.WAYS for who in ("student", "teacher")}
    del reads["plain", "teacher"]
    assert forwards == reads


def test_a_run_starts_from_what_starts_measured_and_reads_its_share_of_tokens(whole: Path) -> None:
    (base,) = rows(whole, "base")
    start = next(r for r in rows(whole, "start") if (r["plan"], r["method"], r["seed"]) == ("fusedkv", "fit", 0))
    runs = {(row["plan"], row["loss_kind"]): row for row in rows(whole, "run")}
    assert runs.keys() == {("fusedkv", "distilled"), ("mha", "plain")}
    for row in runs.values():
        assert row["teacher_loss"] == pytest.approx(base["loss"], rel=1e-5)
        assert row["tokens"] == pytest.approx(0.05 * base["tokens"], rel=0.03)
    fused, same = runs["fusedkv", "distilled"], runs["mha", "plain"]
    assert fused["start_loss"] == pytest.approx(start["loss"], rel=1e-5)
    assert same["start_loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert (fused["kv_vs_teacher"], same["kv_vs_teacher"]) == (0.5, 1)
    assert fused["above_teacher_percent"] == pytest.approx(100 * (fused["loss"] / base["loss"] - 1), abs=1e-3)


def test_a_second_command_makes_nothing_again(corpus: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "results").iterdir()}
    assert main(["all", *command(corpus, whole, "--only", "start-fusedkv|mha")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (whole / "results").iterdir()} == before


def test_what_answers_most_comes_first() -> None:
    said = {"seeds": 1, "train_seeds": 2, "percents": [1.0, 2.0, 5.0], "compile_steps": True}
    listed = agenda({"all": 5e-4, "kv": 1e-3}, **said)
    names = [item.name.split("-lr")[0] for item in listed]
    assert names[:3] == [f"start-fusedkv-{method}-seed0" for method in ("copy", "mean", "fit")]
    assert names[9:12] == [f"{plan}-fit-distilled-all-5pct" for plan in ("fusedkv", "fusedkv_lite", "cla")]
    assert names[15:19] == ["steps-all-compiled", "steps-kv-compiled"] + [
        f"fusedkv-fit-distilled-all-{percent}pct" for percent in (2, 1)
    ]
    assert len(listed) == len(set(listed))
    assert {item.seed for item in listed if isinstance(item, Student)} == {0, 1}


def test_what_fails_is_written_down_and_stops_nothing_else(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for file in (out / "results").glob("*"):
        if file.stem not in ("base", "import"):
            file.unlink()
    shutil.rmtree(out / "runs")
    arguments = ["starts", "students", *command(corpus, out, "--only", "(start-)?fusedkv(_lite)?-copy-")]
    plans = setup.plans
    broken = {"fusedkv": {"preset": "fusedkv", "n_kv_heads": 3}}
    with monkeypatch.context() as patch:
        patch.setattr(students, "plans", lambda size: plans(size) | broken)
        assert main([*arguments, "--lr", "1e-3"]) == 1
    failed = {row["name"]: row["error"] for row in rows(out, "failed")}
    assert failed.keys() == {"start-fusedkv-copy-seed0", "fusedkv-copy-distilled-all-5pct-lr0.001-seed0"}
    assert all("n_kv_heads" in error for error in failed.values())
    assert "- start-fusedkv-copy-seed0: " in (out / "table.md").read_text()
    for kind in ("start", "run"):
        assert [row["plan"] for row in rows(out, kind)] == ["fusedkv_lite"]
    assert main([*arguments, "--lr", "1e-3"]) == 0, "tried again"
    assert not rows(out, "failed")
    assert len(rows(out, "run")) == 2


def test_a_second_interrupt_that_became_another_error_is_no_failure(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for file in (out / "results").glob("start-*"):
        file.unlink()

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("cannot be built: Interrupted: SIGINT")

    monkeypatch.setattr(experiment, "measure_start", interrupted)
    assert main(["starts", *command(corpus, out, "--only", "start-")]) == EXIT_STOPPED
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGINT; the same command goes on"
    assert not rows(out, "failed")


def test_an_import_that_differs_leaves_its_row(corpus: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "results" / "import.json").unlink()
    monkeypatch.setattr(base, "LOGITS_CLOSE", -1.0)
    assert main(["import", *command(corpus, out)]) == 1
    (row,) = rows(out, "import")
    assert not row["equal"]
    assert "NOT the same model" in (out / "table.md").read_text()


TRAIN = """
import pathlib, signal, sys, time
run = pathlib.Path(sys.argv[2]).parents[1] / "runs" / pathlib.Path(sys.argv[2]).stem
run.mkdir(parents=True, exist_ok=True)
assert sys.argv[3:] == ["--resume", "auto"]
if (run / "saved").exists():
    (run / "metrics.jsonl").write_text('{"step": 20, "tokens": 1, "time": 1.0, "val/loss": 1.0}\\n')
    sys.exit()
def save(*_):
    (run / "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
(run / ".cllm").write_text('{"kind": "run"}')
(run / "waits").touch()
time.sleep(600)
"""


def test_students_are_saved_when_time_is_up_and_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(students, "ROOT", tmp_path)
    monkeypatch.setattr(students, "run_row", lambda _, student, seconds: {
        "kind": "run", "percent": student.percent, "seconds": seconds, "start_loss": 2.0, "loss": 1.0,
        "teacher_loss": 1.0, "above_teacher_percent": 0.0})  # fmt: skip
    monkeypatch.setattr(report, "markdown", str)
    size, folders = dataclasses.replace(setup.TINY, tokens=51200), setup.Folders(tmp_path / "out")
    setup.claim(folders, size)
    student = Student("fusedkv", "copy", "plain", "all", 5.0, 1e-3)
    options = {"device": torch.device("cpu"), "compiled": False, "parallel": 1}

    run_folder, spent = folders.runs / student.name, folders.out / "seconds" / f"{student.name}.txt"

    class OnceItWaits(setup.Deadline):
        """Time is up as soon as the student can be told so."""

        @property
        def left(self) -> float:
            return 0.0 if (run_folder / "waits").exists() else self.seconds

    def run(deadline: setup.Deadline) -> int:
        return students.Runner(folders, size, deadline=deadline, **options).run([student])

    assert run(OnceItWaits(600)) == 1
    assert (run_folder / "saved").exists()
    assert float(spent.read_text()) > 0
    spent.write_text("100.0\n")
    assert run(setup.Deadline(600)) == 0
    (row,) = report.read_rows(folders)
    assert row["seconds"] > 100, "both commands' time"
    report.write_result(folders, "longer", row | {"seconds": 20.0})
    folders.result(student.name).unlink()
    assert run(setup.Deadline(600)) == 0
    folders.result(student.name).unlink()
    deadline = setup.Deadline(100)
    deadline.at -= 90
    assert run(deadline) == 1, "20 s do not fit into 10"


def test_pretraining_goes_on_where_time_ran_out(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tokens", "base", *command(corpus, tmp_path / "out")]
    assert main([*arguments, "--minutes", "0"]) == 3
    assert "base not finished" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base").exists()
    assert main(arguments) == 0
    assert rows(tmp_path / "out", "base")[0]["loss"] == rows(whole, "base")[0]["loss"]


def test_a_folder_of_another_size_is_refused(corpus: Path, whole: Path, capsys) -> None:
    assert main(["all", *command(corpus, whole), "--tokens", "60000"]) == 2
    assert "made with tokens 51200, and this command says 60000" in capsys.readouterr().err
    assert main(["all", *command(corpus, whole), "--base-seed", "1"]) == 2
    assert "made with base_seed 0, and this command says 1" in capsys.readouterr().err
    assert main(["starts", *command(corpus, whole.parent / "empty")]) == 2
    assert "holds no base model yet" in capsys.readouterr().err
