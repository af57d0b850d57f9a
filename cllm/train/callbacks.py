"""What happens around the steps: metrics, progress, checkpoints, an orderly stop. One small callback each."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from cllm.errors import UserError
from cllm.files import sync_folder, sync_tree
from cllm.plan.describe import plan_figure
from cllm.runs import RunFolder
from cllm.runs.checkpoint import save_file, write_checksums
from cllm.signals import leave_terminal
from cllm.train.metrics import MetricsLog
from cllm.train.module import TrainingModule
from cllm.train.strategy import engine_of, gradient_norm, weights_are_finite
from cllm.train.throughput import Clock, peak_flops

log = logging.getLogger(__name__)

_SKIPPED = "skipped_steps"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def step_is_complete(trainer: Trainer) -> bool:
    """Whether the micro-batch that just ended also ended an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


class Metrics(Callback):
    """Writes a row of metrics every `log_every` steps and after every validation, and shows progress.

    This is where tensors become numbers, and so the only place where the host waits for the device.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        start_step: int,
        steps: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: float,
        kv_bytes_per_token: float,
        bytes_per_token: dict[str, float],
        hyperparameters: dict[str, Any],
        max_skipped_steps: int = 0,
    ):
        self.folder, self.steps, self.log_every = folder, steps, log_every
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.kv_bytes_per_token, self.bytes_per_token = kv_bytes_per_token, bytes_per_token
        self.hyperparameters = hyperparameters
        self.max_skipped_steps = max_skipped_steps
        self.clock = Clock()
        self.rate = 0.0  # the learning rate of the step under way
        self.since = start_step  # the step of the last row
        self.writer: MetricsLog | None = None
        self.bar: tqdm | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self.writer is not None:
            return
        start = self.since
        self.writer = MetricsLog(self.folder, start_step=start, tokens_per_step=self.tokens_per_step)
        assert isinstance(pl_module, TrainingModule)
        picture = plan_figure(pl_module.model.plan, self.folder.name)
        self.writer.start(self.hyperparameters, self.folder.config_file.read_text(encoding="utf-8"), picture)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=start, unit="step", dynamic_ncols=True, desc=self.folder.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.clock.start(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.working()
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.clock.parts.mark("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.parts.mark("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.waiting()
        step = trainer.global_step
        if not step_is_complete(trainer):
            return
        engine = engine_of(trainer)
        if engine is not None:
            self._check_skipped(engine.skipped_steps, step)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step % self.log_every == 0 or step == self.steps:
            assert isinstance(pl_module, TrainingModule)
            self._log_training(trainer, pl_module, step)

    def _log_training(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        total, count = trainer.strategy.reduce(module.take_training_loss(), reduce_op="sum").tolist()
        loss = total / max(count, 1)
        seconds, waited = self.clock.read()
        steps = step - self.since
        rate = steps * self.tokens_per_step / max(seconds, 1e-9)
        values = {
            "train/loss": loss,
            "train/lr": self.rate,
            "train/gradient_norm": float(module.gradient_norm),
            "throughput/tokens_per_s": rate,
            "throughput/data_wait": waited / max(seconds, 1e-9),
            "memory/peak_gib": _peak_memory(module.device),
            "kv/bytes_per_token": self.kv_bytes_per_token,
        }
        values |= {f"time/{part}_ms": ms / steps for part, ms in self.clock.parts.read().items()}
        engine = engine_of(trainer)
        if engine is not None:
            values["train/gradient_norm"] = gradient_norm(engine)
        skipped = int(module.skipped_steps if engine is None else engine.skipped_steps)
        values["train/skipped_steps"] = skipped
        peak = peak_flops(module.device)
        if peak is not None:
            values["throughput/mfu"] = rate * self.flops_per_token / (peak * trainer.world_size)
        self._write(step, values | module.training_metrics())
        self._show(step, loss, rate)
        self._check_skipped(skipped, step)
        self.since = step
        self.clock.start()

    def _check_skipped(self, skipped: int, step: int) -> None:
        if skipped > self.max_skipped_steps:
            raise UserError(
                f"{skipped} steps up to step {step} had a gradient that was not finite and were skipped; "
                f"train.max_skipped_steps is {self.max_skipped_steps}; the newest checkpoint is "
                f"{self.folder.newest_checkpoint() or 'none'}; lower optim.lr or look at the data"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        checkpoint[_SKIPPED] = int(pl_module.skipped_steps)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.skipped_steps = checkpoint.get(_SKIPPED, 0)  # runs from before they were counted have none

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        values: dict[str, float] = {}
        for n, (name, (nats, scored)) in enumerate(pl_module.validation_scores().items()):
            prefix = "val" if n == 0 else f"val-{name}"
            loss = nats / max(scored, 1)
            values[f"{prefix}/loss"] = loss
            values[f"{prefix}/ppl"] = math.exp(min(loss, 700))
            values[f"{prefix}/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token[name]
        self._write(trainer.global_step, values | pl_module.validation_metrics())
        self.sync()
        if trainer.is_global_zero:
            self._say(f"step {trainer.global_step}: " + "  ".join(f"{tag} {v:.4f}" for tag, v in values.items()))
        self.clock.resume()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def sync(self) -> None:
        """Write the rows so far to the disk."""
        if self.writer is not None:
            self.writer.sync()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, values)

    def _show(self, step: int, loss: float, rate: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        elif self.writer is not None:
            left = (self.steps - step) * self.tokens_per_step / max(rate, 1e-9)
            minutes, seconds = divmod(round(left), 60)
            self._say(f"step {step}/{self.steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  {minutes}:{seconds:02d} left")

    @staticmethod
    def _say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)


def _peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Checkpoints(Callback):
    """Saves every `every` steps and at the end, under a temporary name first, and keeps the newest `keep`.

    `every` None: only when `save` is called. Weights that are not finite are never saved. A checkpoint gets its name
    when it and all rows of metrics up to its step (`sync_rows`) are on the disk; only then are older ones deleted.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        every: int | None,
        keep: int,
        steps: int,
        clock: Clock,
        sync_rows: Callable[[], None] = lambda: None,
    ):
        self.folder, self.every, self.keep, self.steps, self.clock = folder, every, keep, steps, clock
        self.sync_rows = sync_rows
        self._saved: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every is not None and step_is_complete(trainer) and (step % self.every == 0 or step == self.steps):
            self.save(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the micro-batches so far as if the devices had always been as many as now.

        Lightning ends a step, and validates, where that count is a multiple of a step's micro-batches on one device.
        """
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for span in ("total", "current"):  # saved before the end of the batch, which Lightning makes up for
            progress[span] |= dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already. All processes call it; the first names what they wrote.

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
            shutil.rmtree(partial)  # of a run that was killed while it saved
        trainer.strategy.barrier()
        with self._removed_on_error(partial, trainer):
            trainer.save_checkpoint(partial, weights_only=False)
            self.sync_rows()
            if partial.is_dir():
                sync_tree(partial)  # each process what it has written
                trainer.strategy.barrier()
        if trainer.is_global_zero:
            if partial.is_dir():
                write_checksums(partial)
            if path.is_dir():
                self.folder.set_aside_checkpoints(after=trainer.global_step - 1)
            partial.rename(path)
            sync_folder(path.parent)
            self.folder.keep_checkpoints(self.keep, trainer.global_step)
        trainer.strategy.barrier()
        self._saved = trainer.global_step
        self.clock.resume()

    @staticmethod
    @contextlib.contextmanager
    def _removed_on_error(partial: Path, trainer: Trainer) -> Iterator[None]:
        """After a failed write, as on a full disk, remove what was written of it."""
        try:
            yield
        except BaseException:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
            raise


class CheckpointFiles(CheckpointIO):
    """How Lightning reads and writes checkpoints of one file: without a copy in memory or in another folder."""

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


class StopWhenDone(Callback):
    """Ends the run after its last step, with one more validation, and on a signal after the step under way, without.

    The signals are SIGTERM, SIGINT, SIGHUP (a terminal that closes) and SIGUSR1, which is the one that srun hands on to
    its tasks and lives. SIGHUP stays ignored where it was, as under nohup. The run is saved first; `--resume auto` goes
    on from there. A second SIGINT interrupts at once. Several processes agree on stopping every `agree_every` steps,
    since agreeing makes the host wait for the device.
    """

    def __init__(self, checkpoints: Checkpoints, steps: int, agree_every: int):
        self.checkpoints, self.steps, self.agree_every = checkpoints, steps, agree_every
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside, and give them back to whoever had them, however it ends.

        It begins before the loaders' processes fork: the handlers that they inherit keep them alive until the step
        under way has ended.
        """
        try:
            for number in _STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.getsignal(number)
                    signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return
        self.received = number
        if number == signal.SIGHUP:
            leave_terminal()
        tqdm.write(f"{signal.Signals(number).name}: saving after this step, then stopping", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_is_complete(trainer):
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            agree = trainer.global_step % self.agree_every == 0
            stop = agree and trainer.strategy.reduce_boolean_decision(stop, all=False)
        done = trainer.global_step >= self.steps
        if stop:
            self.checkpoints.save(trainer)
            trainer.fit_loop.epoch_loop._skip_next_val = not done  # who sends a signal does not wait for a validation
        if stop or done:
            trainer.should_stop = True
