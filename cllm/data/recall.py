"""The associative-recall slice of a loss: tokens that complete a bigram which occurred earlier in their context.

A token x_t is in the slice if the bigram (x_{t-1}, x_t) occurs at an earlier place of what the token may see: the same
window and, with document masks, the same document. Such a token can be predicted by looking up what followed x_{t-1}
before, which needs an intact cache. All other scored tokens are in the other slice. The definition is that of Zoology
(arXiv 2312.04927), without its limit on how often a bigram occurs in the training data.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cllm.kernels.cross_entropy import IGNORE

STARTS = (1, 64, 256, 1024)
"""The least distance of each group of the slice."""
GROUPS = (*(f"{low}_{high - 1}" for low, high in pairwise(STARTS)), f"{STARTS[-1]}_up")
"""Names of the groups by distance, in keys of records: `1_63`, `64_255`, `256_1023`, `1024_up`."""


def recall_distance(input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Tokens between each bigram and its previous occurrence in the same row.

    Args:
        input_ids: (B, T) int64.
        labels: (B, T) int64, the token after each of `input_ids`; `IGNORE` where it is not scored.
        document_ids: (B, T) int64, 0 or more, constant within a document; None: a row is one document.

    Returns:
        (B, T) int64: t - s for the latest s < t with the bigram (input_ids[t], labels[t]); 0 if the bigram is new, and
        where the label is `IGNORE`. Nothing waits for the device.
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    size = torch.maximum(input_ids.max(), labels.max()) + 1
    bigram = (input_ids if document_ids is None else document_ids * size + input_ids) * size + labels
    # A label that is not scored is no part of a bigram: it gets a number that occurs once.
    number, order = torch.where(labels == IGNORE, -1 - place, bigram).sort(dim=1, stable=True)
    repeated = number[:, 1:] == number[:, :-1]  # a stable sort keeps equal bigrams in the order of the text
    gaps = order.diff(dim=1) * repeated
    return torch.zeros_like(input_ids).scatter_(1, order[:, 1:], gaps)


def recall_sums(losses: Tensor, distance: Tensor, scored: Tensor) -> Tensor:
    """Sum losses by slice.

    Args:
        losses: (B, n), nats.
        distance: (B, n) int64, as `recall_distance` returns it.
        scored: (B, n) bool: the tokens that count.

    Returns:
        (1 + len(GROUPS), 2) fp64: nats and number of tokens, of the other slice first and then of each group.
    """
    group = torch.bucketize(distance.contiguous(), torch.tensor(STARTS, device=distance.device), right=True)
    members = [scored & (group == k) for k in range(1 + len(GROUPS))]
    nats = [torch.where(member, losses, 0.0).sum(dtype=torch.float64) for member in members]
    return torch.stack([torch.stack(nats), torch.stack([member.sum().double() for member in members])], dim=1)


def recall_figures(sums: Tensor) -> dict[str, float | int | None]:
    """Mean losses and numbers of tokens from sums of `recall_sums`; a loss without tokens is None.

    Returns:
        `ar_loss` and `ar_tokens` of the slice, `other_loss` of the other one, and `ar_loss_GROUP` and
        `ar_tokens_GROUP` of each group by distance.
    """

    def mean(nats: float, tokens: float) -> float | None:
        return nats / tokens if tokens else None

    rows = sums.tolist()
    nats, tokens = sums[1:].sum(dim=0).tolist()
    figures = {"ar_loss": mean(nats, tokens), "other_loss": mean(*rows[0]), "ar_tokens": int(tokens)}
    figures |= {f"ar_loss_{name}": mean(*row) for name, row in zip(GROUPS, rows[1:], strict=True)}
    return figures | {f"ar_tokens_{name}": int(row[1]) for name, row in zip(GROUPS, rows[1:], strict=True)}
