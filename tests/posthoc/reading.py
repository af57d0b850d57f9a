"""Compressed caches of an engine's model, and what it reads from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cllm.posthoc.registry import parse


def compressed_cache(engine: Any, ids: Tensor, spec: str, **options: Any) -> tuple[Any, Any]:
    """The cache of `ids`, compressed by the method of `spec`, which has watched the pass; and the exact cache.

    `options` go to the model's pass.
    """
    method, cache = parse(spec), engine.new_cache()
    with method.watch(engine):
        if options:
            engine.model.hidden(ids, cache=cache, **options)
        else:
            engine.hidden(ids, cache)
    return engine.compress(cache, method), cache


def read_on(engine: Any, cache: Any, ids: Tensor, parts: Iterable[int]) -> Tensor:
    """Logits of `ids` (B, T) after the cache, read in passes of `parts` tokens."""
    return torch.cat([engine.logits(part, cache) for part in ids.split(list(parts), dim=1)], dim=1)


def assert_read_as_alone(
    engine: Any, ids: Tensor, prefix: int, starts: Tensor, spec: str, found: Sequence[Tensor], tolerance: float
) -> None:
    """Each of `found`, logits (B, T, V) of the tokens after `prefix`, which are compressed: every row is that of the
    sequence alone, without its padding of `starts` (B,) columns."""
    for row, start in enumerate(starts.tolist()):
        alone, _ = compressed_cache(engine, ids[row : row + 1, start:prefix], spec)
        expected = engine.logits(ids[row : row + 1, prefix:], alone)[0]
        for logits in found:
            torch.testing.assert_close(logits[row], expected, atol=tolerance, rtol=tolerance)
