"""The shards of one split as one flat, memory-mapped sequence of tokens."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from cllm.data.manifest import INDEX_DTYPE, Manifest


class TokenStore:
    """Random access to a split's tokens and to the documents they belong to.

    Opening costs nothing and holds no memory: both the tokens and the document index stay on disk. Pickles as the
    folder's name, so data loader workers map the files themselves. Raises `DataError` as `Manifest.load` does, and
    when the folder has no such split.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.manifest = Manifest.load(folder)
        self.folder, self.split = Path(folder), split
        self._shards = self.manifest.split(split).shards
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]

    def __reduce__(self):
        return TokenStore, (self.folder, self.split)

    def __len__(self) -> int:
        """Tokens in the split, every EOS included."""
        return self._starts[-1]

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.eos_id

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64 (stop - start,), across shards. Raises `IndexError` outside the split."""
        self._check(start, stop)
        tokens = np.empty(stop - start, dtype=np.int64)
        for shard, low, high in self._pieces(start, stop):
            offset = self._starts[shard]
            tokens[low - start : high - start] = self._tokens[shard][low - offset : high - offset]
        return tokens

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Which document each token of the window [start, stop) is in, and where.

        Returns `document_ids`, int64 (stop - start,), counting up from 0 within the window, and `positions`, int64
        (stop - start,), counting up from 0 at the window's start and at each document's start. An EOS belongs to the
        document it ends. Raises `IndexError` outside the split.
        """
        starts = np.array([0, *(first - start for first in self._document_starts(start, stop))])
        lengths = np.diff(starts, append=stop - start)
        document_ids = np.repeat(np.arange(len(starts)), lengths)
        return document_ids, np.arange(stop - start) - np.repeat(starts, lengths)

    def _document_starts(self, start: int, stop: int) -> list[int]:
        """Tokens in (start, stop) with which a document begins."""
        self._check(start, stop)
        found: list[int] = []
        for shard, low, high in self._pieces(start, stop):
            offset = self._starts[shard]
            if start < low:
                found.append(low)  # documents do not straddle shards
            ends = self._index[shard][:, 0]
            # `ends` is a file: bisect touches a few pages of it where numpy.searchsorted would read it all.
            first, last = bisect_right(ends, low - offset), bisect_right(ends, high - 1 - offset)
            found += [offset + int(end) for end in ends[first:last]]
        return found

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, low, high) for each shard that [start, stop) touches, in tokens of the split."""
        first = bisect_right(self._starts, start) - 1
        pieces = []
        for shard in range(first, len(self._shards)):
            if self._starts[shard] >= stop:
                break
            pieces.append((shard, max(start, self._starts[shard]), min(stop, self._starts[shard + 1])))
        return pieces

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of {self.folder}, whose {self.split} split has {len(self)}")

    @cached_property
    def _tokens(self) -> list[np.ndarray]:
        dtype = self.manifest.token_dtype
        return [np.memmap(self.folder / shard.file, dtype=dtype, mode="r") for shard in self._shards]

    @cached_property
    def _index(self) -> list[np.ndarray]:
        return [np.memmap(self.folder / s.index, dtype=INDEX_DTYPE, mode="r").reshape(-1, 2) for s in self._shards]
