"""`python -m benchmarks.scaling` on CPU processes: the same path as on GPUs, but for ZeRO and profiles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import launch, worker
from benchmarks.scaling.cases import Cases, cases_of, load_case
from benchmarks.scaling.launch import startable
from benchmarks.scaling.profile import merged, read_profiles, shares
from cllm.config import Config
from cllm.config.load import read_yaml, validate
from cllm.runs import RunFolder
from tests.ranks import train_on_ranks

main = scaling.main

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "data": {"seq_len": 64, "num_workers": 0},
    "train": {"micro_batch": 2, "global_batch": 4, "accelerator": "cpu"},
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return file


@pytest.fixture
def bench(tiny: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs it on a tiny model in `tmp_path / "work"` and gives its exit status."""
    return lambda *words: main(["--config", str(tiny), "--work", str(tmp_path / "work"), *words])


class Finished:
    """A run that was trained in this process."""

    def __init__(self, status: int, gpus: list[int]):
        self.status, self.gpus, self.seconds = status, gpus, 1.0

    def poll(self, *, end: bool = False) -> int:
        return self.status


@pytest.fixture
def single_runs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of the strategy `single` call the worker in this process; all others are started as processes."""
    start = scaling.start

    def begin(config: Config, gpus: list[int], profiled: int, timeout: float) -> Any:
        if config.train.strategy != "single":
            return start(config, gpus, profiled, timeout)
        file = tmp_path / f"{config.name}.yaml"
        file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
        return Finished(worker.main(str(file), str(profiled)) or 0, gpus)

    monkeypatch.setattr(scaling, "start", begin)


@pytest.fixture
def forked_ranks(single_runs_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `single_runs_here`, and processes of `ddp` are forked instead of started by the worker."""
    begin = scaling.start

    def fork(config: Config, gpus: list[int], profiled: int, timeout: float) -> Any:
        if config.train.strategy != "ddp":
            return begin(config, gpus, profiled, timeout)
        assert isinstance(config.train.devices, int)
        train_on_ranks(config.train.devices, config, tmp_path / "log.txt")
        return Finished(0, gpus)

    monkeypatch.setattr(scaling, "start", fork)


@pytest.mark.usefixtures("single_runs_here", "warm_python")
def test_runs_are_compared_and_a_failed_one_does_not_stop_the_others(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """zero1 fails on a CPU; each device takes a micro-batch of 2 sequences of 64 in a step."""
    out = tmp_path / "out.json"
    words = ["--runs", "single:1", "zero1:1", "ddp:2", "--steps", "6", "--log-every", "2", "--skip-rows", "1"]
    status = bench(*words, "--profile", "2", "--out", str(out))
    printed = capsys.readouterr()
    assert status == 1, printed.err
    assert "runs-2-zero1-x1 failed, status 2" in printed.err
    assert "CUDA devices only" in printed.err, "the tail of its log"
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["strategy"], row["devices"]) for row in found["rows"]] == [("single", 1), ("ddp", 2)]
    assert list(found["failed"]) == ["runs-2-zero1-x1"]
    assert found["environment"]["torch"]
    for row in found["rows"]:
        folder = RunFolder(tmp_path / "work" / row["name"])
        metrics = list(folder.metrics())
        assert [line["tokens"] for line in metrics] == [n * 128 * row["devices"] for n in (2, 4, 6, 8)]
        assert row["rows"] == 2, "the first row, and the profiled steps', are left out"
        rates = [line["throughput/tokens_per_s"] for line in metrics[1:3]]
        assert row["tokens_per_s"] == pytest.approx(sum(rates) / 2)
        assert row["loss"] == pytest.approx(math.log(300), abs=0.1), "nothing to learn from drawn tokens"
        assert folder.checkpoints() == []
    ratio = found["rows"][1]["tokens_per_s"] / found["rows"][0]["tokens_per_s"]
    (line,) = (line for line in printed.out.splitlines() if line.startswith("ddp"))
    assert f"{ratio:.3f}" in line.split()
    assert f"{ratio / 2:.3f}" in line.split()


