"""MiniCache (arXiv 2405.14366): neighbouring layers share directions and keep their own lengths."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Exact, unstack
from cllm.posthoc.grown import Joiner
from cllm.posthoc.method import Codable
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@dataclass(frozen=True)
class Merged(Code):
    """One slot of a pair: shared directions times the slot's own lengths, and the rows that were not merged."""

    direction: Code
    """(B, n, G · D): shared by the pair."""
    length: Tensor
    """(B, n, G)."""
    index: Tensor
    """int32 (B, m): indices of the unmerged rows among all n · G, padded with n · G. Shared by the pair."""
    rows: Code
    """(B, m, D)."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        direction, kept = self.direction.decode().unflatten(2, (self.length.shape[2], -1)), self.rows.decode()
        merged = (direction * self.length[..., None]).flatten(1, 2)
        merged = torch.cat((merged, merged[:, :1]), dim=1)  # the extra row receives the padding of `index`
        index = self.index.long()[..., None].expand_as(kept)
        rows = merged.scatter(1, index, kept)[:, :-1]
        return rows.unflatten(1, self.length.shape[1:]).flatten(2).unflatten(-1, self.width)


def slerp(one: Tensor, other: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Directions (..., D) between the unit vectors `one` (t = 0) and `other` (t = 1), and the angles Ω (...).

    e = sin((1 - t) Ω) / sin Ω · one + sin(t Ω) / sin Ω · other,    Ω = arccos(one · other)      (MiniCache, eq. 3)
    """
    cosine = (one * other).sum(-1).clamp(-1, 1)
    # arccos is inaccurate near 1; this formula with half angles is not
    angle = 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))
    sine = angle.sin()
    near = (sine.abs() < 1e-4) & (cosine > 0)
    safe = sine.where(~near, torch.ones_like(sine)).clamp(min=1e-6)
    first = torch.where(near, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(sine, t), (t * angle).sin() / safe)
    return first[..., None] * one + second[..., None] * other, angle


