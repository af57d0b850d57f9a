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
from cllm.kernels.decode import Kernel, Stored, Visible, decode_attention_lse


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


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The joint output and log-sum-exp, in the dtype of `lses`; 0 and -inf where no part sees anything.

    Args:
        outs: (..., H, D) for each part.
        lses: (..., H) for each part, fp32 or fp64; -inf for a part that sees nothing.
        sink: (H,), or None.
    """
    every = torch.stack(list(lses))
    if sink is not None:
        every = torch.cat((every, sink.to(every.dtype).expand_as(every[:1])))
    lse = every.logsumexp(0)
    most = lse.clamp(min=torch.finfo(lse.dtype).min)  # finite, for a step of a row that is padding
    out = sum((part - most).exp()[..., None] * out.to(lse.dtype) for out, part in zip(outs, lses, strict=True))
    assert isinstance(out, Tensor)
    return out, lse


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
    out, lse = merge([out for out, _ in found], [lse.transpose(1, 2) for _, lse in found], sink)
    return out.to(values[0].dtype).contiguous(), lse.transpose(1, 2).contiguous()


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
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    document_ids: Tensor | None,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    windows: Sequence[int],
    scale: float,
    kernels: str,
) -> list[Tensor]:
    """Gradients for q, each k, each v, and the sink if there is one, in their shapes and dtypes."""
    d_out, masks = d_out.contiguous(), _masks(q, keys, document_ids, starts, cu_seqlens, windows)
    found = [
        BACKENDS[name].backward(d_out, q, k, v, out, lse, mask, scale)
        for name, k, v, mask in zip(kernels.split(","), keys, values, masks, strict=True)
    ]
    d_q = sum(d_q.to(lse.dtype) for d_q, _, _ in found) if len(found) > 1 else found[0][0]
    assert isinstance(d_q, Tensor)
    gradients = [d_q.to(q.dtype), *(d_k for _, d_k, _ in found), *(d_v for _, _, d_v in found)]
    if sink is not None:
        delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)  # B, H, T
        share = (sink.to(lse.dtype)[:, None] - lse).exp()
        gradients.append(-(share * delta).sum((0, 2)).to(sink.dtype))
    return [gradient.contiguous() for gradient in gradients]


@_backward.register_fake
def _(d_out, q, keys, values, sink, out, lse, document_ids, starts, cu_seqlens, windows, scale, kernels):
    return [t.new_empty(t.shape) for t in (q, *keys, *values, *([] if sink is None else [sink]))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, sink, document_ids, starts, cu_seqlens, *ctx.rest = inputs
    ctx.n = len(keys)
    ctx.save_for_backward(q, *keys, *values, sink, *output, document_ids, starts, cu_seqlens)


def _gradients(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Any, ...]:
    n = ctx.n
    q, *saved = ctx.saved_tensors
    found = _backward(d_out, q, saved[:n], saved[n : 2 * n], *saved[2 * n :], *ctx.rest)
    d_q, d_keys, d_values, d_sink = found[0], found[1 : n + 1], found[n + 1 : 2 * n + 1], found[2 * n + 1 :]
    return d_q, d_keys, d_values, d_sink[0] if d_sink else None, None, None, None, None, None, None


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
    out, _ = merge([out for (out,), _ in found], [lse for _, lse in found], sink)
    return out.to(q.dtype)
