"""Checkpoints of a run: when they are saved, and how a file becomes one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from cllm.config import TrainConfig
from cllm.errors import UserError
from cllm.files import sync_folder, sync_tree
from cllm.runs import RunFolder
from cllm.runs.checkpoint import save_file, write_checksums
from cllm.train.best import BestCheckpoints
from cllm.train.lightning_internals import set_micro_batches
from cllm.train.module import step_is_complete
from cllm.train.strategy import weights_are_finite
from cllm.train.throughput import Clock


class Checkpoints(Callback):
    """Saves every `train.checkpoint_every` steps and at the end, under a temporary name first.

    With null it saves only when `save` is called. Weights that are not finite are never saved. A checkpoint gets
    its name after it and all rows of metrics up to its step are on the disk (`sync_rows`). Only then are all
    but the newest `train.keep_checkpoints` and the best `train.keep_best` deleted. A step is saved before it is
    validated, so the best ones are chosen again after each validation.
    """

    def __init__(
        self, folder: RunFolder, train: TrainConfig, *, clock: Clock, sync_rows: Callable[[], None] = lambda: None
    ):
        self.folder, self.clock, self.sync_rows = folder, clock, sync_rows
        self.every, self.keep, self.steps = train.checkpoint_every, train.keep_checkpoints, train.steps
        self.keep_best = train.keep_best
        self.best: BestCheckpoints | None = None
        """On the first process, from the start of training on."""
        self._saved: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.best = BestCheckpoints(self.folder, self.keep_best)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every is not None and (step % self.every == 0 or step == self.steps)
        if due and step_is_complete(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None and self.keep_best:
            self.best.add(trainer.global_step, float(trainer.callback_metrics["val/loss"]))
            self._delete_others(up_to=0)

    def _delete_others(self, up_to: int) -> None:
        """Delete the checkpoints that are not kept, and those that were set aside for steps up to `up_to`."""
        assert self.best is not None
        self.folder.keep_checkpoints(self.keep, up_to, self.best.steps())
        self.best.write()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        set_micro_batches(checkpoint, checkpoint["global_step"] * trainer.accumulate_grad_batches)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already. Collective: the first process renames what all have written.

        Raises:
            UserError: when a weight is not finite.
        """
        path = self.folder.checkpoint_path(trainer.global_step)
        if self._saved == trainer.global_step:
            return
        if not trainer.strategy.reduce_boolean_decision(weights_are_finite(trainer.lightning_module), all=True):
            raise UserError(
                f"weights are not finite after step {trainer.global_step} and were not saved; the newest checkpoint is "
                f"{self.folder.newest_checkpoint() or 'none'}; lower optim.lr or look at the data"
            )
        partial = path.with_suffix(".partial")
        self.clock.pause()
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)  # from a run that was killed while saving
        trainer.strategy.barrier()
        with self._removed_on_error(partial, trainer):
            trainer.save_checkpoint(partial, weights_only=False)
            self.sync_rows()
            if partial.is_dir():
                sync_tree(partial)  # each process syncs what it has written
                trainer.strategy.barrier()
        if trainer.is_global_zero:
            if partial.is_dir():
                write_checksums(partial)
            if path.is_dir():
                self.folder.set_aside_checkpoints(after=trainer.global_step - 1)
            partial.rename(path)
            sync_folder(path.parent)
            self._delete_others(up_to=trainer.global_step)
        trainer.strategy.barrier()
        self._saved = trainer.global_step
        self.clock.resume()

    @staticmethod
    @contextlib.contextmanager
    def _removed_on_error(partial: Path, trainer: Trainer) -> Iterator[None]:
        """Remove the incomplete checkpoint if writing it fails, for example on a full disk."""
        try:
            yield
        except BaseException:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
            raise


class CheckpointFiles(CheckpointIO):
    """Lightning's reading and writing of single-file checkpoints, without a copy in memory or in another folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
