"""Writes the shards of one split; writing can be interrupted anywhere and resumed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field

from cllm.data.integrity import Damaged
from cllm.data.manifest import INDEX_DTYPE, INDEX_ROW, Count, Shard, Split
from cllm.section import Section


class Progress(Section):
    """The part of a split that has been written: its finished shards, and what of the open one is synced to the disk.

    The counts are those of the open shard.
    """

    shards: list[Shard] = Field(default_factory=list)
    tokens: Count = 0
    documents: Count = 0
    bytes: Count = 0
    sha256: str | None = None
    """SHA-256 of the open shard's synced tokens; None without such tokens, and in files of older versions."""
    index_sha256: str | None = None


class _HashedFile:
    """A file opened for appending, and the hash of its content."""

    def __init__(self, path: Path, size: int, sha256: str | None):
        """Open a file and truncate it to `size` bytes.

        Raises:
            Damaged: if it is shorter, or these bytes do not have the hash `sha256` (None: not known).
        """
        self._path = path
        self._sha256 = hashlib.sha256()
        # A symbolic link may lead to somebody else's file: it is not followed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        left = size
        while left and (piece := self._file.read(min(left, 1 << 20))):
            self._sha256.update(piece)
            left -= len(piece)
        if left or (sha256 is not None and self.sha256 != sha256):
            raise Damaged(f"{path}: damaged since the preparation was stopped; the same command starts clean")
        self._file.seek(size)
        self._file.truncate(size)

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, array: np.ndarray) -> None:
        self._file.write(array.data)
        self._sha256.update(array.data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Appends documents to `SPLIT-00000.bin`, `SPLIT-00001.bin`, ... and their indices.

    Documents are not split between shards: a shard is closed before the document that would exceed `shard_tokens`.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, progress: Progress | None = None):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.progress = progress or Progress()
        self._files = self._open() if self.progress.documents else None

    def add(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Write one document: its tokens with EOS, and the UTF-8 bytes of its text."""
        progress = self.progress
        if progress.documents and progress.tokens + len(tokens) > self.shard_tokens:
            self.close_shard()
            progress = self.progress
        self._files = self._files or self._open()
        tokens_file, index_file = self._files
        tokens_file.write(np.ascontiguousarray(tokens, dtype=self._dtype))
        progress.tokens += len(tokens)
        progress.documents += 1
        progress.bytes += n_bytes
        index_file.write(np.array([progress.tokens, progress.bytes], dtype=INDEX_DTYPE))

    def sync(self) -> Progress:
        """Sync everything written so far to the disk. Returns the progress, which counts just that."""
        if self._files is not None:
            for file in self._files:
                file.sync()
            self.progress.sha256, self.progress.index_sha256 = (file.sha256 for file in self._files)
        return self.progress

    def close_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if self._files is None:
            return
        self.sync()
        tokens_file, index_file = self._files
        open_shard = self.progress
        shard = Shard(
            file=tokens_file.name,
            index=index_file.name,
            tokens=open_shard.tokens,
            documents=open_shard.documents,
            bytes=open_shard.bytes,
            sha256=tokens_file.sha256,
            index_sha256=index_file.sha256,
        )
        for file in self._files:
            file.close()
        self._files = None
        self.progress = Progress(shards=[*open_shard.shards, shard])

    def finish(self) -> Split:
        """Close the last shard. Returns the split's totals."""
        self.close_shard()
        shards = self.progress.shards
        return Split(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )

    def _open(self) -> tuple[_HashedFile, _HashedFile]:
        """Open the next shard, or the one that an interrupted run left, truncated to its synced part."""
        progress, stem = self.progress, self.folder / f"{self.split}-{len(self.progress.shards):05d}"
        tokens = _HashedFile(stem.with_suffix(".bin"), progress.tokens * self._dtype.itemsize, progress.sha256)
        return tokens, _HashedFile(stem.with_suffix(".idx"), progress.documents * INDEX_ROW, progress.index_sha256)
