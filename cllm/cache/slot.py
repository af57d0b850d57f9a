"""A slot: the tensors that one owner caches for a stretch of tokens.

Shapes: B batch, T tokens, G KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """The cached tensors of one owner.

    For a plain slot: keys after RoPE and values, (B, T, G, D) each; a half that is not stored has 0 heads. For a
    latent: the normalised latent (B, T, kv_lora_rank) and the rotated RoPE key (B, T, qk_rope_head_dim). A fp8 cache
    adds one factor for each token and head, (B, T, G) or (B, T).

    With `k_cos` and `k_sin`, which are never stored, `k` are keys before RoPE: the decoding kernels rotate them.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_cos: Tensor | None = None
    k_sin: Tensor | None = None
    """(B or 1, T, 1, 2, D / 2) fp32, the table of RoPE for each token."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Slot:
        """A slot with `change` applied to every tensor."""
        return Slot(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]

    def join(self, later: Slot) -> Slot:
        """This slot's tokens followed by those of `later`, which must be stored in the same format."""
        return Slot(*(None if t is None else _join(t, n) for t, n in zip(self, later, strict=True)))  # type: ignore[arg-type]


def _join(earlier: Tensor, later: Tensor | None) -> Tensor:
    assert later is not None
    return torch.cat((earlier, later), dim=1)
