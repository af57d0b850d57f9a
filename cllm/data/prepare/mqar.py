"""Documents of multi-query associative recall (Zoology, arXiv 2312.04927), as texts of whole numbers.

A document is `k1 v1 k2 v2 ... kN vN`, then the same N keys in another order, each followed by its value, at random
places among random numbers. With numbers up to V - 1, keys are from 1 to V/2 - 1 and values from V/2 on; no key and no
value occurs twice among the pairs. A query is at the slot g of two numbers after the pairs with a probability
proportional to (g + 1)^(a - 1), so that most queries follow the pairs closely. Random numbers are never a key of their
document.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cllm.data.prepare.recipe import Mqar

_EARLY = 0.01
"""a of the distribution of queries, as in the paper's code."""


def mqar_texts(spec: Mqar) -> Iterator[str]:
    """The documents of a recipe, `length - 1` numbers each. Document n depends on the seed and n alone."""
    for n in range(spec.documents):
        draw = np.random.default_rng((spec.seed, n))
        yield " ".join(map(str, _document(spec, spec.pairs[n % len(spec.pairs)], draw).tolist()))


def _document(spec: Mqar, pairs: int, draw: np.random.Generator) -> np.ndarray:
    """One document of `pairs` pairs: int64 (length - 1,)."""
    half = spec.numbers // 2
    keys = draw.permutation(np.arange(1, half))[:pairs]
    values = draw.permutation(np.arange(half, spec.numbers))[:pairs]
    others = np.setdiff1d(np.arange(1, spec.numbers), keys)
    document = draw.choice(others, spec.length - 1)
    document[: 2 * pairs] = np.stack([keys, values], axis=1).ravel()
    slots = (spec.length - 1 - 2 * pairs) // 2
    weights = np.arange(1, slots + 1) ** (_EARLY - 1)
    at = 2 * pairs + 2 * draw.choice(slots, pairs, replace=False, p=weights / weights.sum())
    document[at], document[at + 1] = keys, values
    return document
