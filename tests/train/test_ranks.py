"""Runs of several ranks, as processes with gloo on a CPU: the same steps at any number, and a rank that dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.train.ranks import RankWatch, is_lost_connection
from cllm.train.run import train
from tests.ranks import SECONDS, run_ranks

Tiny = Callable[..., Config]
SIZES = ("--train.global_batch", "8", "--train.micro_batch", "1", "--train.steps", "6", "--train.checkpoint_every", "2")
KEPT = ("--train.keep_checkpoints", "9", "--train.validate_every", "3")


class Record(Callback):
    """Writes the sequences of each step to `FOLDER/RANK.jsonl`, and calls `at_step` in the midst of a step."""

    def __init__(self, folder: Path, rank: int, at_step: Callable[[int, int], None] | None):
        self.file, self.rank, self.at_step = folder / f"{rank}.jsonl", rank, at_step

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.at_step is not None:
            self.at_step(self.rank, trainer.global_step + 1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if isinstance(self.at_step, KillWhileSaving):
            self.at_step.save(self.rank, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([trainer.global_step + 1, row]) + "\n" for row in batch["input_ids"].tolist())


def kill_rank_2_at_step_4(rank: int, step: int) -> None:
    if (rank, step) == (2, 4):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_rank_0_at_step_4(rank: int, step: int) -> None:
    if (rank, step) == (0, 4):
        os.kill(os.getpid(), signal.SIGKILL)


def hang_but_for_rank_2(rank: int, step: int) -> None:
    """As under NCCL: a rank whose peer is dead waits without an error."""
    if step == 4:
        kill_rank_2_at_step_4(rank, step)
        time.sleep(2 * SECONDS)


def fail_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 4):
        raise UserError("the disk of rank 1 is full")


class Stop:
    """SIGTERM to every rank in the midst of a step: the run is saved after it."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, rank: int, step: int) -> None:
        if step == self.step < 6:
            os.kill(os.getpid(), signal.SIGTERM)


class KillWhileSaving:
    """SIGKILL to two ranks while step 4 is saved."""

    def __init__(self, *ranks: int):
        self.ranks = ranks

    def __call__(self, rank: int, step: int) -> None:
        pass

    def save(self, rank: int, step: int) -> None:
        if rank in self.ranks and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def _rank(rank: int, config: Config, records: Path, at_step: Any, resume: str | None) -> None:
    with (records / f"{rank}.err").open("w", buffering=1) as errors, contextlib.redirect_stderr(errors):
        try:
            train(config, resume=resume, callbacks=[Record(records, rank, at_step)])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            errors.flush()
            sys.exit(2)


class Outcome:
    """What the ranks of a run left: exit statuses, lines on stderr, sequences of each step, the run's folder."""

    def __init__(self, config: Config, statuses: list[int | None], records: Path):
        self.statuses = statuses
        self.errors = [
            [line for line in (records / f"{rank}.err").read_text().splitlines() if line.startswith("error: ")]
            for rank in range(len(statuses))
        ]
        self.sequences: dict[int, list[list[int]]] = {}
        for file in records.glob("*.jsonl"):
            for step, row in map(json.loads, file.read_text().splitlines()):
                self.sequences.setdefault(step, []).append(row)
        self.sequences = {step: sorted(rows) for step, rows in self.sequences.items()}
        self.folder = RunFolder(Path(config.runs_dir) / config.name)

    @property
    def rows(self) -> dict[int, float]:
        return {row["step"]: row["train/loss"] for row in self.folder.metrics() if "train/loss" in row}

    @property
    def validations(self) -> dict[int, float]:
        return {row["step"]: row["val/loss"] for row in self.folder.metrics() if "val/loss" in row}


@pytest.fixture
def ranks(tiny: Tiny, tmp_path: Path) -> Callable[..., Outcome]:
    """`ranks(4, "--name", "four")` trains with 4 processes."""

    def run(
        number: int, *settings: str, at_step: Callable[[int, int], None] | None = None, resume: str | None = None
    ) -> Outcome:
        config = tiny(*SIZES, *KEPT, "--train.devices", str(number), "--train.strategy", "ddp", *settings)
        records = tmp_path / f"records-{len(list(tmp_path.glob('records-*')))}"
        records.mkdir()
        statuses = run_ranks(number, _rank, config, records, at_step, resume)
        return Outcome(config, statuses, records)

    return run


@pytest.fixture
def alone(tiny: Tiny, tmp_path: Path) -> Outcome:
    """The same run in this process."""
    records = tmp_path / "alone"
    records.mkdir()
    (records / "0.err").touch()
    config = tiny(*SIZES, *KEPT, "--name", "alone")
    train(config, callbacks=[Record(records, 0, None)])
    return Outcome(config, [0], records)


