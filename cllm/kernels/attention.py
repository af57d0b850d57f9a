"""Causal attention behind one function, whichever kernel computes it.

Shapes: B batch, T queries, S keys, H query heads, G KV heads (H a multiple of G), D channels of a query and key head,
E channels of a value head. Query t has key position S - T + t. The kernels are in `cllm/kernels/backends`; nothing
outside this module knows which one runs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels.backends import BACKENDS, Case, Documents, Mask, document_boundaries
from cllm.kernels.backends.base import heads_per_kv_head
from cllm.kernels.choice import log_once

__all__ = ["Documents", "Mask", "attention", "choose", "document_boundaries"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale q kᵀ + mask) v.

    Under autocast q, k and v are cast first, as torch's attention does. In torch.compile the kernel is chosen while
    tracing, so that the choice is a constant of the graph.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), S >= T.
        v: (B, S, G, E).
        mask: which keys each query sees; always causal.
        scale: factor on the scores; D^-0.5 by default.
        backend: a kernel by name, or `auto`: the fastest that supports the call. `auto` logs its choice once for each
            kind of call, and why it rejected faster kernels.

    Returns:
        (B, T, H, E) in the dtype of `v`, or autocast's.

    Raises:
        UserError: naming `attention.backend`, for a kernel that does not exist, is not available here, or does not
            compute this kind of call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    name = chosen_for(backend, q, k, v, mask)
    return BACKENDS[name].run(q, k, v, mask, scale)


def chosen_for(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, lse: bool = False) -> str:
    """The name of the kernel for a call of `attention` or, with `lse`, of one part of `joint_attention`."""
    return _chosen(
        backend,
        device=q.device,
        dtype=q.dtype,
        head_dim=operator.index(q.shape[3]),  # the compiler turns a symbolic size into a constant
        value_dim=operator.index(v.shape[3]),
        heads_per_kv_head=heads_per_kv_head(q, k),
        lengths="T = 1" if q.shape[1] == 1 else "T = S" if q.shape[1] == k.shape[1] else "T < S",
        window=mask.window is not None,
        exclude_self=mask.exclude_self,
        sees_nothing=mask.exclude_self and (True if mask.window == 1 else False),  # noqa: SIM210 - a branch compiles
        documents=mask.document_ids is not None,
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        lse=lse,
    )


def choose(backend: str, case: Case) -> str:
    """The name of the kernel that computes `case`: `backend`, or for `auto` the fastest that supports it.

    Raises:
        UserError: as `attention` does.
    """
    if backend == "auto":
        rejected: list[str] = []
        for name in _candidates(case):
            reason = _unsupported(name, case) or BACKENDS[name].unavailable()
            if reason is None:
                why = f"rejected: {', '.join(rejected)}" if rejected else "nothing faster is known"
                log_once(f"attention.backend auto chose {name} for {case}; {why}")
                return name
            rejected.append(f"{name} ({reason})")
        raise AssertionError("sdpa computes everything")
    if backend not in BACKENDS:
        raise UserError(f'attention.backend is "{backend}"; allowed: auto, {", ".join(BACKENDS)}')
    if reason := BACKENDS[backend].unavailable():
        raise UserError(f'attention.backend is "{backend}", which is not available: {reason}; {_alternatives(case)}')
    if reason := _unsupported(backend, case):
        raise UserError(
            f'attention.backend is "{backend}", which cannot compute {case}: {reason}; {_alternatives(case)}'
        )
    return backend


def _unsupported(name: str, case: Case) -> str | None:
    if case.lse and not BACKENDS[name].returns_lse:
        return "returns no log-sum-exp"
    return BACKENDS[name].unsupported(case)


@torch.compiler.assume_constant_result
def _chosen(backend: str, *, device: torch.device, **facts: Any) -> str:
    """`choose` for the `Case` of these facts. The compiler calls it while tracing and guards on the arguments."""
    return _choose_cached(backend, Case(device=device, capability=_capability(device), **facts))


_choose_cached = functools.cache(choose)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _candidates(case: Case) -> Sequence[str]:
    """Names of the kernels to try, fastest first."""
    if case.lse:
        return list(BACKENDS)
    if case.lengths == "T = 1":  # sdpa reaches the memory bandwidth, and cuDNN would build a plan for each length
        return ("sdpa",)
    if case.is_plain and case.lengths == "T = S":  # sdpa runs a flash kernel there
        return [name for name in BACKENDS if name not in ("varlen", "flex")]
    return list(BACKENDS)


def _alternatives(case: Case) -> str:
    names = [name for name, other in BACKENDS.items() if (other.unavailable() or _unsupported(name, case)) is None]
    return f"available here: {', '.join(names)}"
