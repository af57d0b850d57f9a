"""Lightning: canaries of its private parts that training relies on, and loggers and callbacks of the caller.

Each canary says what has changed, what relied on it and where, so that an upgrade of Lightning shows it by name.
"""

from __future__ import annotations

import csv
import inspect
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.strategies import DeepSpeedStrategy

from cllm.config import Config
from cllm.train.lightning_internals import OBSERVER, disable_signal_handling, set_micro_batches, stop_process_observer
from cllm.train.module import step_is_complete
from cllm.train.run import train

Tiny = Callable[..., Config]
SHORT = ("--train.steps", "4", "--train.validate_every", "2", "--train.checkpoint_every", "2")
INTERNALS = "cllm/train/lightning_internals.py"


class Small(LightningModule):
    """Two micro-batches a step, a validation at the start and every two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch).square().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.linear(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(100, 2), batch_size=2)

    val_dataloader = train_dataloader


def small_trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": 2, "limit_val_batches": 1, "logger": False}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings | options),
    )


# ---- canaries: public ways ------------------------------------------------------------------------------------------


def test_a_step_ends_when_lightning_ends_it(tmp_path: Path) -> None:
    """`step_is_complete` counts micro-batches; Lightning's own answer is private."""
    seen: list[tuple[bool, int]] = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((step_is_complete(trainer, batch_idx), trainer.global_step))

    small_trainer(tmp_path, Seen(), max_steps=3).fit(Small())
    assert seen == [(False, 0), (True, 1), (False, 1), (True, 2), (False, 2), (True, 3)], (
        "Lightning: on_train_batch_end no longer gets the index of the micro-batch, or steps end otherwise; "
        "step_is_complete in cllm/train/module.py counts by it"
    )


def test_a_stop_without_validation(tmp_path: Path) -> None:
    """`StopWhenDone` sets `trainer.limit_val_batches` to 0: an interrupted run stops without a validation."""
    validated: list[int] = []

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.limit_val_batches, trainer.should_stop = 0, True

        def on_validation_start(self, trainer: Trainer, module: Any) -> None:
            validated.append(trainer.global_step)

    trainer = small_trainer(tmp_path, Stop(), max_steps=9, num_sanity_val_steps=0, accumulate_grad_batches=1)
    trainer.fit(Small())
    assert (validated, trainer.global_step) == ([], 1), (
        "Lightning: limit_val_batches = 0 during training no longer leaves out the validation of a stop; "
        "StopWhenDone in cllm/train/stop.py relies on it"
    )


# ---- canaries: private parts ----------------------------------------------------------------------------------------


