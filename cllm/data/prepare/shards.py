"""Writing the shards of one split, so that writing can stop anywhere and go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict

from cllm.data.manifest import INDEX_DTYPE, INDEX_ROW, Shard, Split, sha256_of


class Progress(BaseModel):
    """How far a split has been written: its finished shards, and how much of the open one is safely on disk."""

    model_config = ConfigDict(extra="forbid", strict=True)

    shards: list[Shard] = []
    tokens: int = 0
    documents: int = 0
    bytes: int = 0


class ShardWriter:
    """Appends documents to `SPLIT-00000.bin`, `SPLIT-00001.bin`, ... and their indices.

    A shard holds whole documents, and is closed before the document that would take it past `shard_tokens`.
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
        tokens_file.write(tokens.astype(self._dtype, copy=False).data)
        progress.tokens += len(tokens)
        progress.documents += 1
        progress.bytes += n_bytes
        index_file.write(np.array([progress.tokens, progress.bytes], dtype=INDEX_DTYPE).data)

    def sync(self) -> Progress:
        """Put everything written so far on disk, and say how much that is."""
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())
        return self.progress

    def close_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if self._files is None:
            return
        self.sync()
        for file in self._files:
            file.close()
        self._files = None
        open_shard, (tokens_path, index_path) = self.progress, self._paths()
        shard = Shard(
            file=tokens_path.name,
            index=index_path.name,
            tokens=open_shard.tokens,
            documents=open_shard.documents,
            bytes=open_shard.bytes,
            sha256=sha256_of(tokens_path),
            index_sha256=sha256_of(index_path),
        )
        self.progress = Progress(shards=[*open_shard.shards, shard])

    def finish(self) -> Split:
        """Close the last shard and add up."""
        self.close_shard()
        shards = self.progress.shards
        return Split(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )

    def _paths(self) -> tuple[Path, Path]:
        stem = f"{self.split}-{len(self.progress.shards):05d}"
        return self.folder / f"{stem}.bin", self.folder / f"{stem}.idx"

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        """Open the next shard, or the one a stopped run left behind, cut back to what was safe."""
        tokens_path, index_path = self._paths()
        sizes = (self.progress.tokens * self._dtype.itemsize, self.progress.documents * INDEX_ROW)
        for path, size in zip((tokens_path, index_path), sizes, strict=True):
            with path.open("ab") as file:
                file.truncate(size)
        return tokens_path.open("ab"), index_path.open("ab")
