"""Fused reads whose weights are complex numbers (keys) or matrices (values), and the choice among fused reads.

Both have separate weights for every KV head, and start where `FusedRead` starts: `lite` takes all keys from the last
source and all values from the first, with the weight 1 or the identity. No paper has them.

Decoding makes no fused tensor. q·Σ_j a_j k_j = Σ_j (conj(a_j) q)·k_j for complex products of rotated pairs, and
Σ_t p_t Σ_j v_tj B_j = Σ_j (Σ_t p_t v_tj) B_j.

Shapes: B batch, T tokens, S sources, H query heads, G KV heads, D channels of a head, P = D / 2 rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cllm.cache.slot import Slot
from cllm.kernels.decode import Stored
from cllm.model.sources import FusedRead, Part, Reader, stored_part
from cllm.plan.fuse import Fuse
from cllm.plan.registry import read_module


class WeightedRead(Reader):
    """A sum over slots with weights `weight` (S, G, ...) fp32 for every KV head."""

    def __init__(self, read: Fuse, places: Sequence[int], part: Part, weight: Sequence[int]):
        super().__init__(places, part)
        self.init = read.init
        self.weight = nn.Parameter(torch.empty((len(places), *weight), dtype=torch.float32))

    def identity(self) -> Tensor:
        """The weight of one source and head that changes nothing."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """`lite`: all keys from the last source, all values from the first; `mean`: the mean of the sources; `randn`:
        normal numbers, with which a read has the mean square of the sum of its sources."""
        one = self.identity()
        with torch.no_grad():
            if self.init == "randn":
                self.weight.normal_(std=1 / math.sqrt(len(one)))
            elif self.init == "mean":
                self.weight.copy_((one / len(self.places)).expand_as(self.weight))
            else:
                self.weight.zero_()
                self.weight[-1 if self.part == "k" else 0] = one

    def stored(self, slots: Sequence[Slot]) -> list[Stored]:
        """The tensors that this read is made of, as they lie in the cache."""
        return [stored_part(slots[place], self.part) for place in self.places]


class ComplexRead(WeightedRead):
    """K = Σ_j a_j K_j with complex a_j for every rotated pair (channels c and c + P), computed in fp32.

    A complex factor rotates and scales a pair. It commutes with RoPE, which multiplies the pair by a phase, so scores
    depend on relative positions only. Real a_j are the weights of `FusedRead`.

    `weight` is (S, G, 2, P): real and imaginary parts.
    """

    def __init__(self, read: Fuse, places: Sequence[int], part: Part, n_kv_heads: int, head_dim: int):
        super().__init__(read, places, part, (n_kv_heads, 2, head_dim // 2))

    def identity(self) -> Tensor:
        """(2, P): 1 + 0i."""
        one = torch.zeros_like(self.weight[0, 0])
        one[0] = 1.0
        return one

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        """(B, T, G, D) in the slots' dtype."""
        parts = self.parts(slots)
        total = sum(_turned(part, weight) for part, weight in zip(parts, self.weight.float(), strict=True))
        assert isinstance(total, Tensor)
        return total.flatten(-2).to(parts[0].dtype)

    def queries(self, q: Tensor) -> list[Tensor]:
        """(B, H, D) for each tensor of `stored`: q times the conjugate weights."""
        weights = self.weight.float().repeat_interleave(q.shape[1] // self.weight.shape[1], dim=1)
        conjugate = torch.stack((weights[:, :, 0], -weights[:, :, 1]), dim=2)  # S, H, 2, P
        return [_turned(q, weight).flatten(-2).to(q.dtype) for weight in conjugate]


def _turned(x: Tensor, weight: Tensor) -> Tensor:
    """The pairs of `x` (..., D) times complex weights (..., 2, P), as (..., 2, P) fp32.

    As in RoPE, flipping the halves brings each channel to its partner, in one pass over the data when compiled.
    """
    real, imaginary = weight[..., :1, :], weight[..., 1:, :]
    halves = x.float().unflatten(-1, (2, -1))
    return halves * real + halves.flip(-2) * torch.cat((-imaginary, imaginary), dim=-2)


class MatrixRead(WeightedRead):
    """V = Σ_j V_j B_j with a matrix B_j (D, D) for every source and KV head; products in the dtype of the slots.

    `weight` is (S, G, D, D): rows are channels of the slot, columns those of the read. Diagonal matrices are the
    weights of `FusedRead` with `per_head`.
    """

    def __init__(self, read: Fuse, places: Sequence[int], part: Part, n_kv_heads: int, head_dim: int):
        super().__init__(read, places, part, (n_kv_heads, head_dim, head_dim))

    def identity(self) -> Tensor:
        """(D, D)."""
        return torch.diag(torch.ones_like(self.weight[0, 0, 0]))

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        """(B, T, G, D) in the dtype of the products, that of the slots."""
        parts = self.parts(slots)
        weights = self.weight.to(parts[0].dtype)
        total: Tensor | None = None
        for part, weight in zip(parts, weights, strict=True):
            heads = part.flatten(0, 1).transpose(0, 1)  # G, B T, D
            total = torch.bmm(heads, weight) if total is None else torch.baddbmm(total, heads, weight)
        assert total is not None
        return total.transpose(0, 1).unflatten(0, parts[0].shape[:2])

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Attention's output (B, H, D), in fp32 and returned in the dtype of `outputs`."""
        groups = self.weight.shape[1]
        total = sum(
            torch.einsum("bgrd,gde->bgre", out.float().unflatten(1, (groups, -1)), weight)
            for out, weight in zip(outputs, self.weight.float(), strict=True)
        )
        assert isinstance(total, Tensor)
        return total.flatten(1, 2).to(outputs[0].dtype)


FUSED = {"complex": ComplexRead, "matrix": MatrixRead}
"""Modules by `Fuse.granularity`; `FusedRead` for all others."""


@read_module(Fuse)
def _fused(read: Fuse, part: Part, places: Sequence[int], n_kv_heads: int, head_dim: int) -> Reader:
    return FUSED.get(read.granularity, FusedRead)(read, places, part, n_kv_heads, head_dim)
