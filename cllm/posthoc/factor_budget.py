"""The numbers that low-rank factors may have for a `ratio` of bytes: as ranks of groups, or as widths of their columns.

A size is (layers, width) of a group: the slots that share its basis, and the channels of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.budget import elements_left
from cllm.posthoc.group import Group, group_sizes
from cllm.posthoc.lowrank import factor_elements, fast_rank, ranks_for_budget, water_filling
from cllm.posthoc.mixed import choose_widths, column_bits
from cllm.posthoc.slots import SlotTensors

KEYS_TO_VALUES = 1.5
"""The rank of a group of values for each rank of one of keys, as in xKV's paper."""


@dataclass(frozen=True, kw_only=True)
class FactorBudget:
    """Numbers of the cache's dtype per sequence that the factors of all groups may have.

    Every method raises `UserError`, naming the compression, if even rank 1 of every group exceeds it.
    """

    name: str
    """The compression, for errors."""
    ratio: float
    """Bytes of the uncompressed cache over bytes of the compressed one."""
    keys: SlotTensors
    """Keys, or latents, of all slots: they know what the cache has besides."""
    landmarks: float
    """Numbers of landmarks, which count as well."""

    def ranks(
        self, sizes_k: list[tuple[int, int]], sizes_v: list[tuple[int, int]]
    ) -> tuple[list[int | None], list[int | None]]:
        """The rank of each group of keys, and of each of values: one rank for all keys, and `KEYS_TO_VALUES`
        times it for values; less in smaller groups."""
        sizes = [*sizes_k, *sizes_v]
        ranks = ranks_for_budget(self._elements(sizes), self._tokens, sizes_k, sizes_v, keys_to_values=KEYS_TO_VALUES)
        if ranks is None:
            raise self._too_small(sizes)
        ranks_k, ranks_v = ([self._fast(rank) for rank in part] for part in ranks)
        return list(ranks_k), list(ranks_v)

    def spread_ranks(self, groups: Sequence[Group]) -> list[int]:
        """The rank of each group, all of which have spectra, by water-filling."""
        sizes = _sizes(groups)
        spectra = [group.spectrum for group in groups if group.spectrum is not None]
        costs = [factor_elements(self._tokens, layers, width, 1) for layers, width in sizes]
        ranks = water_filling([s.square().mean(0) for s in spectra], costs, self._elements(sizes))
        if ranks is None:
            raise self._too_small(sizes)
        return [self._fast(rank) for rank in ranks]

    def widths(self, groups: Sequence[Group], kept: Sequence[Tensor]) -> list[Tensor]:
        """The bits of each column of each group, all of which have spectra.

        Args:
            groups: factorised.
            kept: (r,) of each group, the mean square of each column of A.
        """
        sizes, itemsize = _sizes(groups), self.keys.dtype.itemsize
        spectra = [group.spectrum for group in groups if group.spectrum is not None]
        costs = []
        for group in groups:
            width = tuple(group.tensors.data[group.slots[0]].shape[2:])
            costs.append(column_bits(self._tokens, len(group.slots), width, itemsize))
        bits = self._elements(sizes) * 8 * itemsize
        chosen = choose_widths([s.square().mean(0) for s in spectra], kept, costs, bits)
        if chosen is None:
            raise self._too_small(sizes)
        return chosen

    @property
    def _tokens(self) -> int:
        """Compressed tokens: those of the cache without sinks."""
        return self.keys.data[0].shape[1]

    @property
    def _fixed(self) -> float:
        """Numbers that no factor replaces."""
        return self.keys.incompressible_elements + self.landmarks

    def _uncompressed(self, sizes: Sequence[tuple[int, int]]) -> float:
        return self.keys.uncompressed_elements or sum(self._tokens * layers * width for layers, width in sizes)

    def _elements(self, sizes: Sequence[tuple[int, int]]) -> float:
        what = "(windows, states, RoPE keys of latents, sinks) or are landmarks"
        return elements_left(self.name, self.ratio, self.keys, self._uncompressed(sizes), self._fixed, what)

    def _too_small(self, sizes: Sequence[tuple[int, int]]) -> UserError:
        share = self._fixed / self._uncompressed(sizes)
        others = f"and the {share:.0%} of the cache that stay" if self._fixed else "alone"
        return UserError(
            f"{self.name}: ratio={self.ratio:g}: at {self.keys.tokens} tokens the bases of "
            f"{max(layers for layers, _ in sizes)} slots {others} exceed it, even at rank 1; allowed: a lower ratio, "
            "smaller groups, or more tokens"
        )

    def _fast(self, rank: int) -> int:
        return fast_rank(rank, self.keys.data[0], self.keys.dtype)


def _sizes(groups: Sequence[Group]) -> list[tuple[int, int]]:
    return [size for group in groups for size in group_sizes(group.tensors, [group.slots])]
