"""The training step of uptraining, what it adds to the metrics, and what of it a checkpoint holds.

Under `model.` a checkpoint holds the student and nothing else, low-rank updates merged, so that whatever reads a run
reads these too. What resuming needs besides is under `uptrain.`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cllm.config import Config
from cllm.model.loss import IGNORE
from cllm.train.callbacks import Metrics, step_is_complete
from cllm.train.module import TrainingModule
from cllm.train.strategy import ZeroStrategy
from cllm.uptrain.curriculum import OWN, set_progress
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.loss import Distilled, Target, hidden_difference
from cllm.uptrain.teacher import Teacher
from cllm.uptrain.trainable import LORA_A, LORA_B, lora_layers

_MODEL, _EXTRA, _REFERENCE = "model.", "uptrain.", "uptrain_reference"


class UptrainingModule(TrainingModule):
    """A student, its teacher, and how the one learns from the other.

    `train/loss` stays next-token cross-entropy, as in every other run; what is minimised is `train/objective`.
    """

    model: TracedDecoder

    def __init__(self, model: TracedDecoder, teacher: Teacher, config: Config, validation_names: list[str]):
        super().__init__(model, config, validation_names)
        # In a tuple it is no submodule: neither trained, nor sharded, nor saved.
        self._teacher: tuple[TracedDecoder, ...] = (teacher.decoder,)
        self.reference: dict[str, float] = {}
        """`teacher` and `start`: validation losses of the teacher and of the student before its first step."""
        self._teacher_score = torch.zeros(2, dtype=torch.float64)
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._release_teacher()

    def _release_teacher(self) -> None:
        """Let the teacher go where no step and no validation will ask it."""
        if not self.config.uptrain.needs_teacher and (self.reference or not self.config.train.validate_every):
            self._teacher = ()

    def on_fit_start(self) -> None:
        if self._teacher:
            bf16 = self.device.type == "cuda" and self.config.train.precision != "fp32"
            self._teacher[0].to(device=self.device, dtype=torch.bfloat16 if bf16 else torch.float32)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        uptrain, step = self.config.uptrain, self.global_step
        if uptrain.random_sources:
            self.model.route = draw_route(len(self.model.blocks), uptrain.random_sources, self.config.train.seed, step)
        if uptrain.curriculum_steps:
            set_progress(self.model, step, uptrain.curriculum_steps)
        parts = self.objective(batch)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._count += 1
        self.loss_sum = self.loss_sum + parts["next_token"].detach()
        self.loss_count += 1
        return parts["objective"]

    def objective(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`objective`, which is minimised, and its parts without their weights: `next_token`, `kl`, `hidden`."""
        weights = self.config.uptrain.loss
        if not self.config.uptrain.needs_teacher:
            loss = self.loss(batch)
            return {"objective": weights.next_token * loss, "next_token": loss}
        inputs = (batch["input_ids"], batch.get("positions"), batch.get("document_ids"))
        teacher, all_layers = self._teacher[0], weights.hidden > 0 and weights.hidden_layers == "all"
        with torch.no_grad():
            theirs = hidden_states(teacher, inputs, all_layers)
        mine = hidden_states(self.model, inputs, all_layers)
        target = Target(theirs[-1], teacher.head.weight, weights.temperature, weights.kl, weights.next_token)
        distilled = Distilled(*self.model.head(mine[-1], batch["labels"], target=target))
        parts = {"objective": distilled.loss, "next_token": distilled.next_token, "kl": distilled.kl}
        if weights.hidden:
            parts["hidden"] = hidden_difference(mine, theirs)
            parts["objective"] = parts["objective"] + weights.hidden * parts["hidden"]
        return parts

    def take_parts(self) -> dict[str, Tensor]:
        """Means of the parts since the last call."""
        means = {name: total / max(self._count, 1) for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.model.route = None
        self._teacher_score = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.reference or dataloader_idx:
            return
        inputs = (batch["input_ids"], batch["labels"], batch.get("positions"), batch.get("document_ids"))
        nats = self._teacher[0].loss(*inputs, reduction="none").double().sum()
        self._teacher_score = self._teacher_score + torch.stack((nats, (batch["labels"] != IGNORE).sum()))

    def recovery(self) -> dict[str, float]:
        """What a validation says besides its own scores; the first one of a run measures the teacher too."""
        nats, scored = self.validation_scores()[self.validation_names[0]]
        loss = nats / max(scored, 1)
        if not self.reference:
            total = self.trainer.strategy.reduce(self._teacher_score, reduce_op="sum")
            nats, scored = total.tolist()
            self.reference = {"teacher": nats / max(scored, 1)}
            if self.trainer.global_step == 0:
                self.reference["start"] = loss
            self._release_teacher()
        teacher, start = self.reference["teacher"], self.reference.get("start")
        values = {"val/teacher_loss": teacher}
        if start is not None:
            values["val/start_loss"] = start
            if start > teacher:
                values["val/recovery"] = 100 * (start - loss) / (start - teacher)
        return values

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy):
            strategy.set_apart = self.set_apart
            strategy.sets_apart = any(_is_extra(name) for name, _ in self.model.named_parameters())

    def set_apart(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's weights, low-rank updates merged, and what else `weights`, of all that is here, has in it."""
        student = {name: tensor for name, tensor in weights.items() if not _is_extra(name)}
        extra = {name: tensor for name, tensor in weights.items() if _is_extra(name)}
        for name, layer in lora_layers(self.model).items():
            extra[f"{name}.weight"] = weights[f"{name}.weight"]
            a, b = (weights[f"{name}.{part}"] for part in (LORA_A, LORA_B))
            student[f"{name}.weight"] = layer.merge(weights[f"{name}.weight"], a, b).detach()
        return student, extra

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_REFERENCE] = dict(self.reference)
        if isinstance(self.trainer.strategy, ZeroStrategy):  # it has files of its own for weights
            return
        state = checkpoint["state_dict"]
        student, extra = self.set_apart({name.removeprefix(_MODEL): tensor for name, tensor in state.items()})
        state.clear()
        state.update({_MODEL + name: tensor for name, tensor in student.items()})
        state.update({_EXTRA + name: tensor for name, tensor in extra.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.reference = dict(checkpoint[_REFERENCE])
        self._release_teacher()
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith(_EXTRA)]:
            state[_MODEL + name.removeprefix(_EXTRA)] = state.pop(name)


def _is_extra(name: str) -> bool:
    """Whether a tensor is of the training and not of the student."""
    return any(part in (LORA_A, LORA_B, OWN) for part in name.split("."))


def hidden_states(
    model: TracedDecoder, inputs: tuple[Tensor, Tensor | None, Tensor | None], all_layers: bool
) -> list[Tensor]:
    """What the head reads, last, after the output of every layer if asked for; (B, T, d_model) each."""
    if not all_layers:
        return [model.hidden(*inputs)]
    with model.listen() as heard:
        last = model.hidden(*inputs)
    return [*heard[1:], last]


def draw_route(n_layers: int, chance: float, seed: int, step: int) -> list[int]:
    """For every layer the layer that it reads in optimizer step `step`, the same on every device and after a resume.

    Each layer but the lowest reads, with `chance`, one of the layers below that read themselves, all equally likely
    (after Stochastic KV Routing, arXiv 2604.22782).
    """
    draw = random.Random(f"{seed} {step}")
    route, owners = [0], [0]
    for i in range(1, n_layers):
        if draw.random() < chance:
            route.append(draw.choice(owners))
        else:
            route.append(i)
            owners.append(i)
    return route


class Recovery(Callback):
    """Adds rows to the metrics: the parts of the objective, and the teacher's loss as a line to reach."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not step_is_complete(trainer) or (step % self.metrics.log_every and step != self.metrics.steps):
            return
        assert isinstance(pl_module, UptrainingModule)
        self._write(
            step,
            {
                f"train/{name}": float(trainer.strategy.reduce(value, reduce_op="mean"))
                for name, value in pl_module.take_parts().items()
                if name != "next_token"
            },
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, UptrainingModule)
        self._write(trainer.global_step, pl_module.recovery())

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.metrics.writer is not None:
            self.metrics.writer.write(step, values)
