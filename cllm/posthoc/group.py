"""A group of slots that share a basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cllm.posthoc.code import Codes
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.weighting import Weights


@dataclass
class Group:
    """The slots that share a basis of keys, or of values, while they are coded."""

    tensors: SlotTensors
    slots: list[int]
    """Indices into `tensors.slots`."""
    weights: dict[int, Weights]
    """Weights by slot; empty: none."""
    codes: Codes
    """Of all slots, to write into."""
    vectors: Tensor | None = None
    """(B, layers · width, r) fp32, once they are known."""
    spectrum: Tensor | None = None
    """(B, r) fp64, once it is known."""
    widths: Tensor | None = None
    """(r,): bits of each column of A, for `codes=mixed`."""


def alike(
    groups: Sequence[Group], ranks: Sequence[int | None], *, batched: bool
) -> list[tuple[list[Group], int | None]]:
    """Lists of `groups`, with the rank of each list: those of one kind, shape and rank if `batched`, else lists of
    one."""
    found: dict[object, tuple[list[Group], int | None]] = {}
    for i, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        shapes = tuple(group.tensors.data[j].shape for j in group.slots)
        key = (group.tensors.kind, shapes, rank) if batched else i
        found.setdefault(key, ([], rank))[0].append(group)
    return list(found.values())


def group_sizes(tensors: SlotTensors, groups: list[list[int]]) -> list[tuple[int, int]]:
    """(layers, width) of each group."""
    return [(len(group), tensors.data[group[0]].flatten(2).shape[2]) for group in groups]
