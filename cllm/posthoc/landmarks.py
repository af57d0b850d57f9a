"""Landmarks and outliers of keys: what selective reconstruction stores beside a slot's factors (ShadowKV,
arXiv 2410.21465, section 4; `cllm.kernels.selection` reads it).

The landmark of a chunk is the mean of its keys after RoPE. The outliers of a KV head are the chunks that have a key
least like their landmark, by cosine: their keys are kept, and every step reads them. So are those of the last chunks,
which are near to what is asked next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels.selection import Selection
from cllm.posthoc.held import Held


@dataclass(frozen=True)
class Landmarks(Selection, Held):
    """A `Selection` that a cache stores."""


def always_read(tokens: int, *, chunk: int, outliers: int, local: int) -> tuple[int, int]:
    """Of the chunks of `tokens`: how many are read in every step, and how many of those because they are the last."""
    chunks = -(-tokens // chunk)
    last = min(local + (tokens % chunk > 0), chunks) if local else 0
    return min(last + outliers, chunks), last


def landmark_bytes(shape: torch.Size, size: int, *, chunk: int, outliers: int, local: int) -> int:
    """Bytes that `make_landmarks` stores for a sequence of keys of `shape` (B, n, G, D), `size` bytes a number."""
    tokens, heads, dim = shape[1:]
    read, _ = always_read(tokens, chunk=chunk, outliers=outliers, local=local)
    return heads * ((-(-tokens // chunk) + read * chunk) * dim * size + 8 * read)


def make_landmarks(
    k: Tensor, text: Tensor | None, *, chunk: int, budget: int, outliers: int, local: int = 4
) -> Landmarks:
    """Landmarks of exact keys.

    Args:
        k: (B, n, G, D) after RoPE.
        text: (B, n) booleans, False for padding, which counts in no mean; None: there is none.
        chunk: tokens of a chunk; the last one may be short.
        budget: tokens that a step chooses.
        outliers: chunks of each KV head to keep; all there are, if they are fewer.
        local: last full chunks to keep besides, as outliers are, and what is left of a chunk after them.
    """
    batch, tokens = k.shape[:2]
    text = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if text is None else text
    short = -tokens % chunk
    chunks = F.pad(k, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, chunk)).float()  # B, chunks, chunk, G, D
    real = F.pad(text, (0, short)).unflatten(1, (-1, chunk))[..., None, None]
    means = (chunks * real).sum(2) / real.sum(2).clamp(min=1)
    likeness = F.cosine_similarity(chunks, means[:, :, None], dim=-1).masked_fill(~real[..., 0], torch.inf)
    count, last = always_read(tokens, chunk=chunk, outliers=outliers, local=local)
    likeness[:, likeness.shape[1] - last :] = -torch.inf
    least = likeness.amin(2).mT.topk(count, dim=-1, largest=False).indices  # B, G, count
    index = (least[..., None] * chunk + torch.arange(chunk, device=k.device)).flatten(-2).clamp(max=tokens - 1)
    kept = k.gather(1, index.mT[..., None].expand(-1, -1, -1, k.shape[-1]))  # B, count · chunk, G, D
    return Landmarks(means.to(k.dtype), least, kept.contiguous(), chunk, budget)
