"""The contexts of the last tokens of a prompt, which alone continue in its highest layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cllm.cache.paged import PagedPass
from cllm.model.context import CacheLayout, Context
from cllm.model.requests import last_tokens

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache


def with_tail(context: Context, cache: KVCache | PagedPass | None, n: int) -> Context:
    """`context`, of whose tokens only the last `n` continue."""
    return context.with_tail(n) if n > 1 else replace(context, tail=last_token(context, cache))


def last_token(context: Context, cache: KVCache | PagedPass | None) -> Context:
    """The context in which only the last token of `context` continues; for a `PagedPass`, that of each request."""
    if isinstance(cache, PagedPass):
        return last_tokens(context, cache)
    layout = context.cache_layout
    if layout is None:
        ids = context.document_ids
        starts = None if ids is None else (ids != ids[:, -1:]).sum(1)
        layout = CacheLayout(context.positions.new_zeros(1), starts, context.length)
    return Context(context.rope_config, context.positions[:, -1:], backend=context.backend, cache_layout=layout)
