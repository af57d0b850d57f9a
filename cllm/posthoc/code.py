"""Stored forms of cached tensors.

Shapes: B batch, n compressed tokens, width the shape of one token in one tensor of a slot: (G, D) for G KV heads of D
channels, or (R,) for a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.kernels.rotate import rotate
from cllm.model.rope import apply_rope
from cllm.posthoc.landmarks import Landmarks
from cllm.posthoc.sinks import Sinks
from cllm.posthoc.tensor_tree import TensorTree

_STACKED = 2**24
"""Bytes up to which keys of several slots are rotated as one stack, which takes a copy, but few launches."""


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest normal number of both fp32, in which codes are computed, and `dtype`, in which scales are stored."""
    return max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)


class Code(TensorTree, ABC):
    """The stored form of one tensor (B, n, *width) of one slot."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The tensor (B, n, *width), in the dtype that the cache had."""

    def factors(self) -> tuple[Tensor, Tensor | None] | None:
        """A (B, n, r) and B (B, width, r), whose product A Bᵀ is what `decode` returns; None if not stored as such.

        B may be None for values, if A (B, n, width) is the tensor itself, which decode steps can read without B.
        """
        return None

    @property
    def has_factors(self) -> bool:
        """Whether `factors` is not None; codes that know it without computing them say so."""
        return self.factors() is not None

    @property
    def selects(self) -> bool:
        """Whether these are keys of which a decode step reads some only (`pages.py`)."""
        return False

    def read_flops(self) -> int:
        """Floating-point operations of the matrix products of `decode`, two for a multiplication and an addition."""
        if (factors := self.factors()) is None:
            return 0
        a, b = factors
        return 0 if b is None else 2 * a.numel() * b.shape[1]


Codes = list[Code | None]
"""One code per slot; None: the tensor is stored as it is."""
SomeCode = TypeVar("SomeCode", bound=Code)


def unstack(code: SomeCode, slots: int) -> list[SomeCode]:
    """The codes of `slots` slots, one after the other in the batch of `code`, each with memory of its own."""
    if slots == 1:
        return [code]
    size = len(next(code.tensors())) // slots
    return [code.map(lambda t, first=i * size: t[first : first + size].clone()) for i in range(slots)]  # type: ignore[misc]


@dataclass(frozen=True)
class Exact(Code):
    """The tensor itself."""

    data: Tensor

    def decode(self) -> Tensor:
        return self.data


@dataclass(frozen=True)
class Rotation(TensorTree):
    """RoPE of the compressed keys of a slot: undone before compression, applied again when they are read."""

    table: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From positions (B or 1, n) to cos and signed sin, as `rope_table` returns them."""
    first: int
    """Column of the first compressed token of a sequence without padding: the number of sinks, and of tokens that are
    evicted after them."""
    length: int
    """Compressed tokens."""
    starts: Tensor | None
    """(B,) columns of padding before each sequence; positions count from the first token after it."""
    columns: Tensor | None = None
    """(B, length) int32: the column of each compressed token, if tokens between them were evicted; None: they follow
    one another from `first` on."""

    def undo(self, k: Tensor) -> Tensor:
        """Keys (B, n, G, D) before RoPE, in fp32: rotated by the negative angles."""
        return self.undo_all([k])[0]

    def undo_all(self, keys: Sequence[Tensor]) -> list[Tensor]:
        """`undo` of each of `keys`, which have one shape. There is one table for all, and small keys are one stack."""
        cos, sin = self._tables(keys[0].device)
        square = cos.square() + sin.square()  # not 1 under YaRN, which scales cos and sin
        cos, sin = cos / square, -sin / square
        if len(keys) > 1 and keys[0].nbytes <= _STACKED:
            return list(rotate(torch.cat(list(keys)), cos, sin).split(len(keys[0])))
        return [rotate(k, cos, sin) for k in keys]

    def redo(self, k: Tensor) -> Tensor:
        """Keys (B, n, G, D) after RoPE, in the dtype of `k`."""
        return apply_rope(k, self._tables(k.device))

    def common_table(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and signed sin (length, 1, 2, D / 2) of the compressed tokens, if all sequences have the same
        positions."""
        columns = self._columns(device)
        return self.table(columns[0]) if self.starts is None and len(columns) == 1 else None

    def _columns(self, device: torch.device) -> Tensor:
        """(B or 1, length) int64."""
        if self.columns is not None:
            return self.columns.long()
        return torch.arange(self.first, self.first + self.length, device=device)[None]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        columns = self._columns(device)
        return self.table(columns if self.starts is None else (columns - self.starts[:, None]).clamp(min=0))


@dataclass(frozen=True)
class Prefix(TensorTree):
    """The compressed tokens of one slot."""

    k: Code
    v: Code
    sinks: Sinks
    """Tokens of the prefix that are not stored here, but in front of the exact tokens after it."""
    rotation: Rotation | None
    """RoPE to apply to `k` on reading; None: `k` holds keys after RoPE, or latents."""
    landmarks: Landmarks | None = None
    """Summaries of the keys, if decoding selects tokens."""
    scores: Tensor | None = None
    """(B, G or 1, S) fp32: those by which tokens were kept, sinks included, if the next eviction adds to them."""

    @property
    def selects(self) -> bool:
        """Whether a decode step reads only some of the tokens."""
        return self.landmarks is not None or self.k.selects

    def read(self) -> Slot:
        """The compressed tokens as attention reads them, (B, n, *width) each, computed in the stored precision, under
        autocast too."""
        with torch.autocast(next(self.k.tensors()).device.type, enabled=False):
            k = self.k.decode()
            return Slot(k if self.rotation is None else self.rotation.redo(k), self.v.decode())

    def join(self, exact: Slot) -> Slot:
        """All tokens in order; `exact` (B, s + T, *width) holds the sinks, then the tokens after the prefix."""
        return self.sinks.join(self.read(), exact)

    def storage(self) -> list[Tensor]:
        """The stored tensors of the compressed tokens, without `starts` of the sinks, which is the cache's."""
        landmarks = [] if self.landmarks is None else self.landmarks.tensors()
        columns = None if self.rotation is None else self.rotation.columns
        others = [tensor for tensor in (columns, self.scores) if tensor is not None]
        return [*self.k.tensors(), *self.v.tensors(), *landmarks, *others]

    def columns(self, tokens: int) -> Tensor:
        """(B or 1, tokens) int64: the columns of the S stored tokens, and of the later ones behind them. Those of sinks
        may be wrong."""
        device = next(self.k.tensors()).device
        columns = torch.arange(tokens, device=device)[None] + self.sinks.evicted
        left = None if self.rotation is None else self.rotation.columns
        if left is None:
            return columns
        rest = torch.arange(self.sinks.rest, device=device)
        index = rest + self.sinks.count * (rest >= self.sinks.first(device))
        return columns.expand(len(left), -1).scatter(1, index.expand(len(left), -1), left.long())
