"""Designs of equal cache bytes or training FLOPs. Equal parameters are `model.match_params`, which the model resolves.

A design's cache is changed by the keys that its preset has: KV heads, sharing factor, number of owners, rank. Keys that
the design itself gives are not changed. Of all choices the one nearest to the wanted share of mha's resident cache is
taken, then the one that changes fewer keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from cllm.config import Config, ModelConfig
from cllm.errors import UserError

_SHARING = ("factor", "n_storage", "n_owners", "n_shared", "n_lower")
"""Keys of presets that set how many layers own keys and values, the preferred first."""
_HEADS, _RANK = "n_kv_heads", "kv_lora_rank"


@dataclass(frozen=True, slots=True)
class CacheMatch:
    """A design's cache, changed to a share of mha's."""

    kv: dict[str, Any]
    """Keys of `model.kv` that were chosen; empty: the design as declared is nearest."""
    wanted: Fraction
    reached: float
    """Share of mha's resident cache, in bytes."""


def cache_share(model: ModelConfig) -> float:
    """Resident bytes of a model's cache relative to mha's."""
    from cllm.cache.accounting import kv_bytes, mha_twin

    return kv_bytes(model).relative_to(kv_bytes(mha_twin(model)))[0]


def match_cache(model: ModelConfig, wanted: Fraction, given: set[str]) -> CacheMatch:
    """The keys of `model.kv` with which the resident cache is nearest to `wanted` times mha's.

    Args:
        model: of the design as declared.
        wanted: share of mha's bytes.
        given: keys of `model.kv` that the design gives, which stay.

    Raises:
        UserError: for a plan without such keys.
    """
    best: tuple[float, int, int] | None = None
    found = CacheMatch({}, wanted, cache_share(model))
    tried = 0
    for order, kv in enumerate(_choices(model, wanted, given)):
        share = found.reached if not kv else _share_with(model, kv)
        if share is None:
            continue
        tried += bool(kv)
        rank = (abs(share - wanted), len(kv), order)
        if best is None or rank < best:
            best, found = rank, CacheMatch(kv, wanted, share)
    if not tried and abs(found.reached - wanted) > 1e-9:
        raise UserError(
            f"match.cache_bytes: the plan {model.design} has no key left to reach {wanted} of mha's cache; it has "
            f"{found.reached:.3f}; allowed: designs that leave n_kv_heads, a sharing factor or a rank open"
        )
    return found


def _share_with(model: ModelConfig, kv: dict[str, Any]) -> float | None:
    try:
        return cache_share(_changed(model, kv))
    except (ValidationError, UserError):
        return None


def _changed(model: ModelConfig, kv: dict[str, Any]) -> ModelConfig:
    data = model.model_dump(mode="json")
    return ModelConfig.model_validate({**data, "kv": {**data["kv"], **kv}})


def _choices(model: ModelConfig, wanted: Fraction, given: set[str]) -> Iterator[dict[str, Any]]:
    """The declared plan, then all values of its free keys, a key of sharing before heads."""
    yield {}
    fields = type(model.kv).model_fields
    free = [key for key in (*_SHARING, _HEADS, _RANK) if key in fields and key not in given]
    if _RANK in free:
        yield {_RANK: _rank(model, wanted)}
        return
    sharing = [(key, range(1, model.n_layers + 1)) for key in free if key in _SHARING]
    heads = [n for n in range(1, model.n_heads + 1) if model.n_heads % n == 0] if _HEADS in free else []
    for key, values in sharing:
        yield from ({key: value} for value in values)
    yield from ({_HEADS: n} for n in heads)
    for key, values in sharing:
        yield from ({key: value, _HEADS: n} for value, n in itertools.product(values, heads))


def _rank(model: ModelConfig, wanted: Fraction) -> int:
    """The rank whose cache is nearest to the wanted share, which is linear in the rank."""
    one, two = (cache_share(_changed(model, {_RANK: rank})) for rank in (1, 2))
    return max(1, round(1 + (float(wanted) - one) / (two - one)))


def scaled_tokens(tokens: int, config: Config, baseline: Config) -> int:
    """Tokens with which a design's training takes as many FLOPs as the baseline's with `tokens`.

    Both configs need `model.vocab_size`: the head's product counts.
    """
    return round(tokens * _flops(baseline) / _flops(config))


def _flops(config: Config) -> float:
    from cllm.model.sizes import meta_decoder, training_flops_per_token

    return training_flops_per_token(meta_decoder(config.model), config.data.seq_len)
