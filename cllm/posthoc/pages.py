"""Exact keys in pages with bounds, from which a decode step selects what it reads (Quest, arXiv 2406.10774, section 3).

    bound of a page for q:   u = Σ_d max(q_d low_d, q_d high_d)  ≥  q · k for all keys k of the page

with low and high the smallest and largest number of each channel in the page's keys after RoPE. A KV head reads the
pages of the largest u of any of its query heads; sinks and later tokens are read in any case.

Shapes: B batch, n compressed tokens, P pages, T exact tokens (sinks, then later ones), H query heads, G KV heads, D
channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels.decode import Visible
from cllm.posthoc.code import Code, Prefix
from cllm.posthoc.deferred import StoredRead


@dataclass(frozen=True)
class PagedKeys(Code):
    """Exact keys, and the bounds of their pages."""

    data: Tensor
    """(B, n, G, D) after RoPE."""
    low: Tensor
    """(B, P, G, D): the smallest number of each channel in a page, padding left out."""
    high: Tensor
    """(B, P, G, D): the largest."""
    page: int
    """Tokens of a page; the last page may be short."""
    budget: int
    """Pages that a step reads."""

    def decode(self) -> Tensor:
        return self.data

    @property
    def selects(self) -> bool:
        return True


def make_pages(k: Tensor, is_text: Tensor | None, *, page: int, budget: int) -> PagedKeys:
    """`k` (B, n, G, D) with the bounds of its pages. `is_text` (B, n) is False for padding; None: no padding."""
    short = -k.shape[1] % page
    real = k.new_ones(k.shape[:2], dtype=torch.bool) if is_text is None else is_text
    real = F.pad(real, (0, short)).unflatten(1, (-1, page))[..., None, None]  # B, P, page, 1, 1
    pages = F.pad(k, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, page))
    low, high = (pages.masked_fill(~real, fill) for fill in (torch.inf, -torch.inf))
    bounds = (low.amin(2), high.amax(2))
    low, high = (torch.where(real.any(2), bound, 0) for bound in bounds)  # pages of padding are never selected
    return PagedKeys(k.clone(), low, high, page, budget)


@dataclass(frozen=True)
class PagedRead(StoredRead):
    """The keys or the values of a slot in a decode step that selects pages."""

    def _attend(
        self, queries: Sequence[Tensor], parts: Sequence[Any], n_keys: int, visible: Visible, scale: float
    ) -> list[Tensor]:
        """`decode_attention` over the selected pages and the exact tokens."""
        (q,), (key, *values) = queries, parts
        k = key.exact.k
        columns, exact_columns = _columns(key.prefix, k.shape[1], k.device)
        seen, exact_seen = (_is_seen(c, visible) for c in (columns, exact_columns))  # B or 1, n and T
        q = q.unflatten(1, (k.shape[2], -1)).float()  # B, G, H/G, D
        chosen, is_token = select_tokens(q, _paged(key.prefix), seen)  # B, G, m
        index = chosen.mT[..., None].expand(-1, -1, -1, k.shape[3])  # B, m, G, D
        chosen_seen = is_token & seen[:, None].expand(len(q), q.shape[1], -1).gather(2, chosen)
        all_seen = torch.cat((chosen_seen, exact_seen[:, None].expand(*chosen_seen.shape[:2], -1)), dim=2)
        k = torch.cat((key.prefix.k.decode().gather(1, index), k), dim=1).float()  # B, m + T, G, D
        scores = scale * torch.einsum("bgrd,bngd->bgrn", q, k)
        weights = scores.masked_fill(~all_seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        outs = []
        for value in values:
            v = torch.cat((value.prefix.v.decode().gather(1, index), value.exact.v), dim=1).float()
            outs.append(torch.einsum("bgrn,bngd->bgrd", weights, v).flatten(1, 2).to(queries[0].dtype))
        return outs


def select_tokens(q: Tensor, keys: PagedKeys, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens (B, G, m) int64 of the pages that a step reads, and whether each is one: the last page may be short.

    Args:
        q: (B, G, H / G, D) fp32.
        keys: of the slot.
        seen: (B or 1, n) booleans: tokens that the query sees; pages without any are selected last.
    """
    tokens, pages = keys.data.shape[1], keys.low.shape[1]
    low, high = keys.low.float(), keys.high.float()
    upper = torch.einsum("bgrd,bpgd->bgrp", q.clamp(min=0), high)
    bounds = upper + torch.einsum("bgrd,bpgd->bgrp", q.clamp(max=0), low)
    has_seen = F.pad(seen, (0, pages * keys.page - tokens)).unflatten(1, (pages, keys.page)).any(2)  # B or 1, P
    bounds = bounds.amax(2).masked_fill(~has_seen[:, None], -torch.inf)  # B, G, P
    best = bounds.topk(min(keys.budget, pages), dim=-1).indices
    chosen = (best[..., None] * keys.page + torch.arange(keys.page, device=q.device)).flatten(-2)
    return chosen.clamp(max=tokens - 1), chosen < tokens


def _paged(prefix: Prefix) -> PagedKeys:
    assert isinstance(prefix.k, PagedKeys)
    return prefix.k


def _columns(prefix: Prefix, exact: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns (B or 1, n) of the compressed tokens and (B or 1, T) of the exact ones."""
    sinks = prefix.sinks
    first = sinks.first(device)  # B or 1, 1
    rest, later = torch.arange(sinks.rest, device=device), torch.arange(exact - sinks.count, device=device)
    late = (later + sinks.length).expand(len(first), -1)
    compressed = rest + sinks.count * (rest >= first)
    return compressed, torch.cat((first + torch.arange(sinks.count, device=device), late), dim=1)


def _is_seen(columns: Tensor, visible: Visible) -> Tensor:
    """(B or 1, n): whether the new token sees the tokens at `columns` (B or 1, n)."""
    seen = columns <= visible.column - int(visible.exclude_self)
    return seen if visible.first is None else seen & (columns >= visible.first[:, None])
