"""H2O (arXiv 2306.14048): the last tokens, and those that got the most attention from all queries so far."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cllm.posthoc.evicting import Union, Voting
from cllm.posthoc.registry import register
from cllm.posthoc.slots import CompressibleSlots


@register(
    "h2o",
    summary="the last tokens, and those of the most attention from all queries so far",
    sweep=("h2o:ratio={ratio}",),
)
class H2O(Voting):
    """Heavy hitters: score_s = Σ_t a_ts over all queries t so far, for every KV head.

    The paper updates the scores and evicts a token at each step. Here the prompt is evicted once, with the scores after
    its last token, and with `every=n` later tokens n at a time: the attention that the queries of a block give to the
    tokens they see is added to the scores of those that are left, which the cache stores, a number in fp32 for each
    token and KV head. An evicted token has no score anymore, as in the paper.

    All queries of the prompt are recorded while the cache is filled, which takes n · H · D numbers a layer until the
    compression is done.
    """

    accumulates: ClassVar[bool] = True

    no_recompress: ClassVar[str | None] = "the queries of later tokens are not recorded, and no score has their votes"

    recent: float = Field(0.5, ge=0, le=1)
    """Share of the kept tokens, sinks left out, that are the last ones."""

    @property
    def observed(self) -> int | None:
        return None

    def recent_tokens(self, count: int) -> int:
        return round(self.recent * count)

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        new = self.received(cached, union)
        before = cached.scores.get(union[0])
        return new if before is None else new + F.pad(before, (0, new.shape[-1] - before.shape[-1]))
