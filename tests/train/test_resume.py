"""Going on with a run: after a kill at any point, from damaged checkpoints, with other settings, with other data."""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm import files
from cllm.checkpoint import read_weights, verify, write_checksums
from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.errors import UserError
from cllm.runs import RunFolder, load_run
from cllm.train import callbacks, resume
from cllm.train.metrics import MetricsLog
from cllm.train.optim import learning_rate_factor
from cllm.train.resume import CHANGEABLE, check_resumable
from cllm.train.run import train, with_vocabulary

Tiny = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("train/loss", "train/lr", "train/gradient_norm", "train/skipped_steps", "val/loss", "val/bits_per_byte")
"""Tags whose values do not depend on time."""


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing else is written."""


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [{tag: row[tag] for tag in ("step", *MEASURED) if tag in row} for row in folder.metrics()]


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder.tensorboard_folder))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in MEASURED}


def state(folder: RunFolder) -> dict[str, Any]:
    """Weights, moments and schedule of the newest checkpoint."""
    saved = torch.load(folder.checkpoints()[-1][1], weights_only=True)
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for n, pair in enumerate(zip(found, wanted, strict=True)):
            assert_equal(*pair, f"{where}[{n}]")
    else:
        assert found == wanted, where


# ---- kills -----------------------------------------------------------------------------------------------------------

POINTS: dict[str, tuple[Any, str, bool]] = {
    "before a row": (MetricsLog, "write", False),
    "after a row": (MetricsLog, "write", True),
    "between a row's events and the row": (MetricsLog, "_add_events", True),
    "before a checkpoint is written": (callbacks, "save_file", False),
    "before a checkpoint is renamed": (callbacks, "save_file", True),
    "after a checkpoint was renamed": (RunFolder, "keep_checkpoints", False),
    "after older checkpoints were deleted": (RunFolder, "keep_checkpoints", True),
    "in a validation": (callbacks.TrainingModule, "validation_step", True),
}
"""Name: what is patched, its function, whether the kill comes after it and not before."""


def kill_at(monkeypatch: pytest.MonkeyPatch, point: str, nth: int) -> None:
    """Raise `Killed` at the nth time (from 0) that a run comes to `point`; nothing is closed or flushed after it."""
    owner, name, after = POINTS[point]
    original, count = getattr(owner, name), itertools.count()

    def patched(*args: Any, **kwargs: Any) -> Any:
        due = next(count) == nth
        if due and not after:
            raise Killed
        result = original(*args, **kwargs)
        if due:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, patched)
    monkeypatch.setattr(callbacks.Metrics, "close", lambda self: None)


SETTINGS = ("--train.steps", "5", "--train.log_every", "3", "--train.validate_every", "2")
SETTINGS += ("--train.checkpoint_every", "2", "--model.n_layers", "2", "--data.validation_sequences", "2")
"""Checkpoints between two rows, rows and validations and checkpoints at one step, and a last step off all intervals."""


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder | None]:
    yield None


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_ends_as_the_uninterrupted_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    wanted = train(tiny("--name", "whole", *SETTINGS))
    wanted_rows, wanted_events, wanted_state = rows(wanted), events(wanted), state(wanted)
    assert [row["step"] for row in wanted_rows if "val/loss" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in wanted_rows if "train/loss" in row] == [3, 5]
    config = tiny("--name", "killed", *SETTINGS)
    for nth in itertools.count():
        with monkeypatch.context() as patched:
            kill_at(patched, point, nth)
            try:
                train(config, overwrite=True)
            except Killed:
                pass
            else:
                assert nth >= 3, "the run came to this point several times"
                break
        folder = train(config, resume="auto")
        assert rows(folder) == wanted_rows, nth
        assert_equal(state(folder), wanted_state, str(nth))
        assert events(folder) == wanted_events, nth
        assert [step for step, _ in folder.checkpoints()] == [4, 5]
        assert not [path for path in folder.checkpoint_folder.iterdir() if path.suffix != ".ckpt"]
