"""From a filled cache to a compressed one: what both kinds of cache have in common.

Only slots with full attention are compressed. A windowed slot forgets its tokens by itself and a recurrent state has
none, so both stay as they are. Of a latent slot (MLA) the latent is compressed and the RoPE key stays.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.code import Code, Compressor, Exact, Part, Prefix, Rotation
from cllm.posthoc.sinks import Sinks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filled:
    """The slots of a filled cache that can be compressed."""

    slots: Mapping[int, Slot]
    """(B, n, G, D) each, keys after RoPE; of a latent slot (B, n, R) and the RoPE key."""
    latent: frozenset[int]
    """The latent ones."""
    first: int
    """Column of the first token."""
    starts: Tensor | None
    """(B,) int64: columns of padding before each sequence."""
    total: int
    """Bytes of the whole cache, slots that are not here and states included."""
    beside: int
    """Bytes of those."""
    table: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    """RoPE's cos and signed sin for a head dimension and positions (B or 1, n). Compressed slots keep it, so it must
    hold nothing of the cache."""

    def sinks(self, count: int) -> Sinks:
        """The first `count` tokens of every sequence, or all there are."""
        length = next(iter(self.slots.values())).k.shape[1]
        return Sinks(min(count, length), length, self.starts)

    def rotation(self, slot: int, sinks: Sinks | None = None) -> Rotation:
        """Of the keys of `slot`, without `sinks`."""
        k, count = self.slots[slot].k, 0 if sinks is None else sinks.count
        table = functools.partial(self.table, k.shape[-1])
        return Rotation(table, self.first + count, k.shape[1] - count, self.starts)

    def text(self, length: int) -> Tensor | None:
        """(B, n) booleans, False for padding; None without padding. Sinks may be left out: they come after padding."""
        if self.starts is None:
            return None
        columns = torch.arange(self.first, self.first + length, device=self.starts.device)
        return columns >= self.starts[:, None]

    def parts(self, *, before_rope: bool, sinks: Sinks | None = None) -> list[tuple[Part, Part | None]]:
        """Keys and values of the slots of a kind, without `sinks`: keys and values first, then latents."""
        found: list[tuple[Part, Part | None]] = []
        numbers = {j: slot.k.numel() + (0 if j in self.latent else slot.v.numel()) for j, slot in self.slots.items()}
        stays: float = self.beside + sum(self.slots[j].v.nbytes for j in self.latent)
        sinks = self.sinks(0) if sinks is None else sinks
        for j, slot in self.slots.items():
            stays += numbers[j] // sinks.length * sinks.count * slot.k.itemsize
        for latent in (False, True):
            slots = tuple(j for j in sorted(self.slots) if (j in self.latent) == latent)
            if not slots:
                continue
            k, v = (tuple(sinks.without(getattr(self.slots[j], part)) for j in slots) for part in ("k", "v"))
            if before_rope and not latent:
                k = tuple(self.rotation(j, sinks).undo(t) for j, t in zip(slots, k, strict=True))
            text, dtype = self.text(sinks.rest), self.slots[slots[0]].k.dtype
            share = sum(numbers[j] for j in slots) / sum(numbers.values()) / dtype.itemsize / len(k[0])
            keys = Part("k", slots, k, dtype, text, self.total * share, stays * share, sinks)
            found.append((keys, None if latent else Part("v", slots, v, dtype, text, sinks=sinks)))
        return found


@dataclass(frozen=True)
class Outcome:
    """What a compression cost."""

    seconds: float
    """Of the compression alone; errors are measured after."""
    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    """For each slot ||X' - X|| / ||X|| (Frobenius) of keys (`k`, as the method stores them, before or after RoPE: the
    rotation changes no norm) and values (`v`), sinks and padding left out."""


@torch.no_grad()
def encode(
    method: Compressor, filled: Filled, *, measure: bool = True
) -> tuple[dict[int, tuple[Prefix, Slot]], Outcome]:
    """The slots of a cache compressed, each with its exact sinks (B, s, ...), those that the method drops left out; and
    what that cost.

    Raises `UserError` where there are no slots, or as `method.encode` does.
    """
    if not filled.slots:
        raise UserError(f"{method.name}: nothing to compress: all slots have a window or are recurrent states")
    began = _now(filled)
    prefixes: dict[int, tuple[Prefix, Slot]] = {}
    followed, sinks = method.follows(), filled.sinks(method.sinks)
    if not sinks.rest:
        method.check_all_sinks(sinks.length)
        log.info("%s: all %d tokens are sinks and stored as they are", method.name, sinks.length)
    for keys, values in filled.parts(before_rope=method.keys_before_rope, sinks=sinks):
        k_codes: Sequence[Code | None] = [None] * len(keys.slots)
        v_codes: Sequence[Code | None] = k_codes
        if sinks.rest:
            with torch.autocast(keys.data[0].device.type, enabled=False):  # factors are made in the precision they say
                k_codes, v_codes = method.encode(keys, values)
        for slot, k, v in zip(keys.slots, k_codes, v_codes, strict=True):
            if slot in followed:
                continue
            rotated = k is not None and method.keys_before_rope and slot not in filled.latent
            exact = filled.slots[slot].map(sinks.without)
            prefix = Prefix(
                _stored(k, exact.k),
                _stored(v, exact.v),
                sinks,
                filled.rotation(slot, sinks) if rotated else None,
                method.landmarks(exact.k, filled.text(sinks.rest)) if rotated else None,
            )
            prefixes[slot] = prefix, filled.slots[slot].map(sinks.of)
    seconds = _now(filled) - began
    errors: dict[int, dict[str, float]] = {}
    if measure:
        text = filled.text(sinks.rest)
        for slot, cached in filled.slots.items():
            read, exact = prefixes[followed.get(slot, slot)][0].read(), cached.map(sinks.without)
            errors[slot] = {"k": relative_error(read.k, exact.k, text), "v": relative_error(read.v, exact.v, text)}
    return prefixes, Outcome(seconds, errors)


def _stored(code: Code | None, exact: Tensor) -> Code:
    return Exact(exact.clone()) if code is None else code


def _now(filled: Filled) -> float:
    device = next(iter(filled.slots.values())).k.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def relative_error(found: Tensor, exact: Tensor, text: Tensor | None = None) -> float:
    """||found - exact|| / ||exact|| (Frobenius) of (B, n, ...), tokens where `text` is False left out."""
    found, exact = found.flatten(2).double(), exact.flatten(2).double()
    if text is not None:
        found, exact = found * text[..., None], exact * text[..., None]
    return ((found - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def mean_errors(errors: Sequence[dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over several compressions: {slot: {"k": ..., "v": ...}} with names for JSON."""
    slots = sorted(errors[0]) if errors else []
    return {str(j): {part: sum(e[j][part] for e in errors) / len(errors) for part in ("k", "v")} for j in slots}
