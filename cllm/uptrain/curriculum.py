"""From own keys and values to shared ones: a layer that owns nothing reads (1 - λ) own + λ shared, λ from 0 to 1.

The layer's own projections are the teacher's, frozen. They are not part of the student, and are not computed once λ
is 1. Evaluation always reads as the plan says, so val/loss is the loss of the final model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cllm.cache.slot import Slot
from cllm.cache.stores import Store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.context import Context
from cllm.model.decoder import Decoder
from cllm.model.fusion import ComplexRead, MatrixRead
from cllm.model.sources import FusedRead, OwnKV, Reader, SharedRead
from cllm.plan.fuse import Fuse
from cllm.plan.kinds import Share
from cllm.plan.plan import KVPlan
from cllm.plan.registry import Builders

OWN = "curriculum_own"
"""The name of the module with a layer's own projections."""


class MixedIn(nn.Module):
    """A part of a layer that changes over to the plan's during training."""

    share: Tensor
    """(1,) fp32: λ."""
    over: bool
    """Whether λ has reached 1."""

    def mix_in(self) -> None:
        """Begin at λ = 0."""
        self.register_buffer("share", torch.zeros(1), persistent=False)
        self.over = False

    def set_share(self, share: float) -> None:
        """Set λ."""
        self.share.fill_(share)
        self.over = share == 1.0


blending_module = Builders("module for a curriculum")
"""`(read, made, n_slots, n_kv_heads, head_dim)`: the module `made` of a read, with a layer's own slot mixed in."""


class Blending(Reader):
    """A reader, its base after this one, mixed with the layer's own slot if that follows the slots of the plan."""

    share: Tensor
    """(1,) fp32: λ."""
    n_slots: int
    """Slots of the plan."""

    def blend(self, n_slots: int) -> None:
        """Mix from here on."""
        self.n_slots = n_slots
        self.register_buffer("share", torch.zeros(1), persistent=False)

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        shared = super().forward(slots)
        if len(slots) == self.n_slots:
            return shared
        return torch.lerp(getattr(slots[-1], self.part).float(), shared.float(), self.share.float()).to(shared.dtype)


class BlendingShared(Blending, SharedRead):
    """`SharedRead`, mixed."""


class BlendingFused(Blending, FusedRead):
    """`FusedRead`, mixed."""


class BlendingComplex(Blending, ComplexRead):
    """`ComplexRead`, mixed."""


class BlendingMatrix(Blending, MatrixRead):
    """`MatrixRead`, mixed."""


@blending_module(Share)
def _blending_shared(read: Share, made: Reader, n_slots: int, n_kv_heads: int, head_dim: int) -> Blending:
    module = BlendingShared(made.places[0], made.part)
    module.blend(n_slots)
    return module


@blending_module(Fuse)
def _blending_fused(read: Fuse, made: Reader, n_slots: int, n_kv_heads: int, head_dim: int) -> Blending:
    kinds: dict[str, Any] = {"complex": BlendingComplex, "matrix": BlendingMatrix}
    module = kinds.get(read.granularity, BlendingFused)(read, made.places, made.part, n_kv_heads, head_dim)
    module.blend(n_slots)
    return module


class BlendingAttention(Attention, MixedIn):
    """Attention of a layer that owns nothing; in training, its own keys and values are mixed in."""

    curriculum_own: OwnKV

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, own: OwnKV):
        super().__init__(config, plan, layer)
        n_slots, kv_heads = len(plan.reads_others(layer)), plan.source(layer).kv_heads
        self.keys, self.values = (
            blending_module.of(read)(read, made, n_slots, kv_heads, self.head_dim)
            for read, made in ((plan.keys(layer), self.keys), (plan.values(layer), self.values))
        )
        self.curriculum_own = own.train().requires_grad_(False)
        self.mix_in()

    def set_share(self, share: float) -> None:
        """Set λ here and in the reads of keys and values."""
        super().set_share(share)
        for read in (self.keys, self.values):
            assert isinstance(read, Blending)
            read.share.fill_(share)

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None
    ) -> tuple[Slot | None, Sequence[Slot]]:
        own, read = super().write(residual, normed, slots, context, store)
        if self.over or not self.training:
            return own, read
        return own, (*read, self.curriculum_own(residual, normed, context.ropes(self.reads_windowed)))


def add_curriculum(model: Decoder, owners: Mapping[int, OwnKV]) -> None:
    """Mix own and shared slots in the layers of `model` that own nothing. Call it before weights are set.

    Args:
        model: the student.
        owners: each layer's own projections.

    Raises:
        UserError: if every layer owns a slot, or a layer that owns nothing reads latents or a recurrent state.
    """
    plan = model.plan
    layers = plan.borrowers
    if not layers or not all(plan.source(i).is_plain for i in layers):
        raise UserError(
            "uptrain.curriculum_steps: no layer of model.kv moves from keys and values of its own to those of others; "
            "allowed: 0"
        )
    for i in layers:
        model.blocks[i].attention = BlendingAttention(model.config, plan, i, owners[i])


def set_progress(model: Decoder, step: int, steps: int, order: str = "together") -> float:
    """Set λ of every layer for optimizer step `step` (from 0) of a curriculum of `steps`.

    Args:
        order: together: all layers change over all steps. top or bottom: one layer after the other, from that end, each
            over its part of the steps.

    Returns:
        The mean of λ over layers.
    """
    mixed = [block.attention for block in model.blocks if isinstance(block.attention, MixedIn)]
    if order == "top":
        mixed.reverse()
    progress = min(step / steps, 1.0)
    shares = [progress] * len(mixed)
    if order != "together":
        shares = [min(max(progress * len(mixed) - n, 0.0), 1.0) for n in range(len(mixed))]
    for attention, share in zip(mixed, shares, strict=True):
        attention.set_share(share)
    return sum(shares) / len(shares)
