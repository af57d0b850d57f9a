"""Callbacks of Lightning, from `train.callbacks` or the caller: their arguments, monitored metrics and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from cllm.config import Config
from cllm.errors import UserError
from cllm.rows import rows_backwards
from cllm.runs import RunFolder
from cllm.train.breakdown import PARTS
from cllm.train.imports import check_arguments, construct, import_class, split_entry
from cllm.train.metrics import COMMON_KEYS, publish

TRAINING_TAGS = (
    *("train/loss", "train/lr", "train/gradient_norm", "train/skipped_steps"),
    *("throughput/tokens_per_s", "throughput/data_wait", "throughput/mfu", "memory/peak_gib", "kv/bytes_per_token"),
    *(f"time/{part}_ms" for part in PARTS),
)
"""Tags of a training row; uptraining has more."""
VALIDATION_TAGS = ("loss", "ppl", "bits_per_byte", "ar_loss")
"""Tags of each validation set, after its prefix; uptraining has more."""
_UPTRAINING_TAGS = ("val/teacher_loss", "val/start_loss", "val/recovery")


def make_callbacks(config: Config) -> list[Callback]:
    """Build the callbacks of `train.callbacks`. Nothing is written.

    A `ModelCheckpoint` overwrites files of its own names, so that a resumed run leaves no second file of a step.

    Raises:
        UserError: for an import path without a callback, arguments that do not fit, and whatever a constructor raises.
    """
    made = []
    for n, entry in enumerate(config.train.callbacks):
        key = f"train.callbacks.{n}"
        path, arguments = split_entry(entry)
        assert path is not None, "the config has been checked"
        cls = import_class(path, Callback, key)
        if issubclass(cls, ModelCheckpoint):
            arguments = {"enable_version_counter": False} | arguments
        check_arguments(cls, arguments, key)
        made.append(construct(cls, arguments, key))
    return made


def check_callbacks(callbacks: Sequence[Callback], config: Config, folder: RunFolder, sets: Sequence[str]) -> None:
    """Refuse callbacks that cannot work in this run, and give every `ModelCheckpoint` a folder.

    Args:
        callbacks: all of `train.callbacks` and of the caller.
        config: of the run.
        folder: of the run.
        sets: names of the validation sets, the main one first.

    Raises:
        UserError: for a monitored metric that is not logged or is not known yet at the first validation, a
            `ModelCheckpoint` in the run's `checkpoints/`, and two callbacks whose states have the same key.
    """
    keys = set()
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint):
            if callback.dirpath is None:
                callback.dirpath = str((folder.path / "model_checkpoints").resolve())
            place, ours = Path(callback.dirpath).resolve(), folder.checkpoint_folder.resolve()
            if place.is_relative_to(ours):
                raise UserError(f"{name}: dirpath {callback.dirpath} belongs to the run itself; choose another folder")
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            _check_monitor(monitor, name, config, sets)
        if type(callback).state_dict is not Callback.state_dict:
            if callback.state_key in keys:
                raise UserError(f"two callbacks {name} have the same state key {callback.state_key}; allowed: one")
            keys.add(callback.state_key)


def _check_monitor(monitor: str, name: str, config: Config, sets: Sequence[str]) -> None:
    train, uptrains = config.train, config.init.path is not None
    prefixes = ["val", *(f"val-{name}" for name in sets[1:])]
    validation = [f"{prefix}/{tag}" for prefix in prefixes for tag in VALIDATION_TAGS]
    validation += _UPTRAINING_TAGS if uptrains else ()
    if monitor in validation:
        if train.validate_every is None:
            raise UserError(f"{name} monitors {monitor}, but train.validate_every is null; set it")
    elif monitor in TRAINING_TAGS or (uptrains and monitor.startswith("train/")):
        if train.validate_every is not None and train.validate_every < train.log_every:
            raise UserError(
                f"{name} monitors {monitor}, but train.validate_every {train.validate_every} is less than "
                f"train.log_every {train.log_every}, so that the first validation comes before its first value"
            )
    else:
        raise UserError(f"{name} monitors {monitor!r}; allowed: {', '.join([*validation, *TRAINING_TAGS])}")


class MonitoredMetrics(Callback):
    """Makes callbacks that monitor a metric see the same values in a resumed run as in an uninterrupted one.

    A checkpoint is saved before its step is validated. So a resumed run first restores the last values from
    metrics.jsonl, and then calls `on_validation_end` of callbacks with a `monitor` if they have not seen the validation
    of that step. This includes a validation that was missed and done before training. An `EarlyStopping` keeps the
    `patience` of its arguments; Lightning restores the one of the checkpoint. Comes after the callbacks in the list.

    Args:
        callbacks: all of `train.callbacks` and of the caller.
        folder: of the run.
        start_step: the step that the run resumes from; 0 for a new run.
    """

    def __init__(self, callbacks: Sequence[Callback], folder: RunFolder, start_step: int):
        self.folder, self.start_step = folder, start_step
        self.monitoring: list[Any] = [c for c in callbacks if getattr(c, "monitor", None) is not None]
        self._patience = {id(c): c.patience for c in callbacks if isinstance(c, EarlyStopping)}
        self._validated: int | None = None
        """The last step whose validation the callbacks have seen."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated = state_dict["validated"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.start_step or not self.monitoring:
            return
        for callback in self.monitoring:
            if isinstance(callback, EarlyStopping):
                callback.patience = self._patience[id(callback)]
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED  # that of an earlier stop is over
                callback.stopping_reason_message = None
        values, validated = trainer.strategy.broadcast(self._recorded() if trainer.is_global_zero else ({}, False))
        publish(trainer, values)
        if validated and self._validated != self.start_step:
            for callback in self.monitoring:
                callback.on_validation_end(trainer, pl_module)
            self._validated = self.start_step

    def _recorded(self) -> tuple[dict[str, float], bool]:
        """The last values of each kind of row, and whether the run's start step was validated."""
        values: dict[str, float] = {}
        validated, needed = False, {"train/loss", *(callback.monitor for callback in self.monitoring)}
        for _, row in rows_backwards(self.folder.metrics_file):
            for tag in row.keys() - COMMON_KEYS - values.keys():
                values[tag] = math.nan if row[tag] is None else row[tag]
            validated |= "val/loss" in row and row["step"] == self.start_step
            if row["step"] < self.start_step and needed <= values.keys():
                break
        return values, validated


def early_stop_reason(callbacks: Sequence[Callback]) -> str:
    """Why a run has ended before its last step."""
    for callback in callbacks:
        message = getattr(callback, "stopping_reason_message", None)
        if message:
            return f"{type(callback).__name__}: {message}"
    return "a callback has set trainer.should_stop"
