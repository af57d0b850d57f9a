"""The shards of one split as one flat sequence of tokens, read from the disk on demand."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate, count
from pathlib import Path

import numpy as np

from cllm.data.integrity import Verify, check
from cllm.data.manifest import INDEX_DTYPE, INDEX_ROW, Manifest, Shard, sha256_of
from cllm.data.vocabulary import check_ids
from cllm.errors import DataError

OPEN_FILES = 32
"""Files that a process keeps open, over all stores."""
_ROWS = 1024  # of an index, read at once


class TokenStore:
    """Random access to a split's tokens and to their documents.

    Tokens and the document index are read from the disk, and few files are open at a time, whatever the number of
    shards. A pickle holds the folder's name, so data loader workers open the files themselves. Ids are checked against
    the vocabulary, ends of documents against the EOS tokens.

    Args:
        folder: a prepared folder.
        split: one of its splits.
        verify: the part that is checked for damage on opening; see `integrity.check`.
        vocab_size: of the model that reads the tokens; larger ids are refused. None: only ids that the tokenizer lacks.
        whose: the owner of that vocabulary, for error messages.

    Raises:
        DataError: as `Manifest.load` and `integrity.check` do, and if the folder has no such split.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        verify: Verify = "sample",
        vocab_size: int | None = None,
        whose: str = "the model",
    ):
        self.manifest = Manifest.load(folder)
        self.folder, self.split = Path(folder), split
        self._shards = self.manifest.split(split).shards
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._key = next(_keys)
        self._verified: set[int] = set()
        """Shards whose hashes were compared because ends of documents and EOS tokens differ."""
        check(self.manifest, split, verify)
        self.limit_ids(vocab_size, whose)

    def __reduce__(self):
        return _reopen, (self.folder, self.split, self._limit, self._whose)

    def __len__(self) -> int:
        """Tokens in the split, every EOS included."""
        return self._starts[-1]

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.eos_id

    def limit_ids(self, vocab_size: int | None, whose: str) -> None:
        """Let `read` refuse ids of `vocab_size` or more. `whose` names the vocabulary's owner in the error."""
        self._limit, self._whose = self.manifest.vocab_size, "the tokenizer of this data"
        if vocab_size is not None and vocab_size < self._limit:
            self._limit, self._whose = vocab_size, whose

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64 (stop - start,), across shards.

        Raises:
            IndexError: outside the split.
            DataError: naming the shard, if it cannot be read or has ids that the vocabulary lacks.
        """
        self._check(start, stop)
        tokens = np.empty(stop - start, dtype=np.int64)
        for shard, low, high in self._pieces(start, stop):
            offset = self._starts[shard]
            piece = self._tokens(self._shards[shard], low - offset, high - offset)
            check_ids(piece, self._limit, str(self.folder / self._shards[shard].file), self._whose)
            tokens[low - start : high - start] = piece
        return tokens

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The document and the position of each token in the window [start, stop).

        Returns `document_ids`, int64 (stop - start,), counting up from 0 within the window, and `positions`, int64
        (stop - start,), counting up from 0 at the window's start and at each document's start. An EOS belongs to the
        document it ends.

        Raises:
            IndexError: outside the split.
            DataError: naming the file, if the index does not fit the tokens.
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
                found.append(low)  # no document spans two shards
            ends = self._ends(shard, low - offset, high - offset)
            found += [offset + end for end in ends if end < high - offset]
        return found

    def _ends(self, number: int, low: int, high: int) -> list[int]:
        """Ends of documents in (low, high] of a shard, each one past an EOS."""
        shard = self._shards[number]
        first = self._first_after(shard, low)
        pieces = [np.empty(0, dtype=np.int64)]
        while first < shard.documents and not (pieces[-1] > high).any():
            pieces.append(self._rows(shard, first, first + _ROWS))
            first += _ROWS
        ends = np.concatenate(pieces)
        ends = ends[: np.searchsorted(ends, high, side="right")]
        expected = low + 1 + np.flatnonzero(self._tokens(shard, low, high) == self.eos_id)
        if not np.array_equal(ends, expected) and number not in self._verified:
            # Either one of the files is damaged, or the tokenizer produced EOS inside a text, which is no error.
            self._compare_hashes(shard)
            self._verified.add(number)
        return ends.tolist()

    def _first_after(self, shard: Shard, token: int) -> int:
        """The first document of a shard that ends after `token`, by bisection: the index may be larger than memory."""
        low, high = 0, shard.documents
        while high - low > _ROWS:
            middle = (low + high) // 2
            if self._rows(shard, middle, middle + 1)[0] > token:
                high = middle
            else:
                low = middle + 1
        return low + int(np.searchsorted(self._rows(shard, low, high), token, side="right"))

    def _rows(self, shard: Shard, first: int, last: int) -> np.ndarray:
        """The ends of documents [first, last) of a shard, in tokens: int64, fewer at the end of the shard."""
        raw = self._bytes(shard.index, shard.documents, first, min(last, shard.documents), INDEX_ROW)
        return np.frombuffer(raw, dtype=INDEX_DTYPE)[::2]

    def _compare_hashes(self, shard: Shard) -> None:
        for name, expected in ((shard.index, shard.index_sha256), (shard.file, shard.sha256)):
            if sha256_of(self.folder / name) != expected:
                raise DataError(
                    f"{self.folder / name}: damaged: documents in {shard.index} do not end where {shard.file} has EOS, "
                    "and its sha256 is not that of the manifest; restore the file, or prepare the folder again"
                )

    def _tokens(self, shard: Shard, low: int, high: int) -> np.ndarray:
        """Tokens [low, high) of a shard, int64."""
        dtype = self.manifest.token_dtype
        raw = self._bytes(shard.file, shard.tokens, low, high, dtype.itemsize)
        return np.frombuffer(raw, dtype=dtype).astype(np.int64)

    def _bytes(self, name: str, n: int, start: int, stop: int, size: int) -> bytes:
        """Elements [start, stop) of a file that has `n`, of `size` bytes each."""
        return _files.read(self._key, self.folder, name, start * size, stop * size, n * size)

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


def _reopen(folder: Path, split: str, limit: int, whose: str) -> TokenStore:
    """Unpickle a store. It was checked for damage before it was pickled."""
    return TokenStore(folder, split, verify="none", vocab_size=limit, whose=whose)


class _OpenFiles:
    """A cache of open files, the least recently read one closed first.

    Files are read and not memory-mapped: a file that is truncated during a run gives an error instead of a crash.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._open: OrderedDict[tuple[int, str], _File] = OrderedDict()

    def read(self, store: int, folder: Path, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes [start, stop) of a file of `size` bytes.

        Args:
            store: the number of the store, since a path may name different files over time.

        Raises:
            DataError: if the file cannot be read, or its size has changed.
        """
        try:
            file = self._open.pop((store, name), None) or _File(folder / name, size)
            self._open[store, name] = file
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
            raw = file.read(start, stop - start)
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read: {error}") from None
        if len(raw) != stop - start:
            raise DataError(f"{folder / name}: damaged: it ends at byte {start + len(raw)}, before byte {stop}")
        return raw


class _File:
    """An open file, closed when it is garbage-collected."""

    def __init__(self, path: Path, size: int):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if (found := os.fstat(self._descriptor).st_size) != size:
            raise DataError(f"{path}: has {found} bytes, not {size} as when the folder was opened")

    def read(self, start: int, n: int) -> bytes:
        """`n` bytes from `start` on, fewer at the end of the file."""
        pieces = []
        while n > 0 and (raw := os.pread(self._descriptor, n, start)):  # a call returns 2 GiB at most
            pieces.append(raw)
            start, n = start + len(raw), n - len(raw)
        return b"".join(pieces)

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


_files = _OpenFiles(OPEN_FILES)
_keys = count()
