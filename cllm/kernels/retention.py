"""Gated retention (YOCO, arXiv 2405.05254, eq. 5-7): linear attention with one data-dependent decay for each head.

    S_t = γ_t S_{t-1} + k_tᵀ v_t          o_t = scale q_t S_t

On a GPU the chunked kernel `simple_gla` of the flash-linear-attention library computes it. On other devices, and
without that library, it is the chunked form in plain torch below.

Shapes: B batch, T tokens, H heads, D channels of queries and keys, E channels of values.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def _fla_kernel() -> Callable[..., Any] | None:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        log.warning("gated retention: flash-linear-attention is not installed (%s); using the slower torch form", error)
        return None
    log.info("gated retention: flash-linear-attention's simple_gla")
    return chunk_simple_gla


@functools.cache
def _backward_fault(device: torch.device) -> str | None:
    """The reason why the library's backward kernel cannot be used on `device`, or None."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if hopper and (3, 4, 0) <= version < (3, 7, 1) and importlib.util.find_spec("tilelang") is None:
        reason = f"triton {triton.__version__} miscompiles its backward on Hopper; 3.7.1 or tilelang would do"
        log.warning("gated retention: training with the slower torch form, because %s", reason)
        return reason
    return None


def _kernel_for(x: Tensor, *, grad: bool) -> Callable[..., Any] | None:
    kernel = _fla_kernel() if x.is_cuda else None
    return None if kernel is not None and grad and _backward_fault(x.device) else kernel


def gated_retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, document_ids: Tensor | None = None
) -> Tensor:
    """Gated retention over sequences that start from an empty state.

    Args:
        q, k: (B, T, H, D). v: (B, T, H, E).
        log_decay: (B, T, H) fp32, ln γ, at most 0.
        scale: factor on the output.
        document_ids: (B, T) integers, ascending; the state is cleared when the document changes. The library needs the
            boundaries on the host, so that with documents each call is a device sync.

    Returns:
        (B, T, H, E) in the dtype of `v`.
    """
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, log_decay))
    kernel = _kernel_for(q, grad=grad)
    if kernel is None:
        return gated_retention_reference(q, k, v, log_decay, scale=scale, document_ids=document_ids)
    if document_ids is None:
        return kernel(q, k, v, g=log_decay, scale=scale)[0]
    batch, length = document_ids.shape
    change = torch.ones_like(document_ids, dtype=torch.bool)
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = change.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([batch * length])))
    flat = [t.reshape(1, batch * length, *t.shape[2:]) for t in (q, k, v, log_decay)]
    out = kernel(*flat[:3], g=flat[3], scale=scale, cu_seqlens=bounds)[0]
    return out.view(batch, length, *out.shape[2:])


def gated_retention_from(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Gated retention from `state` (B, H, D, E) fp32: the output (B, T, H, E) and the new state."""
    if q.shape[1] == 1:  # the recurrence itself
        q1, k1, v1 = (t[:, 0].float() for t in (q, k, v))  # B, H, .
        new_state = state * log_decay[:, 0].float().exp()[..., None, None] + k1[..., None] * v1[..., None, :]
        return (scale * torch.einsum("bhd,bhde->bhe", q1, new_state))[:, None].to(v.dtype), new_state
    kernel = _kernel_for(q, grad=False)
    if kernel is None:
        return _chunked(q, k, v, log_decay, state, scale=scale)
    return kernel(q, k, v, g=log_decay, scale=scale, initial_state=state, output_final_state=True)


def gated_retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    document_ids: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:
    """`gated_retention` in plain torch, computed in fp32: quadratic within chunks, one state between chunks."""
    state = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float32)
    return _chunked(q, k, v, log_decay, state, scale=scale, document_ids=document_ids, chunk=chunk)[0]


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float,
    document_ids: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return _chunked(q, k, v, log_decay, state, scale=scale, document_ids=document_ids, chunk=chunk)
    dtype = v.dtype
    batch, length = q.shape[:2]
    q, k, v, log_decay = (t.float().transpose(1, 2) for t in (q, k, v, log_decay))  # B, H, T, .
    ids = torch.zeros(batch, length, dtype=torch.long, device=q.device) if document_ids is None else document_ids
    state_id = ids[:, 0]  # the document of the state
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        qc, kc, vc, id_c = q[:, :, part], k[:, :, part], v[:, :, part], ids[:, part]
        total = log_decay[:, :, part].cumsum(-1)  # B, H, c: decay from before the chunk to each token
        n = id_c.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril() & (id_c[:, :, None] == id_c[:, None, :])
        gap = (total[..., :, None] - total[..., None, :]).masked_fill(~seen[:, None], float("-inf"))
        inner = (qc @ kc.transpose(-1, -2) * gap.exp()) @ vc
        alive = (id_c == state_id[:, None])[:, None, :, None]  # B, 1, c, 1
        outputs.append(inner + (qc * total.exp()[..., None]) @ state * alive)
        last = id_c[:, -1]
        kept = (id_c == last[:, None])[:, None, :]  # B, 1, c
        weight = (total[..., -1:] - total).exp() * kept  # B, H, c
        survives = (last == state_id)[:, None, None, None]
        state = state * total[..., -1:, None].exp() * survives + (kc * weight[..., None]).transpose(-1, -2) @ vc
        state_id = last
    return (torch.cat(outputs, dim=2) * scale).transpose(1, 2).to(dtype), state
