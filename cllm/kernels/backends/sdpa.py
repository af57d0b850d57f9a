"""`torch.nn.functional.scaled_dot_product_attention`: torch's choice of kernel, and cuDNN's kernel."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from cllm.kernels.backends.base import Backend, Case, heads_per_kv_head
from cllm.kernels.backends.blocks import attention_in_blocks, gradients_in_blocks
from cllm.kernels.backends.mask import Mask


class Sdpa(Backend):
    """Runs everywhere. Plain causal attention runs torch's flash kernel if there is one; every other mask is a dense
    boolean matrix."""

    name = "sdpa"
    returns_lse = True

    def unavailable(self) -> str | None:
        """Always None."""
        return None

    def unsupported(self, case: Case) -> str | None:
        """Always None."""
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """See `Backend`."""
        queries, keys, group = q.shape[1], k.shape[1], heads_per_kv_head(q, k)
        if mask.is_plain and queries == keys:
            return _call(q, k, v, scale=scale, enable_gqa=group > 1, is_causal=True)
        if mask.is_plain and queries == 1:  # a single query sees every key
            return _call(q, k, v, scale=scale, enable_gqa=group > 1)
        if group > 1 and q.is_cuda:  # no CUDA kernel supports a dense mask with fewer KV heads
            k, v, group = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), 1
        seen = mask.dense(queries, keys, q.device)
        if not mask.exclude_self:
            return _call(q, k, v, scale=scale, enable_gqa=group > 1, attn_mask=seen)
        # A document's first token sees nothing, and softmax over nothing is NaN. Let it see all keys; clear the result.
        sees_nothing = ~seen.any(dim=-1, keepdim=True)  # 1 or B, 1, T, 1
        out = _call(q, k, v, scale=scale, enable_gqa=group > 1, attn_mask=seen | sees_nothing)
        return out.masked_fill(sees_nothing.transpose(1, 2), 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend`. torch's flash kernel for CPUs if the mask is only causal, otherwise plain torch."""
        if not _is_flash(q, k, v, mask):
            return attention_in_blocks(q, k, v, mask, scale)
        q, k, v = (_heads_second(x, q.shape[2]) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        if not _is_flash(q, k, v, mask):
            return gradients_in_blocks(d_out, q, k, v, out, lse, mask, scale)
        arguments = (_heads_second(x, q.shape[2]) for x in (d_out, q, k, v, out))
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, lse, 0.0, True, scale=scale)
        d_q, d_k, d_v = (x.transpose(1, 2) for x in found)
        if d_k.shape != k.shape:  # KV heads were repeated
            d_k, d_v = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (d_k, d_v))
        return d_q, d_k, d_v


_aten = torch.ops.aten


def _is_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
    """Whether torch's flash kernel for CPUs computes the call."""
    return mask.is_plain and q.device.type == "cpu" and q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3]


def _heads_second(x: Tensor, n_heads: int) -> Tensor:
    """(B, n_heads, T, D) from (B, T, n_heads or fewer KV heads, D)."""
    return (x if x.shape[2] == n_heads else x.repeat_interleave(n_heads // x.shape[2], dim=2)).transpose(1, 2)


class Cudnn(Backend):
    """cuDNN's fused attention, through torch: half precision, causal, as many queries as keys."""

    name = "cudnn"

    def unavailable(self) -> str | None:
        """See `Backend`. Needs a GPU and a torch with cuDNN."""
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        return None if torch.backends.cudnn.is_available() else "torch was built without cuDNN"

    def unsupported(self, case: Case) -> str | None:
        """See `Backend`. On a machine with a GPU, torch is asked about the shapes."""
        if case.capability is None:
            return "needs a CUDA device"
        if case.documents or case.window:
            return "supports neither windows nor documents"
        if case.lengths != "T = S":
            return "needs as many queries as keys, and more than one"
        return _refusal(case) if torch.cuda.is_available() else None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """See `Backend`. For `exclude_self` queries are shifted by one position, as in `FlashBackend`."""
        if mask.exclude_self:
            q = q.roll(-1, dims=1)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = _call(q, k, v, scale=scale, enable_gqa=heads_per_kv_head(q, k) > 1, is_causal=True)
        return F.pad(out[:, :-1], (0, 0, 0, 0, 1, 0)) if mask.exclude_self else out


def _call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's function, which takes (B, heads, T or S, channels)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@functools.cache
def _refusal(case: Case) -> str | None:
    """Ask torch with tensors of 128 tokens. It gives its reasons as warnings."""

    def sample(heads: int, channels: int) -> Tensor:
        return torch.empty(1, heads, 128, channels, dtype=case.dtype, device=case.device).requires_grad_(case.grad)

    q, k, v = sample(case.heads_per_kv_head, case.head_dim), sample(1, case.head_dim), sample(1, case.value_dim)
    params = SDPAParams(q, k, v, None, 0.0, True, case.heads_per_kv_head > 1)
    if can_use_cudnn_attention(params):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        can_use_cudnn_attention(params, debug=True)
    reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
    return " ".join(" ".join(reasons).split()) or "torch does not support it"
