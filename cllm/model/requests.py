"""The context of a pass over several requests, whose tokens are in one row (continuous batching).

Requests with several tokens (prompts, or chunks of them) are computed one by one, from views of the row and the slots.
Requests with one token are decoded together: their cached entries are gathered into a batch, padded on the left. Only
requests of similar length share a batch, so that at most half of it is padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from cllm.cache.paged import PagedPass
from cllm.config import Rope
from cllm.model.context import CacheLayout, Context, Group


def request_context(rope: Rope, positions: Tensor, backend: str, pages: PagedPass, *, dtype: torch.dtype) -> Context:
    """The context of a pass over the tokens at `positions` (1, T), those of all requests of `pages` in order.

    `dtype` is that of the queries. In fp32 the backend `auto` is sdpa here. The faster kernel, flex, is compiled for
    every number of tokens, and the numbers change with every pass.
    """
    if backend == "auto" and dtype == torch.float32:
        backend = "sdpa"
    ends = pages.ends(positions.device)
    cached = {sum(counts): counts for counts in pages.cached}
    queries = list(pages.queries)
    context = Context(rope, positions, backend=backend, ends=ends)
    context.groups = _groups(context, queries, cached)
    starts = list(accumulate(queries, initial=0))
    for total, counts in cached.items():
        firsts = list(accumulate(counts, initial=0))
        new = [torch.arange(firsts[i + 1] - n, firsts[i + 1]) for i, n in enumerate(queries)]
        context.new_entries[total] = torch.cat(new).to(positions.device)
    assert starts[-1] == positions.shape[1], "every token of the row belongs to a request"
    return context


def last_tokens(context: Context, pages: PagedPass) -> Context:
    """The context in which only the last token of each request continues."""
    assert context.ends is not None
    ones = [1] * len(pages.queries)
    last = Context(
        context.rope_config,
        context.positions[:, context.ends],
        backend=context.backend,
        ends=torch.arange(len(ones), device=context.positions.device),
    )
    last.groups = _groups(last, ones, {sum(counts): counts for counts in pages.cached})
    return last


def _groups(context: Context, queries: Sequence[int], cached: Mapping[int, Sequence[int]]) -> tuple[Group, ...]:
    """The requests in the groups that attention computes together. `cached` has the totals of its counts as keys."""
    longest = cached[max(cached)]
    firsts = {total: list(accumulate(counts, initial=0)) for total, counts in cached.items()}
    row = list(accumulate(queries, initial=0))
    groups, decoded = [], defaultdict(list)
    for i, count in enumerate(queries):
        if count == 1:
            decoded[longest[i].bit_length()].append(i)
            continue
        entries = {total: slice(first[i], first[i + 1]) for total, first in firsts.items()}
        groups.append(Group(slice(row[i], row[i + 1]), entries, _alone(context, row[i], count, longest[i])))
    for members in decoded.values():
        if len(members) == 1:
            (i,) = members
            entries = {total: slice(first[i], first[i + 1]) for total, first in firsts.items()}
            groups.append(Group(slice(row[i], row[i + 1]), entries, _alone(context, row[i], 1, longest[i])))
        else:
            groups.append(_batch(context, members, row, cached, firsts))
    return tuple(groups)


def _alone(context: Context, first: int, count: int, total: int) -> Context:
    """The context of one request: its `count` tokens from index `first` of the row on, the last of `total`."""
    positions = context.positions[:, first : first + count]
    layout = CacheLayout(positions.new_full((1,), total - count), None, total)
    return Context(context.rope_config, positions, backend=context.backend, cache_layout=layout)


def _batch(
    context: Context,
    members: Sequence[int],
    row: Sequence[int],
    cached: Mapping[int, Sequence[int]],
    firsts: Mapping[int, Sequence[int]],
) -> Group:
    """Requests of one token each as a batch; entries before a request's first are any other entries, never seen."""
    device, queries = context.positions.device, torch.tensor([row[i] for i in members])
    entries: dict[int, slice | Tensor] = {}
    for total, counts in cached.items():
        ends = torch.tensor([firsts[total][i + 1] for i in members])
        size = max(counts[i] for i in members)
        entries[total] = (ends[:, None] + torch.arange(-size, 0)).clamp(min=0).to(device)
    counts = cached[max(cached)]
    size = max(counts[i] for i in members)
    starts = torch.tensor([size - counts[i] for i in members], device=device)
    queries = queries.to(device)
    layout = CacheLayout(queries.new_full((1,), size - 1), starts, size)
    positions = context.positions[0, queries][:, None]
    alone = Context(context.rope_config, positions, backend=context.backend, cache_layout=layout)
    return Group(queries, entries, alone)
