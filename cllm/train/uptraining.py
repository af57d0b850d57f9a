"""The training step of uptraining, its metrics and its checkpoints.

Under `model.` a checkpoint holds only the student, low-rank updates merged, so that every reader of runs can read it.
Extra tensors that only resuming needs are under `uptrain.`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.cross_entropy import IGNORE
from cllm.train.module import TrainingModule
from cllm.train.optim import Optimizer
from cllm.train.strategy import ZeroStrategy
from cllm.uptrain.attention import attention_outputs
from cllm.uptrain.curriculum import OWN, set_progress
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.loss import Distilled, Target, hidden_difference
from cllm.uptrain.student import Student
from cllm.uptrain.trainable import LORA_A, LORA_B, lora_layers

_MODEL, _EXTRA, _REFERENCE = "model.", "uptrain.", "uptrain_reference"
_PARTS, _PART = "parts_count", "part."


class UptrainingModule(TrainingModule):
    """A student, its teacher, and the training step.

    `train/loss` is next-token cross-entropy, as in every other run; `train/objective` is minimised.
    """

    model: TracedDecoder

    def __init__(self, student: Student, optimizer: Optimizer, validation_names: list[str]):
        super().__init__(student.decoder, student.config, optimizer, validation_names)
        # A tuple, so that it is not a submodule, which would be trained, sharded and saved.
        self._teacher: tuple[TracedDecoder, ...] = (student.teacher.decoder,)
        self.reference: dict[str, float] = {}
        """`teacher` and `start`: validation losses of the teacher and of the student before its first step."""
        self._teacher_score = torch.zeros(2, dtype=torch.float64)
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0
        self._release_teacher()

    def _release_teacher(self) -> None:
        """Free the teacher if no step and no validation will use it any more."""
        if not self.config.uptrain.needs_teacher and (self.reference or not self.config.train.validate_every):
            self._teacher = ()

    def on_fit_start(self) -> None:
        if self._teacher:
            bf16 = self.device.type == "cuda" and self.config.train.precision != "fp32"
            self._teacher[0].to(device=self.device, dtype=torch.bfloat16 if bf16 else torch.float32)

    # ---- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        uptrain, step = self.config.uptrain, self.global_step
        if uptrain.random_sources:
            self.model.route = draw_route(
                len(self.model.blocks),
                uptrain.random_sources,
                self.config.train.seed,
                step,
                owners_only=uptrain.random_sources_from == "owners",
            )
        if uptrain.curriculum_steps:
            set_progress(self.model, step, uptrain.curriculum_steps, uptrain.curriculum_order)
        parts = self.parts(batch)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1
        self.loss_sum = self.loss_sum + parts["next_token"].detach()
        self.loss_count += 1
        return parts["objective"]

    def objective(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`objective`, which is minimised, and its unweighted parts: `next_token`, `kl`, `hidden`, `attention`."""
        weights = self.config.uptrain.loss
        if not self.config.uptrain.needs_teacher:
            loss = self.loss(batch)
            return {"objective": weights.next_token * loss, "next_token": loss}
        inputs = (batch["input_ids"], batch.get("positions"), batch.get("document_ids"))
        teacher, all_layers = self._teacher[0], weights.hidden > 0 and weights.hidden_layers == "all"
        streams: list[Tensor] | None = [] if weights.attention else None
        with torch.no_grad():
            theirs = hidden_states(teacher, inputs, all_layers, streams)
        mine = hidden_states(self.model, inputs, all_layers)
        target = Target(theirs[-1], teacher.head.weight, weights.temperature, weights.kl, weights.next_token)
        distilled = Distilled(*self.model.head(mine[-1], batch["labels"], target=target))
        parts = {"objective": distilled.loss, "next_token": distilled.next_token, "kl": distilled.kl}
        if weights.hidden:
            parts["hidden"] = hidden_difference(mine, theirs)
            parts["objective"] = parts["objective"] + weights.hidden * parts["hidden"]
        if streams is not None:
            with torch.no_grad():
                wanted = attention_outputs(teacher, streams, *inputs)
            parts["attention"] = hidden_difference(attention_outputs(self.model, streams, *inputs), wanted)
            parts["objective"] = parts["objective"] + weights.attention * parts["attention"]
        return parts

    def training_metrics(self) -> dict[str, float]:
        """Means of the objective and its parts since the last call, except next-token cross-entropy: `train/loss`."""
        means = {
            f"train/{name}": torch.as_tensor(total, device=self.device) / max(self._count, 1)
            for name, total in self._sums.items()
            if name != "next_token"
        }
        self._sums, self._count = {}, 0
        return {tag: float(self.trainer.strategy.reduce(mean, reduce_op="mean")) for tag, mean in means.items()}

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

    def validation_metrics(self) -> dict[str, float]:
        """The teacher's loss, the student's initial loss, and recovery. The first validation measures the teacher."""
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
        return super().validation_metrics() | values

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy):
            strategy.split_extra = self.split_extra
            strategy.has_extra = any(_is_extra(name) for name, _ in self.model.named_parameters())

    def plain_weights(self) -> dict[str, Tensor]:
        return self.split_extra(self.model.state_dict())[0]

    def split_extra(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split all weights into the student's, low-rank updates merged, and extra tensors that only resuming needs."""
        student = {name: tensor for name, tensor in weights.items() if not _is_extra(name)}
        extra = {name: tensor for name, tensor in weights.items() if _is_extra(name)}
        for name, layer in lora_layers(self.model).items():
            extra[f"{name}.weight"] = weights[f"{name}.weight"]
            a, b = (weights[f"{name}.{part}"] for part in (LORA_A, LORA_B))
            student[f"{name}.weight"] = layer.merge(weights[f"{name}.weight"], a, b).detach()
        return student, extra

    def unlogged_sums(self) -> dict[str, Tensor | float]:
        parts = {_PART + name: total for name, total in self._sums.items()}
        return super().unlogged_sums() | {_PARTS: self._count} | parts

    def set_unlogged_sums(self, sums: dict[str, float]) -> None:
        super().set_unlogged_sums(sums)
        self._count = int(sums.get(_PARTS, 0))
        self._sums = {name.removeprefix(_PART): total for name, total in sums.items() if name.startswith(_PART)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_REFERENCE] = dict(self.reference)
        if isinstance(self.trainer.strategy, ZeroStrategy):  # it writes weights to separate files
            return
        state = checkpoint["state_dict"]
        student, extra = self.split_extra({name.removeprefix(_MODEL): tensor for name, tensor in state.items()})
        state.clear()
        state.update({_MODEL + name: tensor for name, tensor in student.items()})
        state.update({_EXTRA + name: tensor for name, tensor in extra.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reference = dict(checkpoint[_REFERENCE])
        self._release_teacher()
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith(_EXTRA)]:
            state[_MODEL + name.removeprefix(_EXTRA)] = state.pop(name)


def _is_extra(name: str) -> bool:
    """Whether a tensor belongs to training only and not to the student."""
    return any(part in (LORA_A, LORA_B, OWN) for part in name.split("."))


def hidden_states(
    model: TracedDecoder,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    all_layers: bool,
    streams: list[Tensor] | None = None,
) -> list[Tensor]:
    """The input of the head, preceded by the output of every layer with `all_layers`; (B, T, d_model) each.

    The input of every layer is appended to `streams`.
    """
    if not all_layers:
        return [model.hidden(*inputs, states=streams)]
    with model.record_layers() as outputs:
        last = model.hidden(*inputs, states=streams)
    return [*outputs, last]


def draw_route(n_layers: int, chance: float, seed: int, step: int, *, owners_only: bool = True) -> list[int]:
    """For each layer, the layer that it reads in optimizer step `step`; equal on every device and after resuming.

    With probability `chance` a layer, except for the lowest, reads one of the layers below it, drawn uniformly from all
    of them (R-CLA of Stochastic KV Routing, arXiv 2604.22782) or, with `owners_only`, from those that read themselves.
    """
    draw = random.Random(f"{seed} {step}")
    route, owners = [0], [0]
    for i in range(1, n_layers):
        if draw.random() < chance:
            route.append(draw.choice(owners) if owners_only else draw.randrange(i))
        else:
            route.append(i)
            owners.append(i)
    return route
