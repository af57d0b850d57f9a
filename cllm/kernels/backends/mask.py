"""Which keys a query sees, in the forms that kernels need: rules, a dense matrix, document boundaries.

Shapes: B batch, T queries, S keys. Query t has key position S - T + t.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, slots=True)
class Documents:
    """Boundaries of the packed documents of a batch, in the form of varlen kernels."""

    starts: Tensor
    """(B, T) booleans: the first token of each document. A row's first token always starts a document."""
    cu_seqlens: Tensor
    """(N + 1,) int32: document i of the flattened batch is tokens [cu_seqlens[i], cu_seqlens[i + 1]). N does not depend
    on the data: entries after the last document are B·T, which makes empty documents."""
    max_len: int
    """T, an upper bound of the documents' lengths. The longest length itself would need a device sync."""


def max_documents(batch: int, length: int) -> int:
    """The N of `document_boundaries`: enough for documents of 64 tokens on average, and at least 256.

    A larger N costs memory: varlen kernels pad their fp32 accumulators to a tile (64 or 128 tokens) for each document.
    """
    tokens = batch * length
    return min(tokens, max(256, tokens // 64 + batch))


def document_boundaries(document_ids: Tensor, limit: int | None = None) -> Documents:
    """Boundaries of the documents in `document_ids` (B, T), integers that ascend in each row.

    The result's shapes depend only on B, T and `limit`, and there is no device sync. Call it once in a forward pass,
    outside of compiled code.

    Args:
        document_ids: (B, T) integers.
        limit: maximum number of documents in the batch; `max_documents(B, T)` by default.

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
    """Which keys a query sees: its own and earlier ones, if every rule here admits them."""

    window: int | None = None
    """Only the last `window` keys, the query's own included."""
    exclude_self: bool = False
    """Not the query's own key: the query reads a layer above, whose key does not exist yet. A query that sees nothing
    gets zeros."""
    document_ids: Tensor | None = None
    """(B, S) integers, ascending in each row: only keys of the query's own document."""
    documents: Documents | None = None
    """Boundaries of `document_ids`, if already computed."""
    _dense: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    blocks: dict[tuple[int, int], BlockMask] = field(default_factory=dict, repr=False, compare=False)
    """FlexAttention's block masks, cached by (T, S)."""

    @property
    def is_plain(self) -> bool:
        """Whether the mask is only causal."""
        return self.window is None and not self.exclude_self and self.document_ids is None

    def boundaries(self) -> Documents | None:
        """Boundaries of the documents, computed if `documents` is None; None without documents."""
        if self.document_ids is None or self.documents is not None:
            return self.documents
        return document_boundaries(self.document_ids)

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask as booleans (1 or B, 1, T, S), True if a query sees a key. Cached for each shape."""
        if torch.compiler.is_compiling():  # filling a cache would be a side effect, and the compiler removes duplicates
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
