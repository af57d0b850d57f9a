"""Which keys a query sees, in the forms that kernels want: rules, a dense matrix, document boundaries.

Shapes: B batch, T queries, S keys. Query t stands at key position S - T + t.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the packed documents of a batch begin and end, in the form of varlen kernels."""

    starts: Tensor
    """(B, T) booleans: the first token of each document. A row's first token always starts one."""
    cu_seqlens: Tensor
    """(N + 1,) int32: document i of the flattened batch is tokens [cu_seqlens[i], cu_seqlens[i + 1]). N does not depend
    on the data: B·T fills the places after the last document, which makes documents of no tokens."""
    max_len: int
    """T, which bounds every document; a Python int, because a kernel must not wait for the device to learn it."""


def max_documents(batch: int, length: int) -> int:
    """The N of `document_boundaries`: room for a mean document of 64 tokens and for 256 documents at least.

    More room is not free: varlen kernels pad their fp32 accumulators to a tile (64 or 128 tokens) for each document.
    """
    tokens = batch * length
    return min(tokens, max(256, tokens // 64 + batch))


def document_boundaries(document_ids: Tensor, limit: int | None = None) -> Documents:
    """Boundaries of the documents in `document_ids` (B, T), integers that ascend in each row.

    The result's shapes depend on B, T and `limit` only, and nothing here waits for the device: call it once a forward
    pass, outside of compiled code.

    Args:
        document_ids: (B, T) integers.
        limit: the most documents that the batch may hold; `max_documents(B, T)` by default.

    Raises:
        RuntimeError: (on a GPU: a device-side assertion) for more than `limit` documents.
    """
    batch, length = document_ids.shape
    tokens = batch * length
    limit = max_documents(batch, length) if limit is None else limit
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # Document i starts where the count of starts first reaches i + 1, and at B·T if it never does.
    count = starts.flatten().cumsum(0)
    ordinal = torch.arange(1, limit + 2, device=document_ids.device)
    cu_seqlens = torch.searchsorted(count, ordinal, out_int32=True)
    torch._assert_async(cu_seqlens[-1] == tokens, f"more than {limit} documents in {batch} x {length} tokens")
    return Documents(starts, cu_seqlens, length)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: never a later one, and of the others those that every rule here admits."""

    window: int | None = None
    """Only the last `window` keys, the query's own position included."""
    exclude_self: bool = False
    """Not the query's own position: it reads a layer above, whose key does not exist yet. A query that sees nothing
    gets zeros."""
    document_ids: Tensor | None = None
    """(B, S) integers, ascending in each row: only keys of the query's own document."""
    documents: Documents | None = None
    """The boundaries of `document_ids`, if they are at hand; otherwise a kernel that wants them computes them."""
    _dense: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    blocks: dict[tuple[int, int], BlockMask] = field(default_factory=dict, repr=False, compare=False)
    """The same for FlexAttention, by (T, S)."""

    @property
    def is_plain(self) -> bool:
        """Nothing but causal."""
        return self.window is None and not self.exclude_self and self.document_ids is None

    def boundaries(self) -> Documents | None:
        """`documents`, computed if need be; None without documents."""
        if self.document_ids is None or self.documents is not None:
            return self.documents
        return document_boundaries(self.document_ids)

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask as booleans, True where a query sees a key: (1 or B, 1, T, S). Built once for each shape."""
        if torch.compiler.is_compiling():  # the compiler drops what it has seen before; a cache would be a side effect
            return self._build(queries, keys, device)
        if (queries, keys) not in self._dense:
            self._dense[queries, keys] = self._build(queries, keys, device)
        return self._dense[queries, keys]

    def _build(self, queries: int, keys: int, device: torch.device) -> Tensor:
        key = torch.arange(keys, device=device)
        query = torch.arange(keys - queries, keys, device=device)[:, None]
        distance = query - key  # T, S
        seen = distance >= (1 if self.exclude_self else 0)
        if self.window is not None:
            seen = seen & (distance < self.window)
        seen = seen[None, None]
        if self.document_ids is not None:
            ids = self.document_ids
            seen = seen & (ids[:, None, keys - queries :, None] == ids[:, None, None, :])
        return seen