@register(
    "minicache",
    summary="from the middle slot up, pairs of slots share directions and keep lengths",
    sweep=("minicache",),
)
class MiniCache(Codable):
    """MiniCache: from the middle layer up, pairs of layers (l - 1, l) store one direction for both,

        x'_l = ‖x_l‖ e,    x'_{l-1} = ‖x_{l-1}‖ e,    e from spherical interpolation of the two directions (eq. 2, 3)

    for every head of every token. Pairs that are far apart are not merged: those with an angle
    Ω > Ω_max - γ (Ω_max - Ω_min), the extremes taken over a sequence. RoPE rotates both of a pair by the same angle, so
    keys are merged after RoPE. A quantiser after + codes directions, and the slots that are not merged, like keys or
    values; and kept rows like values, if there are enough of them.
    """

    t: float = Field(0.6, ge=0, le=1)
    """Position of the shared direction between the lower layer's (0) and the upper layer's (1)."""
    gamma: float = Field(0.05, ge=0, le=1)
    """γ: the share of the range of angles in which pairs are not merged."""
    start: int | None = Field(None, ge=0)
    """First slot that is merged, counted from 0 among the slots; null: the middle one."""

    @property
    def chooses_for_batch(self) -> bool:
        return self._coder is not None  # codes the rows that are not merged if there are enough

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return self._merge(keys), [None] * len(keys.slots) if values is None else self._merge(values)

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """Pairs of a block are merged like those of a prompt, with the angles' extremes in the block."""
        no_values: Codes = [None] * len(keys.slots)
        return self._absorb(keys, codes[0]), no_values if values is None else self._absorb(values, codes[1])

    def _absorb(self, tensors: SlotTensors, codes: Sequence[Code]) -> Codes:
        joined: Codes = [None] * len(codes)
        plain = self.model_copy()
        plain._coder = None
        blocks, joiner = plain._merge(tensors), Joiner()
        for i, (code, block) in enumerate(zip(codes, blocks, strict=True)):
            if isinstance(code, Merged) and isinstance(block, Merged):
                upper = i > 0 and isinstance(before := codes[i - 1], Merged) and before.index is code.index
                lower = joined[i - 1] if upper else None
                joined[i] = self._extend(code, block, lower, joiner, tensors)
            elif self._coder is not None:
                width = tuple(tensors.data[i].shape[2:])
                joined[i] = self._coder.extend(code, tensors.flat(i), tensors.kind, tensors.dtype, width)
        return joined

    def _extend(self, code: Merged, block: Merged, lower: Code | None, joiner: Joiner, tensors: SlotTensors) -> Merged:
        """`code` with `block` behind it; the upper slot of a pair shares the directions and indices of `lower`."""
        length = joiner.cat(code.length, block.length)
        if isinstance(lower, Merged):
            direction, index = lower.direction, lower.index
        else:
            direction = self.extended(code.direction, block.direction.decode().float(), tensors.dtype, tensors.kind)
            before, all_rows = code.length[0].numel(), length[0].numel()
            old = code.index.masked_fill(code.index == before, all_rows)
            new = block.index.masked_fill(block.index == block.length[0].numel(), all_rows - before) + before
            index = torch.cat((old, new), dim=1)
        if isinstance(code.rows, Exact):  # too few to be coded
            rows: Code = joiner.join(code.rows, block.rows)
        else:
            rows = self.extended(code.rows, block.rows.decode().float(), tensors.dtype, "v")
        return Merged(direction, length, index, rows, code.width)

    def _kept(self, angle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Mask of the pairs that are not merged, for `angle` (B, n · G) between `low` and `high` (B, 1)."""
        return angle > high - self.gamma * (high - low)

    def _merge(self, tensors: SlotTensors) -> Codes:
        codes: Codes = [None] * len(tensors.slots)
        start = len(tensors.slots) // 2 if self.start is None else self.start
        lower = [i for i in range(start, len(codes) - 1, 2) if tensors.data[i].shape == tensors.data[i + 1].shape]
        merged = [pair for stack in self._stacks(tensors, lower) for pair in self._merge_pairs(*stack)]
        for i, pair in zip(lower, merged, strict=True):
            codes[i], codes[i + 1] = pair
        if not lower:
            shapes = [data.shape for data in tensors.data]
            pairs = [i for i, (one, other) in enumerate(itertools.pairwise(shapes)) if one == other]
            allowed = f"start up to {pairs[-1]}" if pairs else "models with two neighbouring slots of one shape"
            raise UserError(
                f"{self.name}: no two neighbours of one shape from slot {start} on, of {len(shapes)}; "
                f"allowed: {allowed}"
            )
        if self._coder is not None:
            for i in (i for i, code in enumerate(codes) if code is None):
                width = tuple(tensors.data[i].shape[2:])
                codes[i] = self._coder.code(tensors.flat(i, padding="repeat"), tensors.kind, tensors.dtype, width)
        return codes

    @staticmethod
    def _stacks(tensors: SlotTensors, lower: Sequence[int]) -> Iterator[tuple[SlotTensors, SlotTensors, int]]:
        """The lower and the upper slots of pairs, those of neighbouring pairs together, and how many pairs."""
        one, other = (
            dataclasses.replace(
                tensors, slots=tuple(tensors.slots[i] for i in of), data=tuple(tensors.data[i] for i in of)
            )
            for of in (lower, [i + 1 for i in lower])
        )
        for (members, lower_stack), (_, upper_stack) in zip(one.stacks(), other.stacks(), strict=True):
            yield lower_stack, upper_stack, len(members)

    def _merge_pairs(self, lower: SlotTensors, upper: SlotTensors, pairs: int) -> list[tuple[Merged, Merged]]:
        """The codes of `pairs` pairs of slots, of which `lower` and `upper` are stacks."""
        width = tuple(lower.data[0].shape[2:])
        both = [
            tensors.data[0].flatten(2).float().unflatten(-1, (-1, width[-1])) for tensors in (lower, upper)
        ]  # pairs · B, n, G, D
        lengths = [x.norm(dim=-1) for x in both]
        units = [x / length.clamp(min=1e-30)[..., None] for x, length in zip(both, lengths, strict=True)]
        direction, angle = slerp(units[0], units[1], self.t)
        heads, batch = angle.shape[2], len(angle)
        angle = angle.flatten(1)
        is_text = torch.ones_like(angle, dtype=torch.bool)
        if lower.is_text is not None:
            is_text = lower.is_text.repeat_interleave(heads, dim=1)
        low = angle.masked_fill(~is_text, math.inf).amin(1, keepdim=True)
        high = angle.masked_fill(~is_text, -math.inf).amax(1, keepdim=True)
        kept = self._kept(angle, low, high) & is_text
        size = angle.shape[1]
        counts = kept.sum(1).unflatten(0, (pairs, -1)).amax(1).tolist()
        index = torch.arange(size, device=angle.device).expand(batch, -1).masked_fill(~kept, size)
        index = index.sort(dim=1).values.unflatten(0, (pairs, -1))  # pairs, B, size
        text = lower.without_padding(direction.flatten(2), "repeat")
        directions = unstack(self._stored(text, lower.kind, lower.dtype), pairs)
        sides = [
            (x.flatten(1, 2).unflatten(0, (pairs, -1)), length.to(lower.dtype).unflatten(0, (pairs, -1)))
            for x, length in zip(both, lengths, strict=True)
        ]
        merged: list[tuple[Merged, Merged]] = []
        for pair, count in enumerate(counts):
            own = index[pair, :, :count]
            stored_index = own.to(torch.int32).contiguous()
            take = own.clamp(max=size - 1)[..., None].expand(-1, -1, width[-1])
            few = self._coder is None or not self._coder.coded_rows(count)
            one, other = (
                Merged(
                    directions[pair],
                    length[pair].clone(),
                    stored_index,
                    Exact(rows.to(lower.dtype)) if few else self._stored(rows, "v", lower.dtype),
                    width,
                )
                for rows, length in ((x[pair].gather(1, take), length) for x, length in sides)
            )
            merged.append((one, other))
        return merged

    def _stored(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype) -> Code:
        if self._coder is None:
            return Exact(rows.to(dtype, copy=True))
        return self._coder.code(rows, kind, dtype, (rows.shape[2],))


@register(
    "minicache_xkv",
    summary="as xKV's repository runs MiniCache: the most similar pairs stay exact",
    sweep=("minicache_xkv",),
)
class MiniCacheXKV(MiniCache):
    """The variant that xKV's repository runs as MiniCache: t = 0.5, and the most **similar** pairs are not merged,
    those with Ω <= Ω_min + γ (Ω_max - Ω_min)."""

    t: float = Field(0.5, ge=0, le=1)
    """Position of the shared direction between the lower layer's (0) and the upper layer's (1)."""

    def _kept(self, angle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return angle <= low + self.gamma * (high - low)
