"""Landmarks and outliers of keys, stored besides a slot's factors so that decoding can select tokens (ShadowKV,
arXiv 2410.21465, section 4). `cllm.kernels.selection` reads them.

The landmark of a chunk is the mean of its keys after RoPE. The outliers of a KV head are the chunks that contain the
key least like their landmark, by cosine. The keys of outliers are kept exactly, and every step reads them. The last
chunks are treated the same way, because queries attend most to recent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels.selection import Selection
from cllm.plan.plan import KVPlan
from cllm.posthoc.tensor_tree import TensorTree


@dataclass(frozen=True)
class Landmarks(Selection, TensorTree):
    """A `Selection` that a cache stores."""


def always_read(tokens: int, *, chunk: int, outliers: int, local: int) -> tuple[int, int]:
    """The number of chunks of `tokens` tokens that every step reads, and how many of those are the last ones."""
    chunks = -(-tokens // chunk)
    last = min(local + (tokens % chunk > 0), chunks) if local else 0
    return min(last + outliers, chunks), last


def outlier_chunks(outliers: int | None, select: int) -> int:
    """`outliers`, or by default 24 chunks for every 1024 of `select` tokens, as in ShadowKV."""
    return 24 * select // 1024 if outliers is None else outliers


def landmark_bytes(shape: torch.Size, size: int, *, chunk: int, outliers: int, local: int) -> int:
    """Bytes per sequence that `make_landmarks` stores for keys of `shape` (B, n, G, D) of `size` bytes an element."""
    tokens, heads, dim = shape[1:]
    read, _ = always_read(tokens, chunk=chunk, outliers=outliers, local=local)
    return heads * ((-(-tokens // chunk) + read * chunk) * dim * size + 8 * read)


def make_landmarks(
    k: Tensor, is_text: Tensor | None, *, chunk: int, budget: int, outliers: int, local: int = 4
) -> Landmarks:
    """Landmarks and outliers of exact keys.

    Args:
        k: (B, n, G, D) after RoPE.
        is_text: (B, n) booleans, False for padding, which counts in no mean; None: no padding.
        chunk: tokens of a chunk; the last one may be short.
        budget: tokens that a step selects.
        outliers: chunks of each KV head to keep; all of them if there are fewer.
        local: last full chunks that are kept too, with the rest of a chunk after them.
    """
    batch, tokens = k.shape[:2]
    is_text = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if is_text is None else is_text
    short = -tokens % chunk
    chunks = F.pad(k, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, chunk)).float()  # B, chunks, chunk, G, D
    real = F.pad(is_text, (0, short)).unflatten(1, (-1, chunk))[..., None, None]
    means = (chunks * real).sum(2) / real.sum(2).clamp(min=1)
    likeness = F.cosine_similarity(chunks, means[:, :, None], dim=-1).masked_fill(~real[..., 0], torch.inf)
    count, last = always_read(tokens, chunk=chunk, outliers=outliers, local=local)
    likeness[:, likeness.shape[1] - last :] = -torch.inf
    least = likeness.amin(2).mT.topk(count, dim=-1, largest=False).indices  # B, G, count
    index = (least[..., None] * chunk + torch.arange(chunk, device=k.device)).flatten(-2).clamp(max=tokens - 1)
    kept = k.gather(1, index.mT[..., None].expand(-1, -1, -1, k.shape[-1]))  # B, count · chunk, G, D
    budget = min(budget, -(-tokens // chunk) * chunk)
    return Landmarks(means.to(k.dtype), least, kept.contiguous(), chunk, budget)


def check_selection(name: str, plan: KVPlan, selecting: set[int]) -> None:
    """Raise `UserError`, naming the method, if a layer reads a slot of `selecting`, whose tokens are selected, together
    with another."""
    for layer in range(len(plan)):
        sources = plan.keys(layer).layers
        if plan.reads_at_once(layer) and selecting & set(sources):
            raise UserError(
                f"{name}: select: layer {layer} reads several slots, {plan.keys(layer).text(layer)}; allowed: plans "
                "whose layers read the keys of one slot"
            )
        if len(sources) > 1 and selecting & set(sources):
            raise UserError(
                f"{name}: select: the keys of layer {layer} are made of the slots {list(sources)}; allowed: plans "
                "whose layers read the keys of one slot"
            )
