"""Inputs, keys and values of the teacher's layers on calibration text, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from cllm.model.context import Context
from cllm.model.sources import OwnKV, RopeTables
from cllm.progress import ProgressMeter
from cllm.uptrain.decoder import TracedDecoder, block_of

Batches = Sequence[dict[str, Tensor]]
"""Each has `input_ids` (B, T) int64 and, with document masks, `positions` and `document_ids` (B, T)."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The teacher's layers on one batch."""

    teacher: TracedDecoder
    inputs: list[Tensor]
    """The residual stream (B, T, d_model) before each layer."""
    rope: RopeTables

    def normed(self, i: int) -> Tensor:
        """The normalised input of layer `i`, (B T, d_model)."""
        return block_of(self.teacher, i).attention_norm(self.inputs[i]).flatten(0, 1)

    def slot(self, i: int, owner: OwnKV, *, rotated: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values (G, D, B T) that `owner` projects from the input of layer `i`, after or before RoPE."""
        residual = self.inputs[i]
        slot = owner(residual, block_of(self.teacher, i).attention_norm(residual), self.rope if rotated else unrotated)
        k, v = (t.flatten(0, 1).permute(1, 2, 0) for t in slot[:2])
        return k, v


def unrotated(dim: int) -> tuple[Tensor, Tensor]:
    """RoPE tables that rotate nothing."""
    return torch.ones(()), torch.zeros(())


@torch.no_grad()
def observe(teacher: TracedDecoder, batches: Batches) -> Iterator[Observed]:
    """Run the teacher over each batch, on its device. Nothing is kept between batches."""
    device = teacher.embed.weight.device
    meter = ProgressMeter(len(batches), "calibration", "batch", shown=getattr(rank_zero_only, "rank", 0) == 0)
    with meter:
        for batch in batches:
            ids, positions, documents = (
                None if (t := batch.get(name)) is None else t.to(device)
                for name in ("input_ids", "positions", "document_ids")
            )
            assert ids is not None
            inputs: list[Tensor] = []
            teacher.hidden(ids, positions, documents, states=inputs)
            at = torch.arange(ids.shape[1], device=device)[None] if positions is None else positions
            yield Observed(teacher, inputs, Context(teacher.config.rope, at).rope)
            meter.update()
