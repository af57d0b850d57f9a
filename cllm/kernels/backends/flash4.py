"""FlashAttention-4 (package flash-attn-4, module flash_attn.cute), registered as operators of torch.

The package compiles its kernels at first use and is opaque to torch.compile. An operator with a shape function and a
backward is one node of the graph, so that blocks compile without graph breaks. The package's two inner functions are
called, because its public function wraps them in another autograd function.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.backends.base import Case, FlashBackend, load
from cllm.kernels.backends.mask import Mask

_loaded: list[ModuleType | str] = []


def _load() -> ModuleType | str:
    """The package's interface, or the reason why it cannot be used; cached."""
    if not _loaded:
        _loaded.append(load(["flash-attn-4"], ["flash_attn.cute.interface"], ["_flash_attn_fwd", "_flash_attn_bwd"]))
    return _loaded[0]


def _interface() -> Any:
    module = _load()
    assert not isinstance(module, str), module
    return module


def _rule(window: int) -> dict[str, Any]:
    """Causal; with `window` > 0, only the query's own key and the window - 1 keys before it."""
    if window > 0:
        return {"causal": False, "window_size_left": window - 1, "window_size_right": 0}
    return {"causal": True}


def _documents(cu_seqlens: Tensor | None, max_len: int) -> dict[str, Any]:
    if cu_seqlens is None:
        return {}
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_len,
        "max_seqlen_k": max_len,
    }


@torch.library.custom_op("cllm::flash4_forward", mutates_args=())
def flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_len: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention; the last query is at the last key.

    Args:
        q: (B, T, H, D), or (N, H, D) with `cu_seqlens`; half precision.
        k: (B, S, G, D), or (N, G, D).
        v: (B, S, G, E), or (N, G, E).
        cu_seqlens: (documents + 1,) int32, or None.
        max_len: upper bound of the documents' lengths; ignored without `cu_seqlens`.
        scale: factor on the scores.
        window: number of keys that a query sees, its own included; 0: all.

    Returns:
        The output (B, T, H, E) or (N, H, E), and the log-sum-exp of the scores (B, H, T) or (H, N) fp32.
    """
    documents, rule = _documents(cu_seqlens, max_len), _rule(window)
    result = _interface()._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **rule, **documents)
    return result[0], result[1]


@flash4_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_len: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if cu_seqlens is None:
        return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("cllm::flash4_backward", mutates_args=())
def flash4_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_len: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flash4_forward` for q, k and v, in their shapes and dtype.

    With `torch.use_deterministic_algorithms` they are bit-identical from run to run, and slower.
    """
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    _interface()._flash_attn_bwd(
        q,
        k,
        v,
        out,
        d_out.contiguous(),
        lse,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=d_q,
        dk=d_k,
        dv=d_v,
        **_rule(window),
        **_documents(cu_seqlens, max_len),
    )
    return d_q, d_k, d_v


@flash4_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_len: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = flash4_backward(d_out, q, k, v, out, lse, cu_seqlens, *ctx.rest)
    return *grads, None, None, None, None


flash4_forward.register_autograd(_backward, setup_context=_save)


class Flash4(FlashBackend):
    """FlashAttention-4 on Hopper and Blackwell: the fastest backend for training on an H200 (docs/attention.md)."""

    name = "flash4"
    min_capability = (9, 0)
    same_head_dims = False
    returns_lse = True

    def unavailable(self) -> str | None:
        """See `Backend`. flash-attn-4 must be installed, not overwritten by a flash-attn wheel, and import."""
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        module = _load()
        return module if isinstance(module, str) else None

    def unsupported(self, case: Case) -> str | None:
        """See `Backend`; head dims as in the package's `_validate_head_dims`."""
        if (reason := super().unsupported(case)) is not None:
            return reason
        dims = (case.head_dim, case.value_dim)
        if case.capability is not None and case.capability[0] != 9:
            if case.capability[0] not in (10, 11, 12):
                return "runs on sm_90, sm_100, sm_110 and sm_120"
            if max(dims) > 128 and dims not in ((192, 128), (256, 256)):
                return "supports head dims up to 128, (192, 128) and (256, 256) there"
            if case.capability[0] == 12 and max(dims) > 128:
                return "supports head dims up to 128 there"
        return None

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `FlashBackend`."""
        return flash4_forward(q, k, v, None, 0, scale, window or 0)[0]

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, window: int | None
    ) -> Tensor:
        """See `FlashBackend`."""
        return flash4_forward(q, k, v, cu_seqlens, max_len, scale, window or 0)[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        documents, window = mask.boundaries(), mask.window or 0
        if documents is None:
            return flash4_forward(q, k, v, None, 0, scale, window)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = flash4_forward(*flat, documents.cu_seqlens, documents.max_len, scale, window)
        return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        documents, window = mask.boundaries(), mask.window or 0
        if documents is None:
            return flash4_backward(d_out, q, k, v, out, lse, None, 0, scale, window)
        flat, lse = [x.flatten(0, 1) for x in (d_out, q, k, v, out)], lse.transpose(0, 1).flatten(1).contiguous()
        d_q, d_k, d_v = flash4_backward(*flat, lse, documents.cu_seqlens, documents.max_len, scale, window)
        return d_q.view_as(q), d_k.view_as(k), d_v.view_as(v)
