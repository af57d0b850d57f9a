"""Training sequences from several prepared folders, in fixed shares.

With shares w_k that sum to 1, sequence j of folder k stands at the time (j + 1/2) / w_k, and the mixture is the
sequences of all folders in the order of these times. After n sequences, the folders have the numbers of sequences that
the Sainte-Lague method gives n seats: for K folders, within 1/2 + w_k K / 2 of n w_k. For two folders of shares 3/4 and
1/4, a a b a | a a b a | ...

The folder of a sequence, and its number there, are computed from its index, without a table or a state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor
from torch.utils.data import Dataset

from cllm.data.manifest import Manifest
from cllm.data.packing import PackedDataset
from cllm.errors import DataError


class Mixture:
    """The order in which sequences are taken from several folders.

    Args:
        weights: folder: weight, above 0. A folder's share is its weight divided by the sum of all. The order of the
            folders does not matter: at equal times, the first in alphabetical order goes first.
    """

    def __init__(self, weights: Mapping[str, float]):
        self.folders = sorted(weights)
        fractions = [Fraction(str(weights[folder])) for folder in self.folders]  # 0.1 is one tenth
        multiple = math.lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * multiple) for fraction in fractions]
        self._sum = sum(self._weights)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each folder in the training tokens."""
        return {folder: weight / self._sum for folder, weight in zip(self.folders, self._weights, strict=True)}

    def counts(self, n: int) -> dict[str, int]:
        """Sequences of each folder among the first `n`."""
        return dict(zip(self.folders, self._counts(n), strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """The folder of sequence `index` of the mixture, and the number of that sequence in its folder, both from 0."""
        counts = self._counts(index)
        k = self._next(counts)
        return self.folders[k], counts[k]

    def _counts(self, n: int) -> list[int]:
        # Those up to time n - K are at most n: each folder has less than 1/2 more than its share.
        time = max(0, n - len(self._weights))
        counts = [(2 * time * weight + self._sum) // (2 * self._sum) for weight in self._weights]
        for _ in range(n - sum(counts)):
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: Sequence[int]) -> int:
        """The folder whose next sequence has the earliest time (count + 1/2) / weight."""
        best = 0
        for k in range(1, len(counts)):
            if (2 * counts[k] + 1) * self._weights[best] < (2 * counts[best] + 1) * self._weights[k]:
                best = k
        return best


class MixedDataset(Dataset):
    """Training sequences of several folders for any index from 0 on, without state between calls.

    Args:
        sources: folder: its sequences. Each folder has its own epochs and order, those of a run on this folder alone.
        weights: folder: weight, as for `Mixture`.
    """

    def __init__(self, sources: Mapping[str, PackedDataset], weights: Mapping[str, float]):
        self.sources, self.mixture = dict(sources), Mixture(weights)

    def __len__(self) -> int:
        """Sequences in all folders together, each counted once."""
        return sum(map(len, self.sources.values()))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sequence `index`, as `packing.window` returns it. Raises `IndexError` if it is negative."""
        if index < 0:
            raise IndexError(f"sequence {index}")
        folder, number = self.mixture.locate(index)
        return self.sources[folder][number]


def check_same_tokenizer(manifests: Sequence[Manifest]) -> None:
    """Refuse folders that were prepared with different tokenizers.

    Raises:
        DataError: names two folders that differ.
    """
    for first, other in itertools.combinations(manifests, 2):
        if other.eos_id != first.eos_id or not other.same_tokenizer(first):
            raise DataError(
                f"data.mix: {other.folder} was made with another tokenizer than {first.folder}; prepare it with "
                f"--tokenizer.train null --tokenizer.load {first.folder}/tokenizer"
            )
