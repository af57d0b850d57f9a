"""Documents of multi-query associative recall (after Zoology, arXiv 2312.04927), as texts of whole numbers.

A document is `k1 v1 k2 v2 ... kN vN`, then queries: a random one of the N keys, followed by its value. With numbers up
to V - 1, keys are from 1 to V/2 - 1 and values from V/2 on; no key and no value occurs twice among the pairs. A quarter
of the places of queries, at random, has two random numbers instead, neither of them a key of the document.

In the paper each key is asked once, and the number after it is random. Here the value follows, as in any text, and keys
are asked with replacement: otherwise the values that were not asked for yet would give the answer away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cllm.data.prepare.recipe import Mqar

_RANDOM = 0.25
"""Share of the places of queries that have random numbers."""


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
    at = 2 * pairs + 2 * np.flatnonzero(draw.random(slots) >= _RANDOM)
    asked = draw.integers(0, pairs, len(at))
    document[at], document[at + 1] = keys[asked], values[asked]
    return document
