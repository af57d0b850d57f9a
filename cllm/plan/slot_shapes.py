"""Refusals of slots of different shapes where a layer needs slots of one shape: to read, to fuse and to mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cllm.errors import PlanError
from cllm.plan.kinds import Read, Source


class _Plan(Protocol):
    @property
    def layers(self) -> Sequence[Any]: ...
    def keys(self, i: int) -> Read: ...
    def values(self, i: int) -> Read: ...
    def owned(self, i: int) -> Source: ...


def check_pair(plan: _Plan, i: int) -> None:
    """Raise `PlanError` unless the keys of layer `i` have as many KV heads, of the same size, as its values."""
    k, v = plan.keys(i).layers[0], plan.values(i).layers[0]
    keys, values = plan.owned(k), plan.owned(v)
    if keys.kv_heads != values.kv_heads:
        raise PlanError(
            f"layer {i}: its keys have {keys.kv_heads} KV heads (slot {k}) and its values {values.kv_heads} "
            f"(slot {v}); they must be equal"
        )
    if keys.head_dim != values.head_dim:
        raise PlanError(
            f"layer {i}: its keys have {keys.head_size_text} channels a head (slot {k}) and its values "
            f"{values.head_size_text} (slot {v}); they must be equal"
        )


def check_fused(plan: _Plan, i: int, half: str, read: Read) -> None:
    """Raise `PlanError` unless all slots of `read`, the keys or the values of layer `i`, have one shape."""
    sources = {j: plan.owned(j) for j in read.layers}
    heads = {j: f"{source.kv_heads} KV heads" for j, source in sources.items()}
    sizes = {j: f"{source.head_size_text} channels a head" for j, source in sources.items()}
    for texts in (heads, sizes):
        if len(set(texts.values())) > 1:
            raise PlanError(
                f"layer {i}: {half}: cannot fuse slots of different shapes: "
                + ", ".join(f"layer {j} has {text}" for j, text in texts.items())
                + "; they must be equal"
            )


def check_mixed(plan: _Plan, i: int, own: Source) -> None:
    """Raise `PlanError` unless all slots that layer `i` mixes into its own have its shape, keys and values."""
    for j in own.mixes:
        other = plan.layers[j].own
        shape = None if other is None else (other.is_plain, len(other.halves), other.kv_heads, other.head_dim)
        if shape != (True, 2, own.kv_heads, own.head_dim):
            found = "nothing" if other is None else other.text if other.is_plain else f"a {other.noun}"
            raise PlanError(
                f"layer {i}: mixes the keys and values of layer {j}, which owns {found}; allowed: owners of keys and "
                f"values with {own.kv_heads} KV heads of {own.head_size_text} channels"
            )
