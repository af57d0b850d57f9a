"""Causal attention behind one function, whatever kernel computes it.

Shapes: B batch, T queries, S keys, H query heads, G KV heads (H a multiple of G), D channels of a query and key head,
E channels of a value head. Query t stands at key position S - T + t. A kernel joins by a function in
`_BACKENDS`; nothing outside this module knows which one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: never a later one, and of the others those that every rule here admits."""

    window: int | None = None
    """Only the last `window` keys, the query's own position included."""
    exclude_self: bool = False
    """Not the query's own position: it reads a layer above, whose key does not exist yet. A query that sees nothing
    gets zeros."""
    document_ids: Tensor | None = None
    """(B, S) integers: only keys of the query's own document."""
    _dense: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_plain(self) -> bool:
        """Nothing but causal."""
        return self.window is None and not self.exclude_self and self.document_ids is None

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask as booleans, True where a query sees a key: (1 or B, 1, T, S). Built once a shape."""
        if (queries, keys, device) not in self._dense:
            key = torch.arange(keys, device=device)
            query = torch.arange(keys - queries, keys, device=device)[:, None]
            distance = query - key  # T, S
            seen = distance >= (1 if self.exclude_self else 0)
            if self.window is not None:
                seen &= distance < self.window
            seen = seen[None, None]
            if self.document_ids is not None:
                ids = self.document_ids
                seen = seen & (ids[:, None, keys - queries :, None] == ids[:, None, None, :])
            self._dense[queries, keys, device] = seen
        return self._dense[queries, keys, device]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: runs everywhere, masks as a dense boolean matrix."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B, heads, T or S, channels
    if mask.is_plain and q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    seen = mask.dense(q.shape[2], k.shape[2], q.device)
    if not mask.exclude_self:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    # The first token of a document sees nothing: softmax over nothing is NaN, so let it see all and clear the result.
    blind = ~seen.any(dim=-1, keepdim=True)  # ., 1, T, 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind, scale=scale, enable_gqa=grouped)
    return out.masked_fill(blind, 0).transpose(1, 2)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]] = {"sdpa": _sdpa}
_chosen: set[tuple[str, str]] = set()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(scale q kᵀ + mask) v.

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), S >= T.
        v: (B, S, G, E).
        mask: which keys each query sees; always causal.
        scale: factor on the scores; D^-0.5 by default.
        backend: a kernel by name, or `auto`, which logs once what it chose for a device.

    Returns:
        (B, T, H, E) in the dtype of `v`.

    Raises:
        UserError: naming `attention.backend`, for a kernel that does not exist.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = "sdpa" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise UserError(f'attention.backend is "{backend}"; allowed: auto, {", ".join(_BACKENDS)}')
    if backend == "auto" and (q.device.type, name) not in _chosen:
        _chosen.add((q.device.type, name))
        log.info("attention.backend auto chose %s on %s: the only kernel there is", name, q.device.type)
    return _BACKENDS[name](q, k, v, mask, scale)
