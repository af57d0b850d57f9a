"""Inputs, keys and values of the teacher's layers on calibration text, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.model.context import Context
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV, OwnMixedKV, RopeTables
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
    context: Context
    """The positions of the batch, with their RoPE tables."""
    _moments: dict[int, Tensor] = field(default_factory=dict)

    def rope(self, i: int) -> RopeTables:
        """RoPE tables of the teacher's layer `i` for the positions of the batch."""
        return self.context.ropes(self.teacher.config.rope.is_windowed(self.teacher.plan, i))

    def normed(self, i: int) -> Tensor:
        """The normalised input of layer `i`, (B T, d_model)."""
        return block_of(self.teacher, i).attention_norm(self.inputs[i]).flatten(0, 1)

    def slot(self, i: int, owner: OwnKV, *, rotated: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values (G, D, B T) that `owner` projects from the input of layer `i`, after or before RoPE."""
        residual = self.inputs[i]
        rope = self.rope(i) if rotated else unrotated
        slot = owner(residual, block_of(self.teacher, i).attention_norm(residual), rope)
        return _by_head(slot)

    def before_rope(self, i: int, owner: OwnKV) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and before the gain of their norm, and values, (G D, B T) fp64; arguments as in `slot`."""
        k, v = self.slot(i, owner, rotated=False)
        k = k if owner.k_norm is None else k / owner.k_norm.weight[:, None]
        return k.double().flatten(0, 1), v.double().flatten(0, 1)

    def projected(self, student: Decoder, j: int) -> Tensor:
        """The input (B T, d_model) of the projections of owner `j` of `student`, if all lower layers are the teacher's.

        An owner that projects the output of another layer gets the student's norm of it. A bias is one more input: 1.
        """
        residual, normed = self._arguments(student, j)
        owner: Any = block_of(student, j).attention.owner
        x = owner.projected(residual, normed).flatten(0, 1)
        return torch.cat((x, x.new_ones(len(x), 1)), dim=1) if student.config.kv_bias else x

    def slots(self, student: Decoder, owners: Iterable[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys after RoPE and values (G, D, B T) in slots of `student` as readers see them, as in `projected`."""
        made: dict[int, Slot] = {}
        for j in owners:
            self._write(student, j, made)
        return {j: _by_head(made[j]) for j in owners}

    def second_moment(self, student: Decoder, j: int) -> Tensor:
        """Σ x xᵀ over tokens of `projected`, fp64, shared by all owners that project the output of one layer."""
        stream = student.plan.owned(j).input
        if stream is None:
            x = self.projected(student, j).double()
            return x.T @ x
        if stream not in self._moments:
            x = self.projected(student, j).double()
            self._moments[stream] = x.T @ x
        return self._moments[stream]

    def _arguments(self, student: Decoder, j: int) -> tuple[Tensor, Tensor]:
        """Arguments of the owner module of layer `j`: the residual stream and its norm."""
        stream = student.plan.owned(j).input
        residual = self.inputs[j]
        normed = block_of(self.teacher, j).attention_norm(residual)
        return (residual if stream is None else student.stream_norms[str(stream)](self.inputs[stream + 1])), normed

    def _write(self, student: Decoder, j: int, made: dict[int, Slot]) -> Slot:
        """The slot of `j` as readers see it, added to `made` with those that it mixes."""
        if j not in made:
            attention, plan = block_of(student, j).attention, student.plan
            assert attention.owner is not None
            rope = self.context.ropes(student.config.rope.is_windowed(plan, j))
            slot = attention.owner(*self._arguments(student, j), rope)
            if isinstance(attention.owner, OwnMixedKV):
                slot = attention.owner.mix(slot, [self._write(student, lower, made) for lower in plan.mixes(j)])
            made[j] = attention.as_read(slot, self.context, slot.v.dtype)
        return made[j]


def _by_head(slot: Slot) -> tuple[Tensor, Tensor]:
    k, v = (t.flatten(0, 1).permute(1, 2, 0) for t in slot[:2])
    return k, v


def unrotated(dim: int) -> tuple[Tensor, Tensor]:
    """RoPE tables that rotate nothing."""
    return torch.ones(()), torch.zeros(())


def inputs_of(batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token ids, positions and document ids of a batch, (B, T) each, on `device`; the latter two may be missing."""
    positions, documents = (
        None if (t := batch.get(name)) is None else t.to(device) for name in ("positions", "document_ids")
    )
    return batch["input_ids"].to(device), positions, documents


@torch.no_grad()
def observe(teacher: TracedDecoder, batches: Batches) -> Iterator[Observed]:
    """Run the teacher over each batch, on its device. Nothing is kept between batches."""
    device = teacher.embed.weight.device
    meter = ProgressMeter(len(batches), "calibration", "batch", shown=getattr(rank_zero_only, "rank", 0) == 0)
    with meter:
        for batch in batches:
            ids, positions, documents = inputs_of(batch, device)
            inputs: list[Tensor] = []
            teacher.hidden(ids, positions, documents, states=inputs)
            at = torch.arange(ids.shape[1], device=device)[None] if positions is None else positions
            yield Observed(teacher, inputs, Context(teacher.config.rope, at))
            meter.update()
