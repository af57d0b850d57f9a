"""The same run on one device, under DDP and under ZeRO-1, 2 and 3, on one GPU and, if available, on two.

    python -m pytest tests/gpu/test_strategies.py -q

The command line is run as a user runs it, a handful of runs at a time. The first test starts the runs of all selected
tests, so `-k` also selects runs. Every run reports where it is, and prints its stacks if it does not end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml

from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train.breakdown import PARTS
from tests.watched import run_watched

ROOT = Path(__file__).resolve().parents[2]
STEPS, HALF = 20, 10
AT_ONCE = 5
SECONDS = 150.0
"""Longest time of a run, with imports on a cold machine."""
TEXT = "the plan says where keys and values come from and every layer reads what an owner wrote before it"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ONE: dict[str, list[str]] = {
    "single": ["--train.strategy", "single"],
    "ddp": ["--train.strategy", "ddp"],
    "zero1": ["--train.strategy", "zero1"],
    "zero2": ["--train.strategy", "zero2"],
    "zero3": ["--train.strategy", "zero3"],
    "zero1-offload": ["--train.strategy", "zero1", "--train.offload_optimizer", "true"],
    "zero1-one-micro-batch": ["--train.strategy", "zero1", "--train.micro_batch", "8"],
    "zero3-recompute": ["--train.strategy", "zero3", "--train.gradient_checkpointing", "true"],
}
TWO: dict[str, list[str]] = {
    f"{name}-x2": ["--train.strategy", name, "--train.devices", "2"] for name in ("ddp", "zero1", "zero2", "zero3")
}
RESUMED = ("ddp", "zero1", "zero2", "zero3", "zero1-x2", "zero3-x2")
CASES = ONE | (TWO if torch.cuda.device_count() > 1 else {})
EVERY_CASE = [*ONE, *(pytest.param(name, marks=two_gpus) for name in TWO)]
EVERY_RESUMED = [pytest.param(name, marks=two_gpus) if name in TWO else name for name in RESUMED]


@dataclass
class Run:
    """A finished command and its folder."""

    done: subprocess.CompletedProcess[str]
    folder: RunFolder

    def rows(self, tag: str) -> list[float]:
        assert self.done.returncode == 0, f"{self.done.args}\n{self.done.stderr[-4000:]}"
        return [row[tag] for row in self.folder.metrics() if tag in row]


class Table:
    """Prints lines at once, although pytest captures output, with the seconds since the first test began."""

    def __init__(self, config: pytest.Config):
        with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            self._terminal = os.dup(1)
        self._lock = threading.Lock()
        self._start = time.monotonic()

    def tell(self, name: str, text: str) -> None:
        with self._lock:
            os.write(self._terminal, f"[{time.monotonic() - self._start:5.0f} s] {name}: {text}\n".encode())


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Table:
    return Table(pytestconfig)


def command(table: Table, name: str, *arguments: str, port: int) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "2"}
    for variable in ("MASTER_ADDR", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        environment.pop(variable, None)
    table.tell(name, "started")
    done = run_watched(
        [sys.executable, *arguments],
        seconds=SECONDS,
        tell=lambda text: table.tell(name, text),
        cwd=ROOT,
        environment=environment,
    )
    table.tell(name, f"ended with status {done.returncode}")
    return done


Test = TypeVar("Test", bound=Callable[..., None])


def needs(*cases: str) -> Callable[[Test], Test]:
    """The runs of a test; a parameter `name` is one more."""

    def mark(test: Test) -> Test:
        test.cases = cases  # type: ignore[attr-defined]
        return test

    return mark


def needed(items: Iterable[pytest.Item]) -> tuple[list[str], list[str]]:
    """The runs of the selected tests, and those of them that are also resumed."""
    cases: set[str] = set()
    for item in items:
        if isinstance(item, pytest.Function) and item.module.__file__ == __file__:
            cases |= set(getattr(item.function, "cases", ()))
            if hasattr(item, "callspec") and "name" in item.callspec.params:
                cases |= {str(item.callspec.params["name"])}
                if item.function is test_a_run_stopped_and_resumed_agrees_with_the_uninterrupted_one:
                    cases |= {f"{item.callspec.params['name']}-resumed"}
    return [name for name in CASES if name in cases], [
        name for name in RESUMED if name in CASES and f"{name}-resumed" in cases
    ]


@pytest.fixture(scope="module")
def runs(
    prepare_texts: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    table: Table,
) -> dict[str, Run]:
    """The cases of the selected tests by name, and `NAME-resumed`: the case resumed from its checkpoint at half the
    steps."""
    cases, resumed = needed(request.session.items)
    folder = tmp_path_factory.mktemp("strategies")
    draw = random.Random(0)
    texts = (" ".join(draw.choices(TEXT.split(), k=draw.randint(20, 200))) for _ in range(600))
    prepared = prepare_texts(folder, texts, 0.05)
    base: dict[str, Any] = {
        "runs_dir": str(folder / "runs"),
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 128, "tie_embeddings": True},
        "attention": {"backend": "sdpa"},
        "data": {"path": str(prepared), "seq_len": 128, "num_workers": 0, "validation_sequences": 16},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4, "grad_clip": 0.5},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "log_every": 1, "precision": "bf16"},
    }
    base["model"]["kv"] = {"preset": "fusedkv"}
    base["train"] |= {"validate_every": HALF, "checkpoint_every": HALF, "devices": 1, "compile": False}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(base), encoding="utf-8")

    def start(job: tuple[int, str, str, list[str]]) -> Run:
        port, name, resume, settings = job
        target = RunFolder(folder / "runs" / name)
        arguments = ["train.py", "--config", str(file), "--name", name, *settings]
        return Run(command(table, name, *arguments, *(["--resume", resume] if resume else []), port=port), target)

    found: dict[str, Run] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [(29700 + n, name, "", CASES[name]) for n, name in enumerate(cases)]
        found |= dict(zip(cases, pool.map(start, jobs), strict=True))
        again = []
        for n, name in enumerate(name for name in resumed if found[name].done.returncode == 0):
            copy = RunFolder(folder / "runs" / f"{name}-resumed")
            shutil.copytree(found[name].folder.path, copy.path)
            last = copy.checkpoint_path(STEPS)
            shutil.rmtree(last) if last.is_dir() else last.unlink()
            again.append((29800 + n, f"{name}-resumed", "auto", CASES[name]))
        found |= dict(zip((job[1] for job in again), pool.map(start, again), strict=True))
    return found


@needs(*CASES)
def test_final_losses(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """Print the losses; the tests below check them."""
    head = f"{'run':28} {'train/loss':>10} {'val/loss':>10} {'norm':>8} {'peak GiB':>9} {'status':>7}"
    lines = [f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}", head]
    for name, run in runs.items():
        values = [f"{'-':>10}", f"{'-':>10}", f"{'-':>8}", f"{'-':>9}"]
        if run.done.returncode == 0:
            loss, score = run.rows("train/loss")[-1], run.rows("val/loss")[-1]
            norm, memory = run.rows("train/gradient_norm")[-1], run.rows("memory/peak_gib")[-1]
            values = [f"{loss:10.4f}", f"{score:10.4f}", f"{norm:8.4f}", f"{memory:9.3f}"]
        lines.append(f"{name:28} {' '.join(values)} {run.done.returncode:7}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    for name, run in runs.items():
        assert run.done.returncode == 0, f"{name}: {run.done.stderr[-4000:]}"


@needs("single")
@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_strategy_takes_the_steps_of_one_device(runs: dict[str, Run], name: str) -> None:
    one, other = runs["single"], runs[name]
    losses = other.rows("train/loss")
    assert len(losses) == STEPS, "one row an optimizer step, whatever the number of micro-batches"
    assert losses == pytest.approx(one.rows("train/loss"), abs=0.03)
    assert losses[-1] < losses[0] - 1, "it learns"
    assert other.rows("val/loss") == pytest.approx(one.rows("val/loss"), abs=0.03)
    norms = one.rows("train/gradient_norm")
    assert max(norms) > 0.5, "clipping has something to do"
    assert other.rows("train/gradient_norm")[:5] == pytest.approx(norms[:5], rel=0.05)
    assert other.rows("train/lr") == one.rows("train/lr")
    assert set(other.rows("train/skipped_steps")) == {0}


@pytest.mark.parametrize("name", EVERY_CASE)
def test_parts_of_a_step_are_device_time_within_the_step(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    rates = run.rows("throughput/tokens_per_s")
    parts = [run.rows(f"time/{part}_ms") for part in PARTS]
    assert len(rates) == STEPS
    for rate, *times in zip(rates, *parts, strict=True):
        assert all(ms > 0 for ms in times)
        assert sum(times) <= 1000 * 8 * 128 / rate + 0.01, "events are read to half a microsecond each"


@pytest.mark.parametrize("name", EVERY_RESUMED)
def test_a_run_stopped_and_resumed_agrees_with_the_uninterrupted_one(runs: dict[str, Run], name: str) -> None:
    whole, resumed = runs[name], runs[f"{name}-resumed"]
    assert resumed.rows("train/loss")[:HALF] == whole.rows("train/loss")[:HALF]
    assert resumed.rows("train/lr") == whole.rows("train/lr")
    # The first step has the same weights. Atomics in backward kernels then add in any order.
    assert resumed.rows("train/loss")[HALF] == pytest.approx(whole.rows("train/loss")[HALF], rel=1e-4)
    assert resumed.rows("train/loss") == pytest.approx(whole.rows("train/loss"), abs=0.01)
    assert resumed.rows("val/loss")[-1] == pytest.approx(whole.rows("val/loss")[-1], abs=0.01)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_weights_are_whole_fp32_and_score_as_in_training(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    wanted = run.rows("val/loss")[-1]
    checkpoint = run.folder.checkpoints()[-1][1]
    assert checkpoint.is_dir() == name.startswith("zero")
    weights = read_weights(checkpoint)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(bool((tensor != tensor.bfloat16()).any()) for tensor in weights.values()), "not rounded to bf16"
    model, _, step = load_run(run.folder.path, device="cuda")
    assert step == STEPS
    assert torch.equal(model.head.weight, model.embed.weight)
    from cllm.data.packing import ValidationDataset
    from cllm.data.store import TokenStore

    config = run.folder.config()
    dataset = ValidationDataset(TokenStore(config.data.path, "validation"), 128, limit=16)
    batch = [dataset[n] for n in range(len(dataset))]
    ids, labels = (torch.stack([torch.as_tensor(b[key]) for b in batch]).cuda() for key in ("input_ids", "labels"))
    with torch.no_grad():
        assert model.loss(ids, labels).item() == pytest.approx(wanted, abs=0.02)


@needs("single", "zero3")
def test_evaluate_reads_a_zero_run(runs: dict[str, Run], table: Table) -> None:
    both = [runs["single"].folder, runs["zero3"].folder]
    done = command(table, "evaluate", "evaluate.py", *(a for f in both for a in ("--run", str(f.path))), port=29900)
    assert done.returncode == 0, done.stderr[-4000:]
    records = [json.loads(next(f.evaluation_folder.glob("*.json")).read_text()) for f in both]
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], abs=0.03)


@needs("zero2")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--optim.lr", "1e30", "--train.max_skipped_steps", "2"], "train.max_skipped_steps is 2"),
        (["--train.precision", "fp32"], "trains in bf16"),
    ],
)
def test_what_cannot_go_on_ends_with_one_line(
    runs: dict[str, Run], table: Table, tmp_path: Path, settings: list[str], message: str
) -> None:
    config = runs["zero2"].folder.config_file
    arguments = ["train.py", "--config", str(config), "--name", "bad", "--runs_dir", str(tmp_path), *settings]
    done = command(table, "bad", *arguments, port=29901)
    assert done.returncode == 2, done.stderr[-4000:]
    assert message in done.stderr


@needs("zero1")
def test_a_shard_that_was_added_is_never_read(runs: dict[str, Run], table: Table, tmp_path: Path) -> None:
    """Checksums do not list it, so the newest checkpoint is skipped and the run goes on from the older one."""
    source = runs["zero1"]
    assert len(source.rows("train/loss")) == STEPS
    copy = RunFolder(tmp_path / source.folder.name)
    shutil.copytree(source.folder.path, copy.path)
    last = copy.checkpoints()[-1][1]
    shard = next((last / "checkpoint").glob("*zero_pp_rank_0_*_optim_states.pt"))
    shutil.copy(shard, shard.with_name(shard.name.replace("rank_0_", "rank_1_", 1)))
    arguments = ["--config", str(copy.config_file), "--runs_dir", str(tmp_path), "--train.steps", str(STEPS + 1)]
    done = command(table, "zero1-added", "train.py", *arguments, "--resume", "auto", port=29902)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "not part of the checkpoint" in done.stderr


@two_gpus
@pytest.mark.parametrize("name", ["zero1-x2", "zero3-x2"])
def test_shards_of_two_processes_are_resumed_by_one(
    runs: dict[str, Run], table: Table, tmp_path: Path, name: str
) -> None:
    source = runs[name]
    wanted = source.rows("train/loss")
    copy = RunFolder(tmp_path / source.folder.name)
    shutil.copytree(source.folder.path, copy.path)
    shutil.rmtree(copy.checkpoint_path(STEPS))
    arguments = ["--config", str(copy.config_file), "--runs_dir", str(tmp_path), "--train.devices", "1"]
    done = command(table, f"{name}-by-one", "train.py", *arguments, "--resume", "auto", port=29903)
    resumed = Run(done, copy).rows("train/loss")
    assert len(resumed) == STEPS
    assert resumed == pytest.approx(wanted, abs=0.03)
