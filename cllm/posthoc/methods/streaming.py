"""StreamingLLM (arXiv 2309.17453): the first tokens and a window of the last ones."""

from __future__ import annotations

from cllm.posthoc.evicting import Evicting
from cllm.posthoc.registry import register


@register(
    "streaming",
    summary="the first and the last tokens; all between them are evicted",
    sweep=("streaming:ratio={ratio}",),
)
class Streaming(Evicting):
    """Sinks and the last tokens. With `recompress=n`, tokens leave the window every n tokens.

    The paper counts positions within what is kept, so that they never exceed those of training. Here tokens keep their
    true positions. With RoPE the two differ only in the distance to the sinks.
    """

    def recent_tokens(self, count: int) -> int:
        return count
