"""H2O (arXiv 2306.14048): the last tokens, and those that got the most attention from all queries so far."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cllm.posthoc.evicting import Union, Voting
from cllm.posthoc.registry import register
from cllm.posthoc.slots import CompressibleSlots


@register(
    "h2o",
    summary="the last tokens, and those of the most attention from all queries of the prompt",
    sweep=("h2o:ratio={ratio}",),
)
class H2O(Voting):
    """Heavy hitters: score_s = Σ_t a_ts over all queries t of the prompt, for every KV head.

    The paper updates the scores and evicts a token at each step. Here the prompt is evicted once, with the scores after
    its last token. All of its queries are recorded while the cache is filled, which takes n · H · D numbers a layer
    until the compression is done.
    """

    no_recompress: ClassVar[str | None] = "the queries of later tokens are not recorded, and no score has their votes"

    recent: float = Field(0.5, ge=0, le=1)
    """Share of the kept tokens, sinks left out, that are the last ones."""

    @property
    def observed(self) -> int | None:
        return None

    def recent_tokens(self, count: int) -> int:
        return round(self.recent * count)

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        return self.received(cached, union)
