# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Parts of one softmax, each with a log-sum-exp, merged by one kernel: it reads every number once and writes it once.

    L = log(Σ_p exp(L_p) + exp(s))        o = Σ_p exp(L_p - L) o_p

s, the sink, is one number for each query head, or absent.

Shapes: B batch, T queries, H query heads, E channels of a value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.kernels import triton_decode
from cllm.kernels.choice import Kernel, uses_triton
from cllm.kernels.triton_decode import jit, tl

_TILE = 4096
"""Numbers of a program, of one head."""


def merge(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    sink: Tensor | None,
    dtype: torch.dtype,
    kernel: Kernel = "auto",
) -> tuple[Tensor, Tensor]:
    """The joint output and log-sum-exp, contiguous; 0 and -inf where no part sees anything. No gradients.

    Args:
        outs: (B, T, H, E) for each part, with any strides. Finite also where the part sees nothing.
        lses: (B, H, T) for each part, fp32 or fp64, with any strides; -inf where the part sees nothing.
        sink: (H,), or None.
        dtype: of the output. Sums are in the dtype of `lses`.
        kernel: as for `decode_attention`.

    Returns:
        (B, T, H, E) in `dtype`, and (B, H, T) in the dtype of `lses`.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
    """
    if torch.compiler.is_compiling():  # the compiler makes a kernel of plain torch itself
        kernel = "reference"
    on_gpu = outs[0].is_cuda
    if not uses_triton("joint attention's merge", kernel, lambda: _unsupported(outs, lses), on_gpu=on_gpu):
        out, lse = _reference(outs, lses, sink)
        return out.to(dtype).contiguous(), lse
    with torch.cuda.device_of(outs[0]):
        return run(outs, lses, sink, dtype)


def _reference(outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results in the dtype of `lses`, in plain torch."""
    every = torch.stack(list(lses))  # P, B, H, T
    if sink is not None:
        every = torch.cat((every, sink.to(every.dtype)[:, None].expand_as(every[:1])))
    lse = every.logsumexp(0)
    most = lse.clamp(min=torch.finfo(lse.dtype).min)  # finite, for a step of a row that is padding
    weights = [(part - most).exp().transpose(1, 2)[..., None] for part in lses]  # B, T, H, 1
    out = sum(weight * out.to(lse.dtype) for out, weight in zip(outs, weights, strict=True))
    assert isinstance(out, Tensor)
    return out, lse


def run(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, without checks."""
    batch, length, heads, width = outs[0].shape
    out = outs[0].new_empty(outs[0].shape, dtype=dtype)
    lse = lses[0].new_empty((batch, heads, length))
    channels = 1 << (width - 1).bit_length()
    tokens = max(1, min(_TILE // channels, 1 << (length - 1).bit_length()))
    blocks = -(-length // tokens)
    merge_parts[(heads * blocks * batch,)](
        tuple((part, part.stride()[:3]) for part in outs),
        tuple((part, part.stride()) for part in lses),
        sink,
        out,
        lse,
        length,
        blocks,
        heads,
        WIDTH=width,
        TOKENS=tokens,
        CHANNELS=channels,
        num_warps=4 if tokens * channels > 1024 else 1,
    )
    return out, lse


def _unsupported(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    out = outs[0]
    if (reason := triton_decode.device_obstacle(out)) is not None:
        return reason
    for part in outs:
        if part.dtype not in triton_decode.TYPES:
            return f"does not compute {str(part.dtype).removeprefix('torch.')}"
        if part.stride(3) != 1:
            return "the channels of a tensor are not contiguous"
    if any(lse.dtype != torch.float32 for lse in lses):
        return "needs log-sum-exps in float32"
    if out.shape[3] > _TILE:
        return f"heads of {out.shape[3]} channels; at most {_TILE}"
    return None


@jit
def merge_parts(
    outs, lses, sink, out, lse, length, blocks, heads,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge TOKENS tokens of one head. An item of `outs` is a pointer and strides (B, T, H), of `lses` (B, H, T).

    Neighbouring programs have neighbouring heads of the same tokens, and so read neighbouring memory.
    """
    pid = tl.program_id(0)
    h, block, b = (pid % heads).to(tl.int64), pid // heads % blocks, (pid // heads // blocks).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    is_token = token < length
    token = token.to(tl.int64)
    top = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    if sink is not None:
        of_sink = tl.load(sink + h).to(tl.float32)
        top = tl.maximum(top, of_sink)
    every = ()
    for i in tl.static_range(len(lses)):
        part, strides = lses[i]
        at = part + b * strides[0] + h * strides[1] + token * strides[2]
        every = every + (tl.load(at, mask=is_token, other=float("-inf")),)
        top = tl.maximum(top, every[i])
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    if sink is not None:
        total += tl.exp(of_sink - top)
    for i in tl.static_range(len(lses)):
        total += tl.exp(every[i] - top)
    sees_nothing = total == 0
    joint = tl.where(sees_nothing, float("-inf"), top + tl.log(total))
    tl.store(lse + (b * heads + h) * length + token, joint, mask=is_token)

    channel = tl.arange(0, CHANNELS)
    seen = is_token[:, None] & (channel < WIDTH)[None, :]
    share = 1.0 / tl.where(sees_nothing, 1.0, total)
    merged = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for i in tl.static_range(len(outs)):
        part, strides = outs[i]
        at = part + b * strides[0] + token[:, None] * strides[1] + h * strides[2] + channel[None, :]
        weight = tl.exp(every[i] - top) * share
        merged += weight[:, None] * tl.load(at, mask=seen, other=0.0).to(tl.float32)
    at = out + ((b * length + token) * heads + h)[:, None] * WIDTH + channel[None, :]
    tl.store(at, merged.to(out.dtype.element_ty), mask=seen)
