"""Budgets by the entropy of attention (Kim and Jung, Mathematics 13(15), 2366, 2025): layers that look widely keep
more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import PrivateAttr
from torch import Tensor

from cllm.posthoc.evicting import Union, VotingWindow
from cllm.posthoc.eviction import Kept
from cllm.posthoc.registry import register
from cllm.posthoc.slots import CompressibleSlots
from cllm.posthoc.votes import Votes, total_received


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

    _scores: dict[Union, Tensor] = PrivateAttr(default_factory=dict)
    """Of the cache whose budgets were computed last: one pass over its queries gives both."""

    @property
    def chooses_for_batch(self) -> bool:
        return True

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        if union in self._scores:
            return self._scores.pop(union)
        return self._total(self.votes(cached, union))  # with `every`, budgets stay as they were computed for the prompt

    @staticmethod
    def _total(votes: Sequence[Votes]) -> Tensor:
        """(B, 1, n): the attention that tokens get, summed over heads."""
        return total_received(votes).sum(1, keepdim=True)

    def shares_of_budget(self, cached: CompressibleSlots, unions: Sequence[Union]) -> list[float]:
        spreads = []
        for union in unions:
            votes = self.votes(cached, union, entropy=True)
            self._scores[union] = self._total(votes)
            spreads.append(torch.stack([vote.entropy for vote in votes if vote.entropy is not None]).mean())
        return torch.stack(spreads).clamp(min=1e-6).tolist()

    def kept(self, cached: CompressibleSlots) -> Kept:
        self._scores = {}  # a new one, because copies of the method have the old one
        try:
            return super().kept(cached)
        finally:
            self._scores = {}
