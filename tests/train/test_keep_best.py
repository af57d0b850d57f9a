"""`train.keep_best`: the checkpoints with the lowest validation losses stay, also over kills."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.train import checkpoints
from cllm.train.best import BestCheckpoints
from cllm.train.measure import Metrics
from cllm.train.metrics import MetricsLog
from cllm.train.module import TrainingModule
from cllm.train.run import train

Tiny = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]
LOSSES = {0: 9.0, 1: 4.0, 2: 3.0, 3: 5.0, 4: 3.5, 5: float("nan"), 6: 2.0, 7: 6.0, 8: 3.0}
"""Validation losses by step, in place of the true ones."""
SETTINGS: tuple[str, ...] = ("--model.n_layers", "2", "--data.validation_sequences", "2", "--train.steps", "8")
SETTINGS += ("--train.checkpoint_every", "1", "--train.validate_every", "1", "--train.keep_checkpoints", "1")
WANTED = {1: [6], 2: [6, 2], 3: [6, 2, 8], 5: [6, 2, 8, 4, 1]}
"""The best steps by their number. Of two with the same loss the earlier is better."""


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(self: TrainingModule) -> dict[str, tuple[float, int]]:
        return dict.fromkeys(self.validation_names, (LOSSES[self.trainer.global_step], 1))

    monkeypatch.setattr(TrainingModule, "validation_scores", scores)


def best(folder: RunFolder) -> list[dict[str, Any]]:
    return json.loads(folder.best_file.read_text())


def steps(folder: RunFolder) -> list[int]:
    return [step for step, _ in folder.checkpoints()]


@pytest.mark.parametrize("count", WANTED)
def test_the_best_checkpoints_stay_beside_the_newest(losses: None, tiny: Tiny, count: int) -> None:
    folder = train(tiny(*SETTINGS, "--train.keep_best", str(count)))
    assert steps(folder) == sorted({*WANTED[count], 8})
    assert best(folder) == [
        {"step": step, "val/loss": LOSSES[step], "checkpoint": f"checkpoints/step-{step:08d}.ckpt"}
        for step in WANTED[count]
    ]


def test_none_is_kept_by_default(losses: None, tiny: Tiny) -> None:
    folder = train(tiny(*SETTINGS))
    assert steps(folder) == [8]
    assert not folder.best_file.exists()


def test_only_steps_that_are_saved_and_validated_can_be_best(losses: None, tiny: Tiny) -> None:
    folder = train(tiny(*SETTINGS, "--train.keep_best", "9", "--train.validate_every", "2"))
    assert [entry["step"] for entry in best(folder)] == [6, 2, 8, 4]
    folder = train(tiny("--name", "rare", *SETTINGS, "--train.keep_best", "9", "--train.checkpoint_every", "3"))
    assert [entry["step"] for entry in best(folder)] == [6, 8, 3]


POINTS: dict[str, tuple[Any, str, bool]] = {
    "after a row": (MetricsLog, "write", True),
    "after a checkpoint was written": (checkpoints, "save_file", True),
    "before others are deleted": (RunFolder, "keep_checkpoints", False),
    "after others were deleted": (RunFolder, "keep_checkpoints", True),
    "before best.json": (BestCheckpoints, "write", False),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_keeps_the_same_checkpoints(
    losses: None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """At every fourth time that the run comes to a point."""
    owner, name, after = POINTS[point]
    original = getattr(owner, name)
    config = tiny(*SETTINGS, "--train.keep_best", "2")

    class Killed(BaseException):
        pass

    for nth in itertools.count(2, 4):
        count = itertools.count()

        def patched(*args: Any, n: int = nth, count: Any = count, **kwargs: Any) -> Any:
            due = next(count) == n
            if due and not after:
                raise Killed
            result = original(*args, **kwargs)
            if due:
                raise Killed
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched)
            patch.setattr(Metrics, "close", lambda self: None)
            try:
                train(config, overwrite=True)
            except Killed:
                pass
            else:
                assert nth >= 6, "the run came to this point several times"
                break
        folder = train(config, resume="auto")
        assert steps(folder) == [2, 6, 8], nth
        assert [entry["step"] for entry in best(folder)] == [6, 2], nth


def test_a_kill_after_the_last_validation_is_made_good_by_resuming(
    losses: None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*SETTINGS, "--train.keep_best", "1", "--train.steps", "6")

    def killed(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "on_validation_end", killed)
        patch.setattr(RunFolder, "keep_checkpoints", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = train(config, resume="auto")
    assert steps(folder) == [6]
    assert [entry["step"] for entry in best(folder)] == [6]


def test_a_resumed_run_may_keep_another_number(losses: None, tiny: Tiny) -> None:
    train(tiny(*SETTINGS, "--train.keep_best", "3", "--train.steps", "4"))
    folder = train(tiny(*SETTINGS, "--train.keep_best", "1", "--train.steps", "5"), resume="auto")
    assert steps(folder) == [2, 5]
    folder = train(tiny(*SETTINGS, "--train.keep_best", "0"), resume="auto")
    assert steps(folder) == [8]
    assert not folder.best_file.exists()
    folder = train(tiny(*SETTINGS, "--name", "from", "--train.keep_checkpoints", "9"))
    train(tiny(*SETTINGS, "--name", "from", "--train.keep_best", "1"), resume=str(folder.checkpoint_path(7)))
    assert steps(folder) == [6, 8], "losses of earlier steps are those of metrics.jsonl"


def test_a_best_checkpoint_can_be_evaluated(
    losses: None, tiny: Tiny, load_file: Callable[[Path], ModuleType], tmp_path: Path
) -> None:
    folder = train(tiny(*SETTINGS, "--train.keep_best", "1"))
    path = folder.path / best(folder)[0]["checkpoint"]
    assert load_file(ROOT / "evaluate.py").main(["--run", str(path), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert json.loads(file.read_text())["step"] == 6


@pytest.mark.parametrize("key", ["validate_every", "checkpoint_every"])
def test_the_best_need_validations_and_checkpoints(tiny: Tiny, key: str) -> None:
    with pytest.raises(UserError, match=rf"keep_best is 2, but {key} is null; allowed with it: keep_best 0"):
        tiny("--train.keep_best", "2", f"--train.{key}", "null")
