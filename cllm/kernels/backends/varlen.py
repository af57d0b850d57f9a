"""`torch.nn.attention.varlen`: the FlashAttention-2 that is built into torch, for packed documents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from cllm.kernels.backends.base import FlashBackend
from cllm.kernels.backends.mask import Mask

# Newer releases accept fewer KV heads only with this argument; 2.11 accepts them and has no such argument.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Varlen(FlashBackend):
    """Needs only torch. Without documents, each row is one document."""

    name = "varlen"
    returns_lse = True

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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend`. By the operator that `varlen_attn` runs."""
        cu_q, cu_k, max_q, max_k = _boundaries(q, k, mask)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *flat, cu_q, cu_k, max_q, max_k, 0.0, mask.window is None, False, scale=scale, **_window(mask)
        )
        return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`. There is no dropout, so the operator's random state is not read."""
        cu_q, cu_k, max_q, max_k = _boundaries(q, k, mask)
        flat = [x.flatten(0, 1) for x in (d_out, q, k, v, out)]
        lse = lse.transpose(0, 1).flatten(1).contiguous()
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            *flat,
            lse,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.0,
            mask.window is None,
            state,
            torch.empty(0, device=q.device),
            scale=scale,
            **_window(mask),
        )
        return d_q.view_as(q), d_k.view_as(k), d_v.view_as(v)


def _boundaries(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries and longest length of queries and of keys: documents or, without them, rows."""
    if (documents := mask.boundaries()) is not None:
        return documents.cu_seqlens, documents.cu_seqlens, documents.max_len, documents.max_len
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    cu_q, cu_k = (torch.arange(0, batch * n + 1, n, dtype=torch.int32, device=q.device) for n in (queries, keys))
    return cu_q, cu_k, queries, keys


def _window(mask: Mask) -> dict[str, int]:
    return {} if mask.window is None else {"window_size_left": mask.window - 1, "window_size_right": 0}


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
