"""Ranks by the loss that each projection costs alone: the search of ASVD (arXiv 2312.05821).

For every tensor p and every share r of its rank, L_p(r) is the loss of calibration tokens when only p has that share.
A threshold τ gives each tensor the smallest share that costs at most τ, where share 1 costs nothing:

    r_p(τ) = min {r : L_p(r) ≤ τ}

The search takes the smallest τ at which all tensors together fit a budget. The paper measures perplexity, which orders
shares as the loss does.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.fixed_bases import Basis
from cllm.posthoc.method import Engine

P = TypeVar("P")

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the rank that are measured: the paper's, and half of its smallest."""
TOKENS = 256
"""Length of the pieces of calibration text whose loss is measured; at most `PIECES` of them."""
PIECES = 2


@torch.no_grad()
def losses_alone(
    engine: Engine, ids: Tensor, sinks: int, modules: Mapping[P, nn.Module], basis: Callable[[P, float], Basis]
) -> dict[P, list[float]]:
    """L_p(r) for each of `SHARES`, in nats a token.

    Args:
        engine: the model.
        ids: calibration tokens (B, T).
        sinks: first tokens of a piece whose keys and values stay exact.
        modules: for each tensor the module whose output it is: (B, T, width), (B, T, G, D) or (B, G, T, D).
        basis: of a tensor at a share.

    Raises:
        UserError: if there are fewer than 2 tokens, as many as an output with heads has heads, or a loss is not finite.
    """
    length = min(TOKENS, ids.shape[1])
    pieces = torch.cat([part for part in ids.split(length, dim=1) if part.shape[1] == length])[:PIECES]
    if length < 2:
        raise UserError("allocation=search needs a loss: give 2 or more calibration tokens, or allocation=uniform")

    def loss(module: nn.Module, of: Basis) -> float:
        def project(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            if y.ndim == 4 and y.shape[1] == y.shape[2] > 1:
                raise UserError(
                    f"allocation=search: of {length} calibration tokens {length - 1} are read at once, as many as "
                    f"there are heads ({y.shape[1]}), so it is not clear which axis of a tensor has the tokens; "
                    "allowed: a calibration text of any other length"
                )
            heads_first = y.ndim == 4 and y.shape[1] != length - 1
            exact = y.transpose(1, 2) if heads_first else y
            rows = of.project(exact[:, sinks:].flatten(2).float()) @ of.matrix.float().mT
            rows = rows if of.bias is None else rows + of.bias.float()
            rows = rows.view(exact[:, sinks:].shape)
            changed = torch.cat((exact[:, :sinks], rows.to(y.dtype)), dim=1)
            return changed.transpose(1, 2) if heads_first else changed

        handle = module.register_forward_hook(project)
        try:
            logits = engine.logits(pieces[:, :-1], engine.new_cache())
        finally:
            handle.remove()
        return F.cross_entropy(logits.float().flatten(0, 1), pieces[:, 1:].flatten()).item()

    found = {place: [loss(module, basis(place, share)) for share in SHARES] for place, module in modules.items()}
    if not all(math.isfinite(value) for of in found.values() for value in of):
        raise UserError("allocation=search: a loss is not finite; allowed: allocation=uniform")
    return found


def shares_at(losses: Mapping[P, Sequence[float]], threshold: float) -> dict[P, float]:
    """r_p(τ) of every tensor."""
    return {
        place: min((share for share, loss in zip(SHARES, of, strict=True) if loss <= threshold), default=1.0)
        for place, of in losses.items()
    }


def search(
    losses: Mapping[P, Sequence[float]], cost: Callable[[dict[P, float]], float], budget: float
) -> dict[P, float] | None:
    """The shares of the smallest threshold whose `cost` is at most `budget`; None: even the largest costs more."""
    thresholds = [-math.inf, *sorted({loss for of in losses.values() for loss in of})]
    low, high = 0, len(thresholds) - 1
    if cost(shares_at(losses, thresholds[high])) > budget:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(shares_at(losses, thresholds[middle])) <= budget else (middle + 1, high)
    return shares_at(losses, thresholds[high])
