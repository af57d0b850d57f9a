"""Selection of the tokens that a decoding step reads, by landmarks as in ShadowKV (arXiv 2410.21465, section 4).

The landmark of a chunk of tokens is its mean key. Landmarks are scored, and each KV head reads its best chunks. A few
chunks are always read: outliers, whose landmark represents them badly, and the last chunks.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """The keys before RoPE, or the values, of one slot as low-rank factors; and its later tokens."""

    a: Tensor
    """(B, S, r), ranks contiguous. Without `b`, which only values may lack: the uncompressed values (B, S, G · D)
    themselves, also in host memory if tokens are selected."""
    b: Tensor | None
    """(B, G · D, r), ranks contiguous."""
    tail: Tensor
    """(B, T, G, D): tokens S, S + 1, ... uncompressed, keys after RoPE; free entries are undefined."""


@dataclass(frozen=True)
class Table:
    """RoPE of the compressed tokens, for kernels: row i is that of token i, or of token first + i if sequences begin at
    `first`."""

    cos: Tensor
    """(positions, D / 2) fp32 for at least S positions: the first row of `rope_table`'s cos."""
    sin: Tensor
    """(positions, D / 2) fp32: the second row of `rope_table`'s sin, which is not negated."""
    turn: float | None = None
    """Radians by which channel pair D / 4 turns from a row to the next, if each row's position is the one before it,
    plus one; from any first position. None: positions may have gaps."""


@dataclass(frozen=True)
class Selection:
    """Summaries of the compressed keys of a slot, all after RoPE, that select which tokens a decoding step reads."""

    landmarks: Tensor
    """(B, ⌈S / chunk⌉, G, D): the mean key of each chunk."""
    outliers: Tensor
    """(B, G, m) int64: chunks that are read in every step, including the last ones."""
    outlier_keys: Tensor
    """(B, m · chunk, G, D): their uncompressed keys. Their values come from the factors."""
    chunk: int
    """Tokens of a chunk."""
    budget: int
    """Tokens that a step selects for each KV head besides those it always reads, a multiple of `chunk`."""


def chosen_chunks(selection: Selection) -> int:
    """How many chunks are chosen for each KV head, in addition to those that are always read."""
    return min(selection.budget // selection.chunk, selection.landmarks.shape[1] - selection.outliers.shape[2])


def chosen_tokens(landmark_scores: Tensor, selection: Selection) -> Tensor:
    """Tokens (B, G, n) int64 that a step reads: the outliers' first, then those of the chunks whose landmarks get the
    largest probability from any query head of the KV head.

    n does not depend on the scores, and there is no device sync. The last chunk may be short; it is padded with indices
    from S on.

    Args:
        landmark_scores: (B, H, chunks), -inf for chunks of padding.
        selection: the selection that has these landmarks.
    """
    outliers = selection.outliers
    # Log-probabilities: probabilities of unlikely chunks would underflow. Those of a row of only padding are NaN.
    weights = landmark_scores.log_softmax(-1).nan_to_num(-torch.inf).unflatten(1, (outliers.shape[1], -1)).amax(2)
    weights = weights.clamp(min=torch.finfo(weights.dtype).min).scatter(-1, outliers, -torch.inf)  # B, G, chunks
    best = weights.topk(chosen_chunks(selection), sorted=False).indices.sort(-1).values
    chunks = torch.cat((outliers, best), -1)
    return (chunks[..., None] * selection.chunk + torch.arange(selection.chunk, device=chunks.device)).flatten(-2)
