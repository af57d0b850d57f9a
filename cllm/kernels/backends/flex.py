"""`torch.nn.attention.flex_attention`: masks are small functions, compiled into a Triton kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cllm.kernels.backends.base import Backend, Case, heads_per_kv_head
from cllm.kernels.backends.mask import Mask


class Flex(Backend):
    """Supports every mask, and fp32. Skips blocks of 128 by 128 in which no query sees a key."""

    name = "flex"

    def unavailable(self) -> str | None:
        """See `Backend`. On other devices it has no backward, and without the compiler it is slow."""
        return None if torch.cuda.is_available() else "needs a CUDA device"

    def unsupported(self, case: Case) -> str | None:
        """See `Backend`."""
        if case.capability is None:
            return "needs a CUDA device"
        if case.capability < (8, 0):
            return "needs sm_80 or newer"
        if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"does not compute {str(case.dtype).removeprefix('torch.')}"
        if min(case.head_dim, case.value_dim) < 16:
            return "needs head dims of 16 or more"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """See `Backend`."""
        queries, keys, grouped = q.shape[1], k.shape[1], heads_per_kv_head(q, k) > 1
        blocks = block_mask(mask, queries, keys, q.device)
        call_directly = torch.compiler.is_compiling() or q.device.type == "cpu"
        kernel: Any = flex_attention if call_directly else _compiled()
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B, heads, T or S, channels
        return kernel(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped).transpose(1, 2)


def block_mask(mask: Mask, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The mask's blocks, cached: for each shape without documents, for each `Mask` with documents."""
    if mask.document_ids is None and not torch.compiler.is_compiling():
        blocks = _static_blocks(mask.window, mask.exclude_self, queries, keys, str(device))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _RECORDED.append(blocks)
        return blocks
    rule = _rule(mask.window, mask.exclude_self, keys - queries, mask.document_ids)
    batch = None if mask.document_ids is None else mask.document_ids.shape[0]
    if torch.compiler.is_compiling():
        return create_block_mask(rule, batch, None, queries, keys, device=device)
    if (queries, keys) not in mask.blocks:
        mask.blocks[queries, keys] = create_block_mask(rule, batch, None, queries, keys, device=device)
    return mask.blocks[queries, keys]


_RECORDED: list[BlockMask] = []
"""Blocks whose memory a CUDA graph reads, which the cache may drop."""


@functools.lru_cache(maxsize=32)
def _static_blocks(window: int | None, exclude_self: bool, queries: int, keys: int, device: str) -> BlockMask:
    rule = _rule(window, exclude_self, keys - queries, None)
    with torch.inference_mode(False):  # a backward may use it later
        return create_block_mask(rule, None, None, queries, keys, device=device)


def _rule(window: int | None, exclude_self: bool, offset: int, ids: Tensor | None) -> Callable[..., Tensor]:
    """A mask_mod of FlexAttention: whether query t of row b, at position t + offset, sees key s."""
    nearest = 1 if exclude_self else 0

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = t + offset - s
        seen = distance >= nearest
        if window is not None:
            seen = seen & (distance < window)
        if ids is not None:
            seen = seen & (ids[b, t + offset] == ids[b, s])
        return seen

    return sees


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