def test_signals_are_not_lightnings(tmp_path: Path) -> None:
    handlers: dict[str, Any] = {}

    class Handlers(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            handlers[str(trainer.max_steps)] = signal.getsignal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    small_trainer(tmp_path, Handlers(), max_steps=1).fit(Small())
    assert handlers["1"] is not before, (
        "Lightning: it no longer handles SIGTERM; disable_signal_handling in " + INTERNALS + " may not be needed"
    )
    trainer = small_trainer(tmp_path, Handlers(), max_steps=2)
    disable_signal_handling(trainer)
    trainer.fit(Small())
    assert handlers["2"] is before, (
        "Lightning: trainer._signal_connector.register_signal_handlers is no longer the place where SIGTERM is taken; "
        "disable_signal_handling in " + INTERNALS + " relies on it"
    )


def test_no_process_asks_another_before_each_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning broadcasts whether there was a SIGTERM, and waits for the device to have the answer."""
    trainer = small_trainer(tmp_path)
    epoch_loop, asked = trainer.fit_loop.epoch_loop, list[bool]()
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: asked.append(True))
    epoch_loop._broadcast_sigterm_tensor()
    assert asked, "Lightning: epoch_loop._broadcast_sigterm_tensor does not broadcast; see " + INTERNALS
    disable_signal_handling(trainer)
    epoch_loop._broadcast_sigterm_tensor()
    assert len(asked) == 1
    source = inspect.getsource(type(epoch_loop).advance)
    assert "self._broadcast_sigterm_tensor()" in source, (
        "Lightning: the training loop no longer calls _broadcast_sigterm_tensor before a micro-batch; if it asks in "
        "another way, every host waits for its device; disable_signal_handling in " + INTERNALS
    )


def test_the_counts_of_a_checkpoint_can_be_set(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "small.ckpt")

    small_trainer(tmp_path, Save()).fit(Small())
    saved = torch.load(tmp_path / "small.ckpt", weights_only=True)
    counts = {"ready": 4, "started": 4, "processed": 4, "completed": 3}
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert {span: progress[span] for span in ("total", "current")} == {"total": counts, "current": counts}, (
        "Lightning: a checkpoint saved in on_train_batch_end counts micro-batches in another way in "
        "loops.fit_loop['epoch_loop.batch_progress']; set_micro_batches in " + INTERNALS + " sets these counts"
    )
    set_micro_batches(saved, 4)
    assert progress["total"] == counts


def test_a_resumed_trainer_validates_first_if_asked_to(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    assert callable(getattr(trainer, "_run_sanity_check", None)), (
        "Lightning: Trainer._run_sanity_check is gone; validate_before_training in " + INTERNALS + " wraps it"
    )
    assert isinstance(trainer.fit_loop.epoch_loop.val_loop, _EvaluationLoop)
    assert hasattr(trainer.fit_loop.epoch_loop.val_loop, "restarting")
    assert "not val_loop.restarting" in inspect.getsource(Trainer._run_sanity_check), (
        "Lightning: the check before training no longer depends on val_loop.restarting; validate_before_training in "
        + INTERNALS
        + " clears it on a resumed run. tests/train/test_resume.py tests the effect"
    )


def test_the_observer_of_processes_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: Any = SimpleNamespace(poll=lambda: None, returncode=1, pid=0, args=[])
    observer = subprocess_script._ChildProcessObserver(main_pid=0, child_processes=[failed])
    assert observer.name == OBSERVER, (
        "Lightning: the thread that kills all processes after one ends has another name; stop_process_observer in "
        + INTERNALS
        + " finds it by name"
    )
    monkeypatch.setattr("threading.enumerate", lambda: [observer])
    stop_process_observer()
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("it still watches its processes"))
    assert observer._run(), (
        "Lightning: its observer of processes no longer ends when _child_processes is empty; stop_process_observer in "
        + INTERNALS
    )


def test_deepspeed_is_initialised_in_the_overridden_method() -> None:
    method = getattr(DeepSpeedStrategy, "_initialize_deepspeed_train", None)
    assert method is not None, (
        "Lightning: DeepSpeedStrategy._initialize_deepspeed_train is gone; ZeroStrategy in cllm/train/strategy.py "
        "overrides it to set fp32 master weights"
    )
    assert list(inspect.signature(method).parameters) == ["self", "model"]
    assert "_initialize_deepspeed_train(" in inspect.getsource(DeepSpeedStrategy.init_deepspeed), (
        "Lightning: init_deepspeed no longer calls _initialize_deepspeed_train; see cllm/train/strategy.py"
    )


# ---- loggers and callbacks of the caller ----------------------------------------------------------------------------


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time", "throughput/", "memory/")
    return [{tag: value for tag, value in row.items() if not tag.startswith(timed)} for row in rows]


def test_a_logger_gets_the_rows_and_the_hyperparameters_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    plain = train(tiny("--name", "plain", *SHORT))
    logger = CSVLogger(tmp_path, name="csv", version="")
    folder = train(tiny("--name", "logged", *SHORT), loggers=[logger])
    rows = list(folder.metrics())
    assert measured(rows) == measured(list(plain.metrics()))
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        logged = [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]
    assert logged == [{tag: value for tag, value in row.items() if tag != "time"} for row in rows]
    settings = yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text())
    assert settings["design"] == "mha"
    assert settings["optim.lr"] == 1e-2
    saved = [torch.load(run.checkpoints()[-1][1], weights_only=True) for run in (plain, folder)]
    for name, tensor in saved[0]["state_dict"].items():
        assert torch.equal(tensor, saved[1]["state_dict"][name]), name
    assert saved[0]["loops"] == saved[1]["loops"]


def test_a_resumed_run_logs_only_its_own_rows(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(*SHORT))
    logger = CSVLogger(tmp_path, name="csv", version="")
    folder = train(tiny(*SHORT, "--train.steps", "6"), resume="auto", loggers=[logger])
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        logged = {int(row["step"]) for row in csv.DictReader(file)}
    assert logged == {5, 6}
    assert [row["step"] for row in folder.metrics() if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_callback_sees_every_step_and_may_keep_state_in_the_checkpoint(tiny: Tiny) -> None:
    class Steps(Callback):
        steps = 0

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.steps += step_is_complete(trainer, batch_idx)

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.steps = state_dict["steps"]

    first, second = Steps(), Steps()
    train(tiny(*SHORT), callbacks=[first])
    assert first.steps == 4
    train(tiny(*SHORT, "--train.steps", "6"), resume="auto", callbacks=[second])
    assert second.steps == 6
