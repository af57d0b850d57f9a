"""One softmax over the keys of several slots, each with a mask of its own.

    o = (Σ_p Σ_j exp(z_pj) v_pj) / (Σ_p Σ_j exp(z_pj) + exp(s))        z_p = scale q k_pᵀ + mask_p

Each part p is computed by an attention kernel that also returns the log-sum-exp of its scores, L_p. With
L = log(Σ_p exp(L_p) + exp(s)), the output is o = Σ_p exp(L_p - L) o_p. In the backward, every part's kernel is handed
the joint o and L in place of its own: it then computes P_p = exp(z_p - L) and dz_p = P_p (do v_pᵀ - do·o), which are
the gradients of the joint softmax. So nothing of size T x S is kept, and no kernel needs a gradient of L_p.

s, the sink, is one number for each query head, or absent.

Shapes: B batch, T queries, S keys of a part, H query heads, G KV heads (H a multiple of G), D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels.attention import chosen_for
from cllm.kernels.backends import BACKENDS, Documents, Mask
from cllm.kernels.choice import Kernel
from cllm.kernels.decode import Stored, Visible, decode_attention_lse
from cllm.kernels.merge import merge


class JointPart(NamedTuple):
    """Keys and values of one slot, and which of them each query sees."""

    k: Tensor
    """(B, S, G, D), S >= T."""
    v: Tensor
    """(B, S, G, D)."""
    mask: Mask
    """Every query must see at least one key. Documents are the same in all parts."""


def joint_attention(
    q: Tensor,
    parts: Sequence[JointPart],
    sink: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention by one softmax over all parts. Under autocast tensors are cast first, as `attention` does.

    Args:
        q: (B, T, H, D).
        parts: one or more.
        sink: (H,) floats, or None.
        scale: factor on the scores; D^-0.5 by default.
        backend: as for `attention`; each part may get another kernel. Only kernels that return a log-sum-exp are used.

    Returns:
        (B, T, H, D) in the dtype of the values, or autocast's.

    Raises:
        UserError: as `attention` does, and for a backend that returns no log-sum-exp.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, parts = q.to(dtype), [JointPart(k.to(dtype), v.to(dtype), mask) for k, v, mask in parts]
    documents = next((mask.documents for _, _, mask in parts if mask.documents is not None), None)
    out, _ = _forward(
        q,
        [part.k for part in parts],
        [part.v for part in parts],
        sink,
        _longest_ids(parts),
        None if documents is None else documents.starts,
        None if documents is None else documents.cu_seqlens,
        [part.mask.window or 0 for part in parts],
        q.shape[-1] ** -0.5 if scale is None else scale,
        ",".join([chosen_for(backend, q, k, v, mask, lse=True) for k, v, mask in parts]),
    )
    return out


@torch.library.custom_op("cllm::joint_attention", mutates_args=())
def _forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    sink: Tensor | None,
    document_ids: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: Sequence[int],
    scale: float,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D) and the joint log-sum-exp (B, H, T).

    `document_ids` are those of the longest part. A window of 0 is none. `kernels` are names with commas between them.
    """
    masks = _masks(q, keys, document_ids, starts, cu_seqlens, windows)
    found = [
        BACKENDS[name].forward(q, k, v, mask, scale)
        for name, k, v, mask in zip(kernels.split(","), keys, values, masks, strict=True)
    ]
    return merge([out for out, _ in found], [lse for _, lse in found], sink, values[0].dtype)


@_forward.register_fake
def _(q, keys, values, sink, document_ids, starts, cu_seqlens, windows, scale, kernels) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = values[0].new_empty((*q.shape[:3], values[0].shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


@torch.library.custom_op("cllm::joint_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    document_ids: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: Sequence[int],
    scale: float,
    kernels: str,
) -> list[Tensor]:
    """Gradients for q by each part, for each k and each v, in the shapes and dtypes of q, k and v."""
    d_out, masks = d_out.contiguous(), _masks(q, keys, document_ids, starts, cu_seqlens, windows)
    found = [
        BACKENDS[name].backward(d_out, q, k, v, out, lse, mask, scale)
        for name, k, v, mask in zip(kernels.split(","), keys, values, masks, strict=True)
    ]
    return [gradient.contiguous() for of_one in zip(*found, strict=True) for gradient in of_one]


@_backward.register_fake
def _(d_out, q, keys, values, out, lse, document_ids, starts, cu_seqlens, windows, scale, kernels):
    return [t.new_empty(t.shape) for t in (*[q] * len(keys), *keys, *values)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, sink, document_ids, starts, cu_seqlens, *ctx.rest = inputs
    ctx.n = len(keys)
    ctx.save_for_backward(q, *keys, *values, sink, *output, document_ids, starts, cu_seqlens)


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Any, ...]:
    """The sums here are no part of the operator: the compiler makes one kernel of them and of what follows."""
    n = ctx.n
    q, *saved = ctx.saved_tensors
    keys, values, (sink, out, lse, *documents) = saved[:n], saved[n : 2 * n], saved[2 * n :]
    found = _backward(d_out, q, keys, values, out, lse, *documents, *ctx.rest)
    d_sink = None
    if sink is not None:
        delta = (d_out * out.to(lse.dtype)).sum(-1).transpose(1, 2)  # B, H, T
        share = (sink.to(lse.dtype)[:, None] - lse).exp()
        d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
    d_q = _sum(found[:n], lse.dtype)
    return d_q, found[n : 2 * n], found[2 * n :], d_sink, None, None, None, None, None, None


def _sum(parts: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """The sum of tensors of one dtype, added in `wide` and rounded once."""
    first, *more = parts
    if len(more) < 2:  # torch adds two tensors of 16 bits in fp32
        return first + more[0] if more else first
    return sum(more, first.to(wide)).to(first.dtype)


_forward.register_autograd(_gradients, setup_context=_save)


def _masks(
    q: Tensor,
    keys: Sequence[Tensor],
    document_ids: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: Sequence[int],
) -> list[Mask]:
    documents = None if starts is None or cu_seqlens is None else Documents(starts, cu_seqlens, q.shape[1])
    return [
        Mask(
            window or None,
            False,
            None if document_ids is None else document_ids[:, -k.shape[1] :],
            documents if k.shape[1] == q.shape[1] else None,
        )
        for k, window in zip(keys, windows, strict=True)
    ]


def _longest_ids(parts: Sequence[JointPart]) -> Tensor | None:
    """The document ids of the part with most keys; those of the others are their last columns."""
    longest: Tensor | None = None
    for part in parts:
        ids = part.mask.document_ids
        if ids is not None and (longest is None or ids.shape[1] > longest.shape[1]):
            longest = ids
    return longest


class DecodePart(NamedTuple):
    """One cached slot, and which of its entries the new token of each sequence sees."""

    k: Stored
    v: Stored
    visible: Visible


def joint_decode(
    q: Tensor, parts: Sequence[DecodePart], sink: Tensor | None = None, *, scale: float, kernel: Kernel = "auto"
) -> Tensor:
    """`joint_attention` of one new token of each sequence, (B, H, D), over cached slots; no gradients.

    Returns (B, H, D) in the dtype of `q`. Errors are those of `decode_attention`.
    """
    found = [decode_attention_lse([q], [k], [v], visible, scale=scale, kernel=kernel) for k, v, visible in parts]
    outs = [out[:, None] for (out,), _ in found]  # B, 1, H, D
    lses = [lse[..., None] for _, lse in found]  # B, H, 1
    return merge(outs, lses, sink, q.dtype, kernel)[0][:, 0]