def assert_equal(run: Outcome, alone: Outcome) -> None:
    """Every row of the run that was not interrupted, but for the order in which gradients are added."""
    assert run.rows == pytest.approx(alone.rows, rel=2e-6)
    assert run.validations == pytest.approx(alone.validations, rel=2e-6)


def test_steps_and_losses_do_not_depend_on_the_number_of_ranks(ranks: Callable[..., Outcome], alone: Outcome) -> None:
    assert sorted(map(len, alone.sequences.values())) == [8] * 6
    for number in (4, 8):
        run = ranks(number, "--name", f"of{number}")
        assert run.statuses == [0] * number
        assert run.sequences == alone.sequences, "the same sequences in each step"
        assert_equal(run, alone)


def test_a_run_goes_on_from_8_ranks_on_4_and_on_2(ranks: Callable[..., Outcome], alone: Outcome) -> None:
    seen: dict[int, list[list[int]]] = {}
    for number, last in ((8, 2), (4, 4), (2, 6)):
        run = ranks(number, "--name", "fewer", at_step=Stop(last), resume="auto")
        assert run.folder.checkpoints()[-1][0] == last
        seen |= run.sequences
    assert seen == alone.sequences
    assert_equal(run, alone)


@pytest.mark.parametrize(
    ("at_step", "lost", "statuses"),
    [
        (kill_rank_2_at_step_4, "rank 2", {0: 2, 1: 2, 2: -9, 3: 2}),
        (kill_rank_0_at_step_4, "rank 0", {0: -9, 1: 2, 2: 2, 3: 2}),
        (hang_but_for_rank_2, "rank 2", {0: 2, 1: 2, 2: -9, 3: 2}),
        (fail_on_rank_1, "rank 1", {0: 2, 1: 2, 2: 2, 3: 2}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_other_ranks_end_in_one_line_when_one_dies(
    ranks: Callable[..., Outcome], at_step: Any, lost: str, statuses: dict[int, int]
) -> None:
    run = ranks(4, at_step=at_step)
    assert dict(enumerate(run.statuses)) == statuses
    for rank, lines in enumerate(run.errors):
        if statuses[rank] == -9:
            assert lines == []
        elif lost == f"rank {rank}":
            assert lines == ["error: the disk of rank 1 is full"]
        else:
            (line,) = lines
            assert line.startswith(f"error: {lost}")
            assert "ended before the run did" in line
            assert line.endswith("step-00000002.ckpt; --resume auto goes on from it")


def test_nothing_is_lost_when_a_rank_was_killed(ranks: Callable[..., Outcome], alone: Outcome) -> None:
    ranks(4, "--name", "killed", at_step=kill_rank_2_at_step_4)
    run = ranks(2, "--name", "killed", resume="auto")
    assert run.statuses == [0] * 2
    assert {step: run.sequences[step] for step in (3, 4, 5, 6)} == {s: alone.sequences[s] for s in (3, 4, 5, 6)}
    assert_equal(run, alone)


@pytest.mark.parametrize("killed", [(5,), (0, 7)], ids=str)
def test_nothing_is_lost_when_ranks_were_killed_while_saving(
    ranks: Callable[..., Outcome], alone: Outcome, killed: tuple[int, ...]
) -> None:
    run = ranks(8, "--name", "killed", at_step=KillWhileSaving(*killed))
    assert run.statuses == [-9 if rank in killed else 2 for rank in range(8)]
    for rank, lines in enumerate(run.errors):
        if rank not in killed:
            (line,) = lines
            assert line.startswith(tuple(f"error: rank {lost}" for lost in killed))
            assert line.endswith("step-00000002.ckpt; --resume auto goes on from it")
    assert [step for step, _ in run.folder.checkpoints()] == [2]
    run = ranks(4, "--name", "killed", resume="auto")
    assert run.statuses == [0] * 4
    assert [step for step, _ in run.folder.checkpoints()] == [2, 4, 6]
    assert run.sequences == {step: alone.sequences[step] for step in (3, 4, 5, 6)}
    assert_equal(run, alone)


def test_errors_of_collectives_are_told_from_others() -> None:
    assert is_lost_connection(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))
    assert is_lost_connection(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost_connection(RuntimeError("a bug"))
    assert not is_lost_connection(UserError("gloo"))


def test_a_rank_that_cannot_be_reached_is_not_watched_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    strategy = SimpleNamespace(broadcast=lambda _: (port, "token"))
    trainer: Any = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
    RankWatch(lambda: "").setup(trainer, Any, "fit")
    assert caplog.messages == ["rank 1 is not watched, nor does it watch others: [Errno 111] Connection refused"]
