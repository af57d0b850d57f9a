"""The training and validation step."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch import Tensor

from cllm.config import Config
from cllm.data.recall import GROUPS, recall_distance, recall_sums
from cllm.kernels.cross_entropy import IGNORE
from cllm.model.decoder import Decoder
from cllm.train.optim import Optimizer
from cllm.train.replay import Replay
from cllm.train.schedule import Schedule
from cllm.train.strategy import ZeroStrategy

_UNLOGGED = "unlogged"


def step_is_complete(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether micro-batch `batch_idx`, as hooks get it, is the last one of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class TrainingModule(lightning.LightningModule):
    """A decoder and its training step.

    Batches are mappings of `input_ids` and `labels` (B, T) int64 and, with document masks, `positions` and
    `document_ids` (B, T). Nothing here waits for the device: losses stay tensors until a callback reads them.
    """

    def __init__(self, model: Decoder, config: Config, optimizer: Optimizer, validation_names: list[str]):
        super().__init__()
        self.model, self.config, self.optimizer = model, config, optimizer
        self.validation_names = validation_names
        self.loss_sum: Tensor | float = 0.0
        """Losses since a callback last took them: the sum in nats over scored tokens with document masks, otherwise the
        sum of micro-batch means."""
        self.loss_count: Tensor | int = 0
        """Number of terms in `loss_sum`: scored tokens or micro-batches."""
        self.gradient_norm: Tensor | float = 0.0
        """Norm of the last step's gradient, before clipping."""
        self.skipped_steps: Tensor | int = 0
        """Steps of the run that were skipped because their gradient was not finite. DeepSpeed counts its own."""
        self.replay: Replay | None = None
        """The graph of a step, if it is one."""
        self._scores: dict[int, Tensor] = {}
        self._recall: dict[int, Tensor] = {}

    def loss(self, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
        return self.model.loss(
            batch["input_ids"],
            batch["labels"],
            batch.get("positions"),
            batch.get("document_ids"),
            reduction=reduction,
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a micro-batch. With document masks, its nats divided by all its tokens, scored or not.

        Micro-batches then differ in their number of scored tokens. Divided by a constant instead, every scored token of
        a step has the same weight, whatever the number of micro-batches and devices.
        """
        parts = self.parts(batch)
        self.loss_sum = self.loss_sum + parts["loss"].detach()
        self.loss_count = self.loss_count + ((batch["labels"] != IGNORE).sum() if "document_ids" in batch else 1)
        return parts["objective"]

    def objective(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a micro-batch: `objective`, which is minimised, and others for the log; here `loss`."""
        masked = "document_ids" in batch
        loss = self.loss(batch, "sum" if masked else "mean")
        return {"objective": loss / batch["labels"].numel() if masked else loss, "loss": loss}

    def parts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`objective` of a micro-batch, replayed if the step is a CUDA graph. The next call may overwrite it."""
        return self.objective(batch) if self.replay is None else self.replay(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; a replayed step has its gradients already."""
        if self.replay is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.replay.attach_gradients()

    def plain_weights(self) -> dict[str, Tensor]:
        """The weights that a checkpoint of this step has, by their names in a decoder."""
        return self.model.state_dict()

    def take_training_loss(self) -> Tensor:
        """(2,) fp32 on the module's device: the sum of losses since the last call, and their number."""
        taken = torch.stack([torch.as_tensor(part, device=self.device) for part in (self.loss_sum, self.loss_count)])
        self.loss_sum, self.loss_count = 0.0, 0
        return taken

    def on_validation_epoch_start(self) -> None:
        sets = range(len(self.validation_names))
        self._scores = {n: torch.zeros(2, dtype=torch.float64) for n in sets}
        self._recall = {n: torch.zeros(1 + len(GROUPS), 2, dtype=torch.float64) for n in sets}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self.loss(batch, "none")
        scored = batch["labels"] != IGNORE
        score = torch.stack((losses.double().sum(), scored.sum()))
        self._scores[dataloader_idx] = self._scores[dataloader_idx].to(score.device) + score
        distance = recall_distance(batch["input_ids"], batch["labels"], batch.get("document_ids"))
        sums = recall_sums(losses.view_as(distance), distance, scored)
        self._recall[dataloader_idx] = self._recall[dataloader_idx].to(sums.device) + sums

    def validation_scores(self) -> dict[str, tuple[float, int]]:
        """For each validation set, the sum in nats over its scored tokens and their number, over all devices."""
        scores = {}
        for n, name in enumerate(self.validation_names):
            total = self.trainer.strategy.reduce(self._scores[n].to(self.device), reduce_op="sum")
            nats, scored = total.tolist()
            scores[name] = (nats, int(scored))
        return scores

    def configure_optimizers(self) -> Any:
        config = self.config.optim
        optimizer = self.optimizer.build(self.optimizer.groups(self.model, config), config)
        schedule = Schedule(optimizer, self.config.train.steps, config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- checkpoints: sums since the last row of metrics -------------------------------------------------------------

    def unlogged_sums(self) -> dict[str, Tensor | float]:
        """This process's sums since the last row of metrics, by name."""
        return {"loss_sum": self.loss_sum, "loss_count": self.loss_count}

    def set_unlogged_sums(self, sums: dict[str, float]) -> None:
        """Continue from sums that `unlogged_sums` has returned."""
        self.loss_sum, self.loss_count = sums.get("loss_sum", 0.0), int(sums.get("loss_count", 0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums of all processes, {name: [value of each process]}. Collective."""
        sums = self.unlogged_sums()
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in sums.values()])
        every = self.trainer.strategy.all_gather(mine).reshape(-1, len(sums))  # (processes, sums)
        checkpoint[_UNLOGGED] = dict(zip(sums, every.T.tolist(), strict=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load this process's sums, or on the first process all of them if the number of processes has changed."""
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        sums = {}
        for name, values in checkpoint.get(_UNLOGGED, {}).items():  # missing in earlier checkpoints
            first = sum(values) if rank == 0 else 0.0
            sums[name] = values[rank] if len(values) == processes else first
        self.set_unlogged_sums(sums)

    # ---- more metrics, for the rows that `Metrics` writes ------------------------------------------------------------

    def training_metrics(self) -> dict[str, float]:
        """Further values of a training row. Collective."""
        return {}

    def validation_metrics(self) -> dict[str, float]:
        """Further values of a validation row: losses of the associative-recall slices. Collective."""
        values = {}
        for n, name in enumerate(self.validation_names):
            sums = self.trainer.strategy.reduce(self._recall[n].to(self.device), reduce_op="sum")
            nats, tokens = sums[1:].sum(dim=0).tolist()
            values["val/ar_loss" if n == 0 else f"val-{name}/ar_loss"] = nats / tokens if tokens else math.nan
        return values

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm, keep the norm for the log, and skip the step if the norm is not finite.

        DeepSpeed does all of it itself, and Lightning then calls this after every micro-batch.
        """
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return
        limit = self.config.optim.grad_clip
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit or float("inf"))
        skip = 1.0 - self.gradient_norm.isfinite().float()
        self.optimizer.skip_step(optimizer, skip)
        self.skipped_steps = self.skipped_steps + skip
