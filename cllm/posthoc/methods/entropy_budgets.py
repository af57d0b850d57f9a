"""Budgets by the entropy of attention (Kim and Jung, Mathematics 13(15), 2366, 2025): layers that look widely keep
more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cllm.posthoc.evicting import Union, VotingWindow
from cllm.posthoc.registry import register
from cllm.posthoc.slots import CompressibleSlots
from cllm.posthoc.votes import total_received


@register(
    "entropy",
    summary="tokens of the most attention, more of them in layers whose attention is spread more widely",
    sweep=("entropy:ratio={ratio}",),
)
class Entropy(VotingWindow):
    """With L slots and a mean budget of B tokens, slot l keeps

        B_l = B L H_l / Σ_m H_m,    H = mean over layers that read the slot, heads and queries t of -Σ_s a_ts ln a_ts

    at least sinks and window and at most all, with the rest shared out among the others. All heads of a slot keep the
    same tokens, those of the largest Σ_t a_ts over heads. Queries are the prompt's last `window`. The paper gives no
    formula of the budget; the proportional one is our reading. In a batch, H is the mean over its sequences.
    """

    needs_entropy: ClassVar[bool] = True

    @property
    def chooses_for_batch(self) -> bool:
        return True

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        return total_received(self.votes(cached, union)).sum(1, keepdim=True)

    def shares_of_budget(self, cached: CompressibleSlots, unions: Sequence[Union]) -> list[float]:
        spreads = [
            torch.stack([vote.entropy for vote in self.votes(cached, union) if vote.entropy is not None]).mean()
            for union in unions
        ]
        return torch.stack(spreads).clamp(min=1e-6).tolist()
