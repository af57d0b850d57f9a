"""`scripts/uptrain_evidence.py` on a CPU with a tiny model: what it makes, how it goes on, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cllm.train.environment import environment

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the plan says where keys and values come from and every layer reads what an owner wrote"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uptrain_evidence", ROOT / "scripts" / "uptrain_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS.split(), k=draw.randint(20, 200))) for _ in range(600))
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    said = ["--tiny", "--tokens", "51200", "--corpus", str(corpus), "--out", str(out), "--device", "cpu"]
    return [*said, "--percents", "5", "--seeds", "2", *more]


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((out / "rows.json").read_text())["rows"] if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(script: ModuleType, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "out"
    only = "start-|fusedkv-fit-distilled-all|fusedkv-fit-plain|mha"
    assert script.main(["all", *command(corpus, out, "--only", only)]) == 0
    return out


def test_every_step_leaves_its_rows(whole: Path) -> None:
    (base,), (imported,) = rows(whole, "base"), rows(whole, "import")
    assert imported["largest_difference"] < 1e-4
    assert imported["same_best_token"] == imported["tokens"] > 0
    assert base["loss"] < 4.5, "of log 300 = 5.7 at the start: it has learnt something"
    starts = {(row["plan"], row["method"], row["seed"]) for row in rows(whole, "start")}
    assert {("fusedkv", "fit", 0), ("fusedkv", "fit", 1), ("fusedkv", "copy", 0), ("mla", "svd", 1)} <= starts
    assert ("fusedkv", "copy", 1) not in starts, "copy reads no text"
    times = {(row["trainable"], row["way"]): row["against_plain"] for row in rows(whole, "step_time")}
    assert times["all", "plain"] == times["kv", "plain"] == 1
    assert times["all", "distilled"] > 1
    text = (whole / "table.md").read_text()
    assert "| fusedkv | fit | distilled | all | 5 |" in text
    assert json.loads((whole / "rows.json").read_text())["environment"].keys() == environment().keys()


def test_a_run_starts_from_what_starts_measured_and_reads_its_share_of_tokens(whole: Path) -> None:
    (base,) = rows(whole, "base")
    start = next(r for r in rows(whole, "start") if (r["plan"], r["method"], r["seed"]) == ("fusedkv", "fit", 0))
    runs = {(row["plan"], row["loss_kind"]): row for row in rows(whole, "run")}
    assert runs.keys() == {("fusedkv", "distilled"), ("fusedkv", "plain"), ("mha", "plain")}
    for row in runs.values():
        assert row["teacher_loss"] == pytest.approx(base["loss"], rel=1e-5)
        assert row["tokens"] == pytest.approx(0.05 * base["tokens"], rel=0.03)
    fused, same = runs["fusedkv", "distilled"], runs["mha", "plain"]
    assert fused["start_loss"] == pytest.approx(start["loss"], rel=1e-5)
    assert same["start_loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert (fused["kv_vs_teacher"], same["kv_vs_teacher"]) == (0.5, 1)
    assert fused["above_teacher_percent"] == pytest.approx(100 * (fused["loss"] / base["loss"] - 1), abs=1e-3)


def test_a_second_command_makes_nothing_again(script: ModuleType, corpus: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "results").iterdir()}
    assert script.main(["all", *command(corpus, whole, "--only", "start-fusedkv|mha")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (whole / "results").iterdir()} == before


def test_pretraining_goes_on_where_time_ran_out(
    script: ModuleType, corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tokens", "base", *command(corpus, tmp_path / "out")]
    assert script.main([*arguments, "--minutes", "0"]) == 3
    assert "base not finished" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base").exists()
    assert script.main(arguments) == 0
    assert rows(tmp_path / "out", "base")[0]["loss"] == rows(whole, "base")[0]["loss"]


def test_a_process_of_its_own_trains_the_same_student(script: ModuleType, corpus: Path, whole: Path) -> None:
    only = ["--only", "fusedkv-fit-distilled-all"]
    kept = whole / "results" / "fusedkv-fit-distilled-all-5pct-lr0.0005-seed0.json"
    before = json.loads(kept.read_text())
    kept.unlink()
    assert script.main(["students", *command(corpus, whole, "--parallel", "2", *only)]) == 0
    assert json.loads(kept.read_text())["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_a_folder_of_another_size_is_refused(script: ModuleType, corpus: Path, whole: Path, capsys) -> None:
    assert script.main(["all", *command(corpus, whole), "--tokens", "60000"]) == 2
    assert "made with tokens 51200, and this command says 60000" in capsys.readouterr().err
    assert script.main(["starts", *command(corpus, whole.parent / "empty")]) == 2
    assert "holds no base model yet" in capsys.readouterr().err
