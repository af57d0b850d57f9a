"""Causal attention behind one function, whatever kernel computes it.

Shapes: B batch, T queries, S keys, H query heads, G KV heads (H a multiple of G), D channels of a query and key head,
E channels of a value head. Query t stands at key position S - T + t. The kernels are in `cllm/kernels/backends`;
nothing outside this module knows which one runs.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels.backends import BACKENDS, Case, Documents, Mask, document_boundaries
from cllm.kernels.backends.base import Lengths, heads_per_kv_head

__all__ = ["Documents", "Mask", "attention", "choose", "document_boundaries"]

log = logging.getLogger(__name__)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale q kᵀ + mask) v.

    Under autocast q, k and v are cast first, as torch's own attention does. Inside of torch.compile the kernel is
    chosen while tracing, so the choice is a constant of the graph.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), S >= T.
        v: (B, S, G, E).
        mask: which keys each query sees; always causal.
        scale: factor on the scores; D^-0.5 by default.
        backend: a kernel by name, or `auto`, which logs once for each kind of call what it chose and why not a faster
            one.

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
    name = _chosen(
        backend,
        q.device,
        q.dtype,
        operator.index(q.shape[3]),  # of a symbolic size, the compiler makes a constant
        operator.index(v.shape[3]),
        heads_per_kv_head(q, k),
        "T = 1" if q.shape[1] == 1 else "T = S" if q.shape[1] == k.shape[1] else "T < S",
        mask.window is not None,
        mask.exclude_self,
        mask.exclude_self and (True if mask.window == 1 else False),  # noqa: SIM210 - a branch, for the compiler
        mask.document_ids is not None,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    return BACKENDS[name].run(q, k, v, mask, scale)


def choose(backend: str, case: Case) -> str:
    """The name of the kernel that computes `case`: `backend` itself, or for `auto` the fastest that can. Raises as
    `attention` does."""
    if backend == "auto":
        rejected: list[str] = []
        for name in _preference(case):
            reason = BACKENDS[name].unsupported(case) or BACKENDS[name].available()
            if reason is None:
                _tell(name, case, rejected)
                return name
            rejected.append(f"{name} ({reason})")
        raise AssertionError("sdpa computes everything")
    if backend not in BACKENDS:
        raise UserError(f'attention.backend is "{backend}"; allowed: auto, {", ".join(BACKENDS)}')
    if reason := BACKENDS[backend].available():
        raise UserError(f'attention.backend is "{backend}", which is not available: {reason}; {_others(case)}')
    if reason := BACKENDS[backend].unsupported(case):
        raise UserError(f'attention.backend is "{backend}", which cannot compute {case}: {reason}; {_others(case)}')
    return backend


@torch.compiler.assume_constant_result
def _chosen(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    heads_per_kv_head: int,
    lengths: Lengths,
    window: bool,
    exclude_self: bool,
    blind: bool,
    documents: bool,
    grad: bool,
) -> str:
    """`choose`, remembered. The compiler runs it as it is while tracing and guards on the arguments."""
    case = Case(
        device=device,
        capability=_capability(device),
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim,
        heads_per_kv_head=heads_per_kv_head,
        lengths=lengths,
        window=window,
        exclude_self=exclude_self,
        blind=blind,
        documents=documents,
        grad=grad,
    )
    return _remembered(backend, case)


_remembered = functools.cache(choose)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _preference(case: Case) -> Sequence[str]:
    """Names, fastest first."""
    if case.lengths == "T = 1":  # as fast as memory allows, and cuDNN would plan anew for each length
        return ("sdpa",)
    if case.is_plain and case.lengths == "T = S":  # torch's own choice is a flash kernel there
        return ("flash4", "cudnn", "flash3", "flash2", "sdpa")
    return tuple(BACKENDS)


def _others(case: Case) -> str:
    names = [name for name, other in BACKENDS.items() if other.available() is None and other.unsupported(case) is None]
    return f"available here: {', '.join(names)}"


@functools.cache
def _told(line: str) -> None:
    log.info(line)


def _tell(name: str, case: Case, rejected: Sequence[str]) -> None:
    """One line for each kind of call, however often it is traced."""
    why = f"; rejected: {', '.join(rejected)}" if rejected else "; nothing faster is known"
    _told(f"attention.backend auto chose {name} for {case}{why}")
