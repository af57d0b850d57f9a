"""`scripts/bench_scaling.py` on CPU processes: the same path as on GPUs, but for ZeRO."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from cllm.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "data": {"seq_len": 64, "num_workers": 0},
    "train": {"micro_batch": 2, "accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def script(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(ROOT / "scripts" / "bench_scaling.py")


@pytest.fixture
def bench(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs it on a tiny model in `tmp_path / "work"` and gives its exit status."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *arguments: script.main(["--config", str(file), "--work", str(tmp_path / "work"), *arguments])


def test_runs_are_compared_and_a_failed_one_does_not_stop_the_others(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """zero1 fails on a CPU; each device takes a micro-batch of 2 sequences of 64 in a step."""
    out = tmp_path / "out.json"
    arguments = ["--runs", "single:1", "zero1:1", "ddp:2", "--steps", "6", "--log-every", "2", "--skip-rows", "1"]
    status = bench(*arguments, "--random-tokens", "--out", str(out))
    printed = capsys.readouterr()
    assert status == 1, printed.err
    assert "2-zero1-x1 failed, status 2" in printed.err
    assert "CUDA devices only" in printed.err, "the tail of its log"
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["strategy"], row["devices"]) for row in found["rows"]] == [("single", 1), ("ddp", 2)]
    assert list(found["failed"]) == ["2-zero1-x1"]
    assert found["environment"]["torch"]
    for row, name in zip(found["rows"], ("1-single-x1", "3-ddp-x2"), strict=True):
        folder = RunFolder(tmp_path / "work" / name)
        metrics = list(folder.metrics())
        assert [line["tokens"] for line in metrics] == [n * 128 * row["devices"] for n in (2, 4, 6)]
        assert row["rows"] == 2, "the first is left out"
        rates = [line["throughput/tokens_per_s"] for line in metrics[1:]]
        assert row["tokens_per_s"] == pytest.approx(sum(rates) / 2)
        assert row["loss"] == pytest.approx(math.log(300), abs=0.1), "nothing to learn from drawn tokens"
        assert folder.checkpoints() == []
    ratio = found["rows"][1]["tokens_per_s"] / found["rows"][0]["tokens_per_s"]
    (line,) = (line for line in printed.out.splitlines() if line.startswith("ddp"))
    assert f"{ratio:.3f}" in line.split()
    assert f"{ratio / 2:.3f}" in line.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "single"], "--runs single: not of the form STRATEGY:DEVICES"),
        (["--runs", "single:1", "zero4:2"], "train.strategy"),
        (["--steps", "10"], "--steps 10 with --log-every 5 gives no more rows than --skip-rows 2 leaves out"),
        (["--train.nosuch", "1"], "train.nosuch: unknown key"),
        (["--model.vocab_size", "null", "--random-tokens"], "model.vocab_size is null"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    bench: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
