"""The callback that measures a run: losses, norms and times become rows of metrics."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from cllm.errors import UserError
from cllm.progress import ProgressMeter
from cllm.runs import RunFolder
from cllm.train.metrics import MetricsLog, publish
from cllm.train.module import TrainingModule, step_is_complete
from cllm.train.strategy import engine_of, gradient_norm
from cllm.train.throughput import Clock, peak_flops

_SKIPPED = "skipped_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Constants of a run that its metrics are computed from."""

    start_step: int
    """The step that the run resumes from; 0 for a new run."""
    steps: int
    """The run's last step."""
    log_every: int
    """Steps between rows."""
    tokens_per_step: int
    flops_per_token: float
    """Of a training step."""
    kv_bytes_per_token: float
    """Resident cache bytes in bf16."""
    bytes_per_token: dict[str, float]
    """UTF-8 bytes of text, by validation set."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The flat table that loggers get."""
    max_skipped_steps: int = 0
    """Steps without a finite gradient, after which the run stops."""


class Metrics(Callback):
    """Writes a row of metrics every `log_every` steps and after every validation, and shows progress.

    Tensors become numbers only here, so the host waits for the device only here. The values of a row are also those
    that callbacks can monitor. Times and memory are those of the process itself, all others are equal on all processes.
    """

    def __init__(self, folder: RunFolder, facts: RunFacts):
        self.folder, self.facts = folder, facts
        self.clock = Clock()
        self.rate = 0.0  # learning rate of the current step
        self.since = facts.start_step  # step of the last row
        self.writer: MetricsLog | None = None
        self.meter: ProgressMeter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or self.writer is not None:
            return
        start, facts = self.since, self.facts
        self.writer = MetricsLog(
            self.folder, start_step=start, tokens_per_step=facts.tokens_per_step, loggers=trainer.loggers
        )
        config, picture = self.folder.config_file.read_text(encoding="utf-8"), self.folder.picture_file.read_bytes()
        self.writer.start(facts.hyperparameters, config, picture)
        self.meter = ProgressMeter(facts.steps, self.folder.name, "step", done=start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.clock.start(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._check_size(trainer, batch)
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
        if not step_is_complete(trainer, batch_idx):
            return
        engine = engine_of(trainer)
        if engine is not None:
            self._check_skipped(engine.skipped_steps, step)
        if step % self.facts.log_every == 0 or step == self.facts.steps:
            assert isinstance(pl_module, TrainingModule)
            self._log_training(trainer, pl_module, step)
        if self.meter is not None:
            self.meter.update(step - self.meter.done)

    def _check_size(self, trainer: Trainer, batch: Any) -> None:
        """Refuse steps of another size, which a callback makes that changes the accumulation of gradients."""
        parts = trainer.world_size * trainer.accumulate_grad_batches
        if (tokens := batch["labels"].numel() * parts) != self.facts.tokens_per_step:
            raise UserError(
                f"a step has {tokens} tokens instead of {self.facts.tokens_per_step}, because a callback has set "
                f"accumulate_grad_batches to {trainer.accumulate_grad_batches}; allowed: train.global_batch and "
                "train.micro_batch alone decide it"
            )

    def _log_training(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        total, count = trainer.strategy.reduce(module.take_training_loss(), reduce_op="sum").tolist()
        loss = total / max(count, 1)
        seconds, waited = self.clock.read()
        steps = step - self.since
        rate = steps * self.facts.tokens_per_step / max(seconds, 1e-9)
        values = {
            "train/loss": loss,
            "train/lr": self.rate,
            "train/gradient_norm": float(module.gradient_norm),
            "throughput/tokens_per_s": rate,
            "throughput/data_wait": waited / max(seconds, 1e-9),
            "memory/peak_gib": _peak_memory(module.device),
            "kv/bytes_per_token": self.facts.kv_bytes_per_token,
        }
        values |= {f"time/{part}_ms": ms / steps for part, ms in self.clock.parts.read().items()}
        engine = engine_of(trainer)
        if engine is not None:
            values["train/gradient_norm"] = gradient_norm(engine)
        skipped = int(module.skipped_steps if engine is None else engine.skipped_steps)
        values["train/skipped_steps"] = skipped
        peak = peak_flops(module.device)
        if peak is not None:
            values["throughput/mfu"] = rate * self.facts.flops_per_token / (peak * trainer.world_size)
        self.record(trainer, values | module.training_metrics())
        if self.meter is not None:
            self.meter.note(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        self._check_skipped(skipped, step)
        self.since = step
        self.clock.start()

    def _check_skipped(self, skipped: int, step: int) -> None:
        if skipped > self.facts.max_skipped_steps:
            raise UserError(
                f"{skipped} steps up to step {step} had a gradient that was not finite and were skipped; "
                f"train.max_skipped_steps is {self.facts.max_skipped_steps}; the newest checkpoint is "
                f"{self.folder.newest_checkpoint() or 'none'}; lower optim.lr or look at the data"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        checkpoint[_SKIPPED] = int(pl_module.skipped_steps)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.skipped_steps = checkpoint.get(_SKIPPED, 0)  # missing in checkpoints from before they were counted

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
            values[f"{prefix}/bits_per_byte"] = loss / math.log(2) / self.facts.bytes_per_token[name]
        self.record(trainer, values | pl_module.validation_metrics())
        self.sync()
        if trainer.is_global_zero:
            self.say(f"step {trainer.global_step}: " + "  ".join(f"{tag} {v:.4f}" for tag, v in values.items()))
        self.clock.resume()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.meter is not None:
            self.meter.close()
            self.meter = None
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def sync(self) -> None:
        """Write the rows so far through to the disk."""
        if self.writer is not None:
            self.writer.sync()

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write a row of further values after the current step, and make them known to callbacks."""
        publish(trainer, values)
        if self.writer is not None:
            self.writer.write(trainer.global_step, values)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stderr)


def _peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
