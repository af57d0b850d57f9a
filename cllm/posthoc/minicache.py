"""MiniCache (arXiv 2405.14366): neighbouring layers share directions and keep lengths of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Codable, Code, Exact, Part


@dataclass(frozen=True)
class Merged(Code):
    """One of two slots: shared directions times its own lengths, and rows that were not merged."""

    direction: Code
    """(B, n, G · D): shared by the pair."""
    length: Tensor
    """(B, n, G)."""
    index: Tensor
    """int32 (B, m): places, among n · G, of the rows kept; n · G where a sequence has fewer. Shared by the pair."""
    rows: Code
    """(B, m, D)."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        direction, kept = self.direction.decode().unflatten(2, (self.length.shape[2], -1)), self.rows.decode()
        merged = (direction * self.length[..., None]).flatten(1, 2)
        merged = torch.cat((merged, merged[:, :1]), dim=1)  # a last row takes what only fills `rows` up
        places = self.index.long()[..., None].expand_as(kept)
        rows = merged.scatter(1, places, kept)[:, :-1]
        return rows.unflatten(1, self.length.shape[1:]).flatten(2).unflatten(-1, self.width)


def slerp(one: Tensor, other: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Directions (..., D) between the unit vectors `one` (t = 0) and `other` (t = 1), and the angles Ω (...).

    e = sin((1 - t) Ω) / sin Ω · one + sin(t Ω) / sin Ω · other,    Ω = arccos(one · other)      (MiniCache, eq. 3)
    """
    cosine = (one * other).sum(-1).clamp(-1, 1)
    # arccos has no accuracy near 1: the half angle has
    angle = 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))
    sine = angle.sin()
    near = (sine.abs() < 1e-4) & (cosine > 0)
    safe = sine.where(~near, torch.ones_like(sine)).clamp(min=1e-6)
    first = torch.where(near, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(sine, t), (t * angle).sin() / safe)
    return first[..., None] * one + second[..., None] * other, angle


class MiniCache(Codable):
    """MiniCache: from the middle layer up, pairs of layers (l - 1, l) keep one direction for both,

        x'_l = ‖x_l‖ e,    x'_{l-1} = ‖x_{l-1}‖ e,    e from spherical interpolation of the two directions (eq. 2, 3)

    for every head of every token, and pairs that are far apart are kept unmerged: those with an angle
    Ω > Ω_max - γ (Ω_max - Ω_min), the extremes taken over a sequence. RoPE turns both of a pair alike, so keys are
    merged as they are stored. A quantiser after + codes directions, and the slots that are not merged, as it does keys
    and values; kept rows as values, where they are enough for it.
    """

    name: ClassVar[str] = "minicache"

    t: float = Field(0.6, ge=0, le=1)
    """Where between the lower layer (0) and the upper (1) the direction lies."""
    gamma: float = Field(0.05, ge=0, le=1)
    """γ: the share of the range of angles at which pairs are kept."""
    start: int | None = Field(None, ge=0)
    """The first slot that is merged, counted from 0 among the slots; null: the middle."""

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        return self._merge(keys), [None] * len(keys.slots) if values is None else self._merge(values)

    def _kept(self, angle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Which pairs stay as they are, of `angle` (B, n · G) between `low` and `high` (B, 1)."""
        return angle > high - self.gamma * (high - low)

    def _merge(self, part: Part) -> list[Code | None]:
        codes: list[Code | None] = [None] * len(part.slots)
        start = len(part.slots) // 2 if self.start is None else self.start
        for i in range(start, len(part.slots) - 1, 2):
            if part.data[i].shape == part.data[i + 1].shape:
                codes[i], codes[i + 1] = self._pair(part, i)
        if not any(codes):
            raise UserError(
                f"{self.name}: no two neighbours of one shape from slot {start} on, of {len(part.slots)}; allowed: "
                f"start up to {max(len(part.slots) - 2, 0)}"
            )
        if self._coder is not None:
            for i in (i for i, code in enumerate(codes) if code is None):
                width = tuple(part.data[i].shape[2:])
                codes[i] = self._coder.code(part.flat(i, padding="repeat"), part.kind, part.dtype, width)
        return codes

    def _pair(self, part: Part, place: int) -> tuple[Merged, Merged]:
        width = tuple(part.data[place].shape[2:])
        pair = [x.flatten(2).float().unflatten(-1, (-1, width[-1])) for x in part.data[place : place + 2]]  # B, n, G, D
        lengths = [x.norm(dim=-1) for x in pair]
        units = [x / length.clamp(min=1e-30)[..., None] for x, length in zip(pair, lengths, strict=True)]
        direction, angle = slerp(units[0], units[1], self.t)
        heads, batch = angle.shape[2], len(angle)
        angle = angle.flatten(1)
        text = torch.ones_like(angle, dtype=torch.bool)
        if part.text is not None:
            text = part.text.repeat_interleave(heads, dim=1)
        low = angle.masked_fill(~text, math.inf).amin(1, keepdim=True)
        high = angle.masked_fill(~text, -math.inf).amax(1, keepdim=True)
        kept = self._kept(angle, low, high) & text
        count, size = int(kept.sum(1).max()), angle.shape[1]
        index = torch.arange(size, device=angle.device).expand(batch, -1).masked_fill(~kept, size)
        index = index.sort(dim=1).values[:, :count]
        places = index.to(torch.int32).contiguous()
        directions = self._stored(part.without_padding(direction.flatten(2), "repeat"), part.kind, part.dtype)

        def merged(x: Tensor, length: Tensor) -> Merged:
            take = index.clamp(max=size - 1)[..., None].expand(-1, -1, width[-1])
            rows = x.flatten(1, 2).gather(1, take)
            few = self._coder is None or not self._coder.coded(count)
            rest = Exact(rows.to(part.dtype)) if few else self._stored(rows, "v", part.dtype)
            return Merged(directions, length.to(part.dtype), places, rest, width)

        return merged(pair[0], lengths[0]), merged(pair[1], lengths[1])

    def _stored(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype) -> Code:
        if self._coder is None:
            return Exact(rows.to(dtype, copy=True))
        return self._coder.code(rows, kind, dtype, (rows.shape[2],))


class MiniCacheXKV(MiniCache):
    """The variant that xKV's repository runs as MiniCache: t = 0.5, and kept are the most **similar** pairs, those with
    Ω <= Ω_min + γ (Ω_max - Ω_min)."""

    name: ClassVar[str] = "minicache_xkv"

    t: float = Field(0.5, ge=0, le=1)
    """Where between the lower layer (0) and the upper (1) the direction lies."""

    def _kept(self, angle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return angle <= low + self.gamma * (high - low)