@pytest.mark.usefixtures("forked_ranks")
def test_equal_steps_give_equal_losses(tiny: Path, tmp_path: Path, prepare_texts: Callable[..., Path]) -> None:
    """Four sequences a step on one process and on two: losses differ by rounding alone."""
    text = prepare_texts(tmp_path, (f"the plan says where keys and values come from, {n}" for n in range(200)), 0.05)
    file = tmp_path / "cases.yaml"
    group = {"name": "same", "config": [str(tiny)], "runs": ["single:1", "ddp:2:2"], "data": "text"}
    group |= {"steps": 4, "log_every": 1}
    file.write_text(yaml.safe_dump({"groups": [group]}), encoding="utf-8")
    out = tmp_path / "out.json"
    words = ["--cases", str(file), "--text", str(text), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert main([*words, "--profile", "0"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["devices"] for row in rows] == [1, 2]
    first = list(rows[0]["losses"].values())
    assert len(first) == 4
    for row in rows[1:]:
        assert list(row["losses"].values()) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "single"], "runs: single: not of the form STRATEGY:DEVICES"),
        (["--runs", "single:1", "zero4:2"], "train.strategy"),
        (["--steps", "10"], "10 steps with a row every 5 give no more rows than the 2 that are left out"),
        (["--train.nosuch", "1"], "train.nosuch: unknown key"),
        (["--model.vocab_size", "null"], "model.vocab_size is null"),
    ],
)
def test_mistakes_are_reported_before_the_first_run(
    bench: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_shipped_cases_can_be_loaded() -> None:
    groups = validate(Cases, read_yaml(ROOT / "benchmarks" / "scaling" / "node.yaml")).groups
    cases = cases_of(groups, 8)
    assert len(cases) == sum(len(group.runs) for group in groups)
    assert max(case.devices for case in cases_of(groups, 4)) == 4
    for case in cases:
        config = load_case(case, [], runs_dir=Path("runs"), data=Path("data"), profiled=2)
        assert isinstance(config, Config)
        per_step = config.train.micro_batch * case.devices
        assert config.train.global_batch % per_step == 0
        if case.group.micro_batches is None:
            assert config.train.global_batch == 16


@pytest.mark.parametrize(
    ("sizes", "free", "idle", "chosen"),
    [
        ([8, 4, 2, 1], 8, True, [0]),
        ([4, 2, 1, 8, 1, 4], 8, True, [0, 1, 2, 4]),
        ([8, 1], 4, False, []),
        ([1, 2, 8, 1], 4, False, [0, 1]),
        ([], 8, True, []),
    ],
)
def test_no_run_starts_before_an_earlier_one_that_waits_for_gpus(
    sizes: list[int], free: int, idle: bool, chosen: list[int]
) -> None:
    """But on an idle machine the GPUs that are left are used."""
    assert startable(sizes, free, idle=idle) == chosen


@pytest.mark.parametrize("gpus", [4, 8])
def test_runs_of_all_gpus_are_not_put_off_until_the_small_ones_are_done(gpus: int) -> None:
    """Simulated: each run takes a minute for each billion parameters, in which case small ones end first."""
    waiting = cases_of(validate(Cases, read_yaml(ROOT / "benchmarks" / "scaling" / "node.yaml")).groups, gpus)
    order, free, running = [case.name for case in waiting], gpus, dict[str, tuple[float, int]]()
    started, now = list[str](), 0.0
    while waiting or running:
        for case in [waiting[n] for n in startable([c.devices for c in waiting], free, idle=not running)]:
            minutes = {"1": 1.4, "4": 3.7, "s": 0.4, "3": 0.4}[case.name[0]]
            running[case.name] = (now + minutes, case.devices)
            waiting.remove(case)
            free -= case.devices
            started.append(case.name)
        name = min(running, key=lambda name: running[name])
        now, released = running.pop(name)
        free += released
    assert sorted(started) == sorted(order)
    for name in order:
        if name.endswith(f"x{gpus}"):
            earlier = order[: order.index(name)]
            assert sum(other not in earlier for other in started[: started.index(name)]) < gpus


def test_a_run_gets_its_gpus_of_those_that_the_command_sees_and_no_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(launch, "start_process", lambda command, **options: seen.update(options))
    launch.start(Config.model_validate({**TINY, "name": "a", "runs_dir": str(tmp_path)}), [1, 3], 0, 1.0)
    found = seen["env"]
    assert found["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert not found.keys() & {"SLURM_NTASKS", "MASTER_PORT"}
    assert int(found["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) // 4), (
        "each of its processes has these threads"
    )


@pytest.mark.usefixtures("single_runs_here")
def test_the_same_command_goes_on_with_the_runs_that_are_left(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    words = ["--runs", "single:1", "single:1:4", "--steps", "4", "--log-every", "2", "--skip-rows", "1"]
    words += ["--profile", "0", "--out", str(out)]
    finished = scaling.start

    def time_is_up(config: Config, gpus: list[int], profiled: int, timeout: float) -> Any:
        if config.train.micro_batch == 2:
            return finished(config, gpus, profiled, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "start", time_is_up)
    assert bench(*words, "--alone") != 0
    first = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in first["rows"]] == ["runs-1-single-x1"]
    monkeypatch.setattr(scaling, "start", finished)
    capsys.readouterr()
    assert bench(*words) == 0
    printed = capsys.readouterr()
    assert "1 of 2 runs are in" in printed.err
    assert len([line for line in printed.out.splitlines() if line.startswith("single")]) == 2
    second = json.loads(out.read_text(encoding="utf-8"))
    assert second["rows"][0] == first["rows"][0]
    assert [row["micro_batch"] for row in second["rows"]] == [2, 4]
    assert second["failed"] == {}
    assert len(second["commands"]) == 2
    before = out.read_text(encoding="utf-8")
    assert bench(*words, "--optim.lr", "1e-4") == 2
    assert "has results with another value of settings; choose another file" in capsys.readouterr().err
    out.write_text("{}", encoding="utf-8")
    assert bench(*words) == 2
    assert "not results of this command" in capsys.readouterr().err
    assert before != out.read_text(encoding="utf-8") == "{}"


@pytest.mark.usefixtures("single_runs_here")
def test_runs_for_which_time_is_up_are_named_and_left(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["--runs", "single:1", "single:1:4", "--alone", "--steps", "4", "--log-every", "2", "--skip-rows", "1"]
    assert bench(*words, "--profile", "0", "--minutes", "0", "--out", str(out)) == 1
    assert "time was up for 1 of 2 runs; the same command makes them" in capsys.readouterr().err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["rows"]) == 1
    assert found["failed"] == {"runs-2-single-x1": "time was up"}
    assert bench(*words, "--profile", "0", "--out", str(out)) == 0
    assert len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == 2


def test_communication_behind_other_kernels_is_not_exposed() -> None:
    """Two steps, 20 us: computation 0 to 8 and 6 to 12, NCCL 10 to 16 and 14 to 18, idle 18 to 19, a copy 19 to 20."""
    kernels = [
        ("gemm", (0.0, 8.0)),
        ("gemm", (6.0, 12.0)),
        ("ncclDevKernel_AllReduce", (10.0, 16.0)),
        ("ncclDevKernel_AllGather", (14.0, 18.0)),
        ("copy", (19.0, 20.0)),
    ]
    found = shares(kernels, 2)
    assert {part: ms * 2000 for part, ms in found.items()} == pytest.approx(
        {"step": 20, "computation": 13, "communication": 8, "exposed": 6, "idle": 1}
    )
    assert merged([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]


def test_straggling_is_the_spread_of_computation(tmp_path: Path) -> None:
    assert read_profiles(tmp_path) is None
    for rank, (computed, waited) in enumerate([(8.0, 3.0), (10.0, 1.0), (9.0, 2.0)]):
        parts = {"step": 11.0, "computation": computed, "communication": waited, "exposed": 0.0, "idle": 0.0}
        (tmp_path / f"kernels-{rank}.json").write_text(json.dumps(parts), encoding="utf-8")
    found = read_profiles(tmp_path)
    assert found is not None
    assert (found["straggling"], found["communication_range"], found["processes"]) == (2.0, [1.0, 3.0], 3)
