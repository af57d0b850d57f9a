"""SnapKV (arXiv 2404.14469): tokens for which the prompt's last queries vote, with their neighbours."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from cllm.posthoc.evicting import Union, VotingWindow
from cllm.posthoc.registry import register
from cllm.posthoc.slots import CompressibleSlots


@register(
    "snapkv",
    summary="the last tokens, and those of the most attention from their queries, pooled over neighbours",
    sweep=("snapkv:ratio={ratio}",),
)
class SnapKV(VotingWindow):
    """score_s = pool over |i - s| ≤ kernel / 2 of Σ_t a_ti, t over the last `window` queries, for every KV head."""

    kernel: int = Field(7, ge=1)
    """Neighbouring tokens, an odd number, whose votes are pooled; 1: none."""
    pool: Literal["max", "mean"] = "max"
    """How votes are pooled."""

    @model_validator(mode="after")
    def _odd_kernel(self) -> SnapKV:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: has no middle; allowed: odd numbers")
        return self

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        votes = self.received(cached, union)
        before = votes[..., : max(votes.shape[-1] - self.window, 0)]  # the window itself is kept in any case
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        pooled = pool(before, self.kernel, stride=1, padding=self.kernel // 2) if before.shape[-1] else before
        return F.pad(pooled, (0, votes.shape[-1] - before.shape[-1]))
