"""From a filled cache to a compressed one: the part that cllm's and transformers' caches have in common.

Only slots with full attention are compressed. A windowed slot forgets its tokens by itself and a recurrent state has no
tokens, so both are copied. Of a latent slot (MLA) the latent is compressed and the RoPE key is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.absorb import check_can_absorb
from cllm.posthoc.code import Code, Codes, Exact, Prefix
from cllm.posthoc.eviction import equal_parts, evict
from cllm.posthoc.method import Compressor
from cllm.posthoc.slots import NOTHING_TO_COMPRESS, CompressibleSlots, squares

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The cost of a compression."""

    seconds: float
    """Of the compression alone; errors are measured afterwards."""
    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    """For each slot ||X' - X|| / ||X|| (Frobenius) of keys (`k`; the same before and after RoPE, which changes no norm)
    and values (`v`), without sinks and padding, the mean over sequences. Evicted tokens count as 0 in X'."""
    read_flops: int = 0
    """Floating-point operations of the matrix products that rebuild all compressed keys and values once; 0 if errors
    are not measured."""


@torch.no_grad()
def encode(
    method: Compressor, cached: CompressibleSlots, *, measure: bool = True
) -> tuple[dict[int, tuple[Prefix, Slot]], Outcome]:
    """The compressed prefix and the exact sinks (B, s, ...) of every slot that the method stores, and the cost.

    Raises `UserError` if there are no slots, and as `method.encode` does.
    """
    if not cached.slots:
        raise UserError(f"{method.name}: {NOTHING_TO_COMPRESS}")
    if cached.evicted and not method.evicts:
        raise UserError(
            f"{method.name}: tokens of the cache were evicted, and those that are left are not the same in all slots; "
            "allowed: streaming, or low rank or a quantiser after the + of the evicting method"
        )
    if method.encoder.keys_before_rope and cached.evicted.keys() - cached.latent - cached.columns.keys():
        raise UserError(
            f"{method.encoder.name}: tokens of the cache were evicted before, and the positions of those that are left "
            "are not stored; allowed: an exact cache"
        )
    began = _now(cached)
    left = evict(cached, method.kept(cached))
    prefixes: dict[int, tuple[Prefix, Slot]] = {}
    for part in equal_parts(left):
        prefixes |= _encode_part(method.encoder, part)
    seconds = _now(cached) - began
    if not measure:
        return prefixes, Outcome(seconds)
    read_flops = sum(code.read_flops() for prefix, _ in prefixes.values() for code in (prefix.k, prefix.v))
    return prefixes, Outcome(seconds, _errors(method, prefixes, left, cached), read_flops)


def _encode_part(method: Compressor, cached: CompressibleSlots) -> dict[int, tuple[Prefix, Slot]]:
    """The prefixes and sinks of slots of one length."""
    prefixes: dict[int, tuple[Prefix, Slot]] = {}
    shares, sinks = method.shares(), cached.sinks(method.sinks)
    if not sinks.rest:
        method.check_all_sinks(sinks.length)
        check_can_absorb(method, sinks.length)
        log.info("%s: all %d tokens are sinks and stored as they are", method.name, sinks.length)
    for keys, values in cached.tensors(before_rope=method.keys_before_rope, sinks=sinks):
        k_codes: Codes = [None] * len(keys.slots)
        v_codes: Codes = k_codes
        if sinks.rest:
            with torch.autocast(keys.data[0].device.type, enabled=False):  # methods choose their precision themselves
                k_codes, v_codes = method.encode(keys, values)
        for slot, k, v in zip(keys.slots, k_codes, v_codes, strict=True):
            if slot in shares:
                continue
            rotated = k is not None and method.keys_before_rope and slot not in cached.latent
            exact = cached.slots[slot].map(sinks.without)
            prefix = Prefix(
                _code_or_copy(k, exact.k),
                _code_or_copy(v, exact.v),
                sinks,
                cached.rotation(slot, sinks) if rotated else None,
                method.landmarks(exact.k, cached.is_text(sinks.rest)) if rotated else None,
                cached.scores.get(slot),
            )
            prefixes[slot] = prefix, cached.slots[slot].map(sinks.of)
    return prefixes


def _errors(
    method: Compressor,
    prefixes: dict[int, tuple[Prefix, Slot]],
    left: CompressibleSlots,
    cached: CompressibleSlots,
) -> dict[int, dict[str, float]]:
    """See `Outcome.errors`. `left` are the slots of `cached` without evicted tokens."""
    shares = method.shares()
    errors: dict[int, dict[str, float]] = {}
    for owner in cached.slots:
        part, full = left.only(owner), cached.only(owner)
        sinks = part.sinks(method.sinks)
        read, exact = prefixes[shares.get(owner, owner)][0].read(), part.slots[owner].map(sinks.without)
        errors[owner] = {}
        for name in ("k", "v"):
            tensor, is_text = getattr(exact, name), part.is_text(sinks.rest)
            lost, stored = squares(getattr(read, name).double() - tensor.double(), is_text), squares(tensor, is_text)
            if part.evicted != full.evicted:
                evicted = (full.squares(owner, name) - part.squares(owner, name)).clamp(min=0)  # rounding
                lost, stored = lost + evicted, stored + evicted
            errors[owner][name] = _mean_of_sequences(lost, stored)
    return errors


def _code_or_copy(code: Code | None, exact: Tensor) -> Code:
    return Exact(exact.clone()) if code is None else code


def _now(cached: CompressibleSlots) -> float:
    device = next(iter(cached.slots.values())).k.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def relative_error(decoded: Tensor, exact: Tensor) -> float:
    """||decoded - exact|| / ||exact|| (Frobenius) of each sequence of (B, n, ...), the mean over sequences."""
    return _mean_of_sequences(squares(decoded.double() - exact.double(), None), squares(exact, None))


def _mean_of_sequences(lost: Tensor, stored: Tensor) -> float:
    """The mean over sequences of the root of `lost` / `stored`, sums of squares (B,) fp64."""
    return (lost / stored.clamp(min=1e-300)).sqrt().mean().item()


def mean_errors(errors: Sequence[dict[int, dict[str, float]]], sequences: Sequence[int]) -> dict[str, dict[str, float]]:
    """The mean over the sequences of several compressions: {slot: {"k": ..., "v": ...}} with names for JSON.

    Args:
        errors: `Outcome.errors` of each compression, which are means over its sequences.
        sequences: the number of sequences of each.
    """
    total, slots = sum(sequences), sorted(errors[0]) if errors else []

    def mean(slot: int, part: str) -> float:
        return sum(e[slot][part] * count for e, count in zip(errors, sequences, strict=True)) / total

    return {str(j): {part: mean(j, part) for part in ("k", "v")} for j in slots}
