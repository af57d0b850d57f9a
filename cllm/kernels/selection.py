"""Which compressed tokens a decoding step reads: landmarks, as in ShadowKV (arXiv 2410.21465, section 4).

The mean key of every chunk of tokens, its landmark, is scored, and the best chunks of each KV head are read, besides
those few that are always read: those whose landmark says little of them, the outliers, and the last ones.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """The keys before RoPE, or the values, of one slot; and the tokens since."""

    a: Tensor
    """(B, S, r), ranks contiguous."""
    b: Tensor
    """(B, G · D, r), ranks contiguous."""
    tail: Tensor
    """(B, T, G, D): tokens S, S + 1, ... as they are, keys after RoPE; places not filled yet may hold anything."""


@dataclass(frozen=True)
class Selection:
    """What is stored of the compressed keys of a slot to choose from them, all of it after RoPE."""

    landmarks: Tensor
    """(B, ⌈S / chunk⌉, G, D): the mean key of each chunk."""
    outliers: Tensor
    """(B, G, m) int64: chunks that are read in every step, the last ones among them."""
    outlier_keys: Tensor
    """(B, m · chunk, G, D): their keys as they are. Their values come from the factors."""
    chunk: int
    """Tokens of a chunk."""
    budget: int
    """Tokens, a multiple of `chunk`, that a step chooses besides, for each KV head."""


def chosen_chunks(selection: Selection) -> int:
    """How many chunks are chosen for each KV head, besides those that are always read."""
    return min(selection.budget // selection.chunk, selection.landmarks.shape[1] - selection.outliers.shape[2])


def chosen_tokens(marks: Tensor, selection: Selection) -> Tensor:
    """Tokens (B, G, n) int64 that a step reads: the outliers' first, then those of the chunks whose landmarks get the
    largest probability from any query head of the KV head.

    n does not depend on the scores, and nothing waits for the device. The last chunk may be short: what it lacks is
    numbers from S on, which are no tokens.

    Args:
        marks: (B, H, chunks) scores of the landmarks, -inf for chunks of padding.
        selection: what they were made from.
    """
    outliers = selection.outliers
    # Logarithms, in which no chunk is too unlikely to differ from another; a row of padding alone has none.
    weights = marks.log_softmax(-1).nan_to_num(-torch.inf).unflatten(1, (outliers.shape[1], -1)).amax(2)
    weights = weights.clamp(min=torch.finfo(marks.dtype).min).scatter(-1, outliers, -torch.inf)  # B, G, chunks
    best = weights.topk(chosen_chunks(selection), sorted=False).indices.sort(-1).values
    chunks = torch.cat((outliers, best), -1)
    return (chunks[..., None] * selection.chunk + torch.arange(selection.chunk, device=marks.device)).flatten(-2)
