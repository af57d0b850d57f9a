"""Later tokens join the compressed ones (`every=n`): the part that cllm's and transformers' caches have in common.

    before    s sinks | S - s compressed | n later tokens, exact | fewer than n
    after     s sinks | S - s + n compressed                     | fewer than n

A slot absorbs a block once, when the pass that completes the block has ended, however many layers read it. How a block
is coded is the method's choice (`Compressor.absorb`). It sees the exact tokens of the block, and of the others only
their codes. Later tokens are never padding.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Exact, Prefix, Rotation
from cllm.posthoc.grown import Joiner
from cllm.posthoc.method import Compressor
from cllm.posthoc.slots import SlotTensors


def check_can_absorb(method: Compressor, tokens: int) -> None:
    """Raise `UserError` if a prefix of `tokens` tokens has nothing that later tokens could join."""
    if method.every is not None and not method.joins_by_encoding and tokens <= method.sinks:
        raise UserError(
            f"{method.name}: every={method.every}: all {tokens} tokens are sinks, and later tokens have nothing to "
            f"join; allowed: sinks below {tokens}, more tokens, or without every"
        )


@torch.no_grad()
def absorb(
    method: Compressor, stored: Mapping[int, Prefix], block: Mapping[int, Slot], latent: AbstractSet[int]
) -> tuple[dict[int, Prefix], float]:
    """The prefixes of all slots with a block of later tokens behind their own, and the seconds that it took.

    Args:
        method: which has compressed the prefixes, with `every`.
        stored: by owner.
        block: the next tokens (B, n, *width) of every slot, as attention reads them.
        latent: owners whose slots are latent.
    """
    began = _now(block)
    joined: dict[int, Prefix] = {}
    for part in (set(stored) - latent, set(stored) & latent):
        if part:
            joined |= _absorb_part(method, {j: stored[j] for j in sorted(part)}, block, is_latent=bool(part & latent))
    return {j: joined[j] for j in stored}, _now(block) - began


def _absorb_part(
    method: Compressor, stored: Mapping[int, Prefix], block: Mapping[int, Slot], *, is_latent: bool
) -> dict[int, Prefix]:
    """`absorb` of slots that are all latent, or all not."""
    slots, tokens = tuple(stored), next(iter(block.values())).k.shape[1]
    rotations = [_rotation(prefix, tokens) for prefix in stored.values()]
    k = tuple(block[j].k if of is None else of.undo(block[j].k) for j, of in zip(slots, rotations, strict=True))
    v = tuple(block[j].v for j in slots)
    keys = SlotTensors("k", slots, k, block[slots[0]].k.dtype)
    values = None if is_latent else SlotTensors("v", slots, v, v[0].dtype)
    k_codes, v_codes = ([getattr(prefix, kind) for prefix in stored.values()] for kind in ("k", "v"))
    with torch.autocast(k[0].device.type, enabled=False):  # methods choose their precision themselves
        new_k, new_v = method.absorb(keys, values, (k_codes, v_codes))
    found = zip(
        slots,
        _or_exact(k_codes, new_k, [x.to(keys.dtype) for x in k]),
        _or_exact(v_codes, new_v, v),
        rotations,
        strict=True,
    )
    joined: dict[int, Prefix] = {}
    for slot, new_key, new_value, rotation in found:
        sinks = stored[slot].sinks
        longer = dataclasses.replace(sinks, length=sinks.length + tokens)
        if rotation is not None:
            old = stored[slot].rotation
            assert old is not None
            rotation = dataclasses.replace(old, length=old.length + tokens)
        joined[slot] = Prefix(new_key, new_value, longer, rotation)
    return joined


def _rotation(prefix: Prefix, tokens: int) -> Rotation | None:
    """RoPE of the `tokens` tokens behind `prefix`; None if its keys are stored after RoPE."""
    if prefix.rotation is None:
        return None
    return dataclasses.replace(prefix.rotation, first=prefix.sinks.tokens, length=tokens)


def _or_exact(codes: Sequence[Code], joined: Codes, block: Sequence[Tensor]) -> list[Code]:
    """`joined`, and where it is None the exact block behind the code."""
    joiner = Joiner()
    return [
        joiner.join(code, Exact(x)) if new is None else new for code, new, x in zip(codes, joined, block, strict=True)
    ]


def _now(block: Mapping[int, Slot]) -> float:
    device = next(iter(block.values())).k.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
