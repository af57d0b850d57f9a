"""A group of slots that share a basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


_JOINT = 2**25
"""Numbers of a group up to which keys and values are one batch."""


def alike(
    groups: Sequence[Group], ranks: Sequence[int | None], *, batched: bool, svd: str
) -> list[tuple[list[Group], list[int | None]]]:
    """Lists of `groups`, and of their ranks: those of one shape if `batched`, else lists of one.

    Keys and values have different ranks, and are separate batches too, except small ones with `power`, whose bases of a
    higher rank begin with one of a lower rank. On an H200 (2026-11-28) one batch for both took 0.71 and 0.72 of the
    time of two for models of 45 and 135 million parameters, with 2^23 and fewer numbers a group, but 1.09 for one of 8
    billion with 2^27.
    """
    found: dict[object, tuple[list[Group], list[int | None]]] = {}
    for i, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        shapes = tuple(group.tensors.data[j].shape for j in group.slots)
        joint = svd == "power" and sum(math.prod(shape) for shape in shapes) <= _JOINT
        key: object = shapes if joint else (group.tensors.kind, shapes, rank)
        part = found.setdefault(key if batched else i, ([], []))
        part[0].append(group)
        part[1].append(rank)
    return list(found.values())


def group_sizes(tensors: SlotTensors, groups: list[list[int]]) -> list[tuple[int, int]]:
    """(layers, width) of each group."""
    return [(len(group), tensors.data[group[0]].flatten(2).shape[2]) for group in groups]


def as_one_batch(batched: bool | None, svd: str, device: torch.device) -> bool:
    """Whether groups of one shape are factorised as one batch: `batched`, or by rule if it is None.

    By rule with `power` and `random` on a GPU, where launching takes most of their time. On an H200 (2026-11-27) one
    batch took 0.62, 0.48 and 0.89 of the time of parallel streams with `power` for models of 45 and 135 million and 8
    billion parameters, and 1.04 and 1.07 with `gram` for the first two. `random` was not measured.
    """
    return device.type == "cuda" and svd in ("power", "random") if batched is None else batched
