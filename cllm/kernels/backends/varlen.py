"""`torch.nn.attention.varlen`: the FlashAttention-2 that is built into torch, for packed documents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from cllm.kernels.backends.base import FlashBackend

# Newer releases accept fewer KV heads only with this argument; 2.11 accepts them and has no such argument.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Varlen(FlashBackend):
    """Needs only torch. Without documents, each row is one document."""

    name = "varlen"

    def unavailable(self) -> str | None:
        """See `Backend`."""
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `FlashBackend`."""
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        cu_q = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32, device=q.device)
        cu_k = torch.arange(0, batch * keys + 1, keys, dtype=torch.int32, device=q.device)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return _attend(q, k, v, cu_q, cu_k, queries, keys, scale, window).unflatten(0, (batch, queries))

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, window: int | None
    ) -> Tensor:
        """See `FlashBackend`."""
        return _attend(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, scale, window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
) -> Tensor:
    past = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(past, 0), **_GROUPED)
    assert isinstance(out, Tensor)  # a tuple only with other options
    return out
