"""A machine that fails in the midst of a run: one line, the older checkpoints survive, nothing partial stays."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.train import metrics
from cllm.train.module import TrainingModule
from cllm.train.run import train

SHORT = ("--train.checkpoint_every", "2", "--train.validate_every", "null")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes meanwhile: writes fail as on a full disk, with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_finds_no_room_leaves_the_older_ones_and_nothing_else(tiny: Callable[..., Config]) -> None:
    run = train(tiny("--train.steps", "2", *SHORT))
    (step, saved), before = run.checkpoints()[0], run.checkpoints()[0][1].read_bytes()
    longer = tiny("--train.steps", "4", *SHORT)
    with largest_file(len(before) // 2), pytest.raises(UserError) as error:
        train(longer, resume="auto")
    line = str(error.value)
    assert "cannot be written: File too large" in line
    assert f"the newest checkpoint is {saved}; --resume auto goes on from it" in line
    assert str(run.checkpoint_folder) in line
    assert [path.name for path in run.checkpoint_folder.iterdir()] == [saved.name]
    assert (step, saved.read_bytes()) == (2, before)
    assert dict(train(longer, resume="auto").checkpoints()).keys() == {2, 4}  # with room it goes on


def test_a_row_of_metrics_that_finds_no_room_ends_the_run_in_one_line(tiny, monkeypatch) -> None:
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a buffer that could not be written

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    class Log(metrics.MetricsLog):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._file: Any = Full(self._file)

    monkeypatch.setattr("cllm.train.measure.MetricsLog", Log)
    config = tiny("--train.steps", "2")
    folder = Path(config.runs_dir) / config.name
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value) == f"{folder}: cannot be written: No space left on device; no checkpoint yet"


@pytest.mark.parametrize(
    ("words", "tries"),
    [
        ((), ["a smaller train.micro_batch than 2", "train.gradient_checkpointing true", "data.seq_len than 32"]),
        (
            ("--train.micro_batch", "1", "--train.gradient_checkpointing", "true"),
            ["; try a shorter data.seq_len than 32, or train.strategy zero2 or zero3 on several GPUs"],
        ),
        (
            ("--train.micro_batch", "1", "--train.gradient_checkpointing", "true", "--train.cuda_graph", "auto"),
            ["; try train.cuda_graph false, or a shorter data.seq_len than 32"],
        ),
    ],
)
def test_exhausted_memory_names_what_needs_less(tiny, monkeypatch, words, tries) -> None:
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has no more")

    monkeypatch.setattr(TrainingModule, "training_step", fail)
    with pytest.raises(UserError) as error:
        train(tiny("--train.validate_every", "null", *words))
    line = str(error.value)
    assert line.startswith("out of memory: CUDA out of memory. Tried to allocate 20.00 MiB")
    assert all(text in line for text in tries)
    assert ("micro_batch" in line) == (not words)
    assert line.endswith("no checkpoint yet")


def test_a_bug_in_a_step_keeps_its_traceback(tiny, monkeypatch) -> None:
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(TrainingModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tiny("--train.validate_every", "null"))


def test_a_folder_that_takes_no_files_is_named(tiny) -> None:
    with pytest.raises(UserError, match=r"^/proc/tiny: cannot be "):
        train(tiny("--runs_dir", "/proc"))


def test_a_run_is_left_without_a_partial_checkpoint_when_saving_is_interrupted(tiny, monkeypatch) -> None:
    saved = []

    def interrupted(trainer, path, **_):
        saved.append(Path(path))
        Path(path).write_bytes(b"half")
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", interrupted)
    config = tiny("--train.steps", "2", *SHORT)
    with pytest.raises(UserError, match="cannot be used: Input/output error; no checkpoint yet"):
        train(config)
    assert saved
    assert not list(RunFolder(Path(config.runs_dir) / config.name).checkpoint_folder.iterdir())
