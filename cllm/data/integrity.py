"""Detection of damaged shards and indices.

A preparation ends with `write_checksums`: it reads every file back from the disk, compares its SHA-256 with that of the
written bytes, and records the CRC-32 of each block. Opening a split checks a sample of these blocks (all of them in
small data), and that documents end as the index says. `Manifest.verify` compares all hashes again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from cllm.data.manifest import INDEX_DTYPE, Checksums, File, Manifest, Shard
from cllm.data.vocabulary import check_ids
from cllm.errors import DataError
from cllm.files import write_atomic
from cllm.progress import ProgressMeter

Verify = Literal["sample", "full", "none"]
"""The part of a split that is read when it is opened: a sample of its blocks, all, or only file sizes."""

CHECKSUMS = "checksums.crc32"
BLOCK_BYTES = 1 << 20
SAMPLE_BYTES = 64 << 20
"""Bytes of a split that are read when it is opened; a smaller split is read in full."""
SAMPLE_BLOCKS = 1024
SAMPLE_SHARDS = 16
"""Shards whose documents are checked."""
_ROWS = 4096  # of an index, checked together
_ENDS = 16  # ends of documents checked in a shard
_CRC = np.dtype("<u4")


class Damaged(DataError):
    """A file of a folder in preparation differs from what was written."""


def check(manifest: Manifest, split: str, verify: Verify, *, meter: ProgressMeter | None = None) -> None:
    """Check a split for damage, as thoroughly as `verify` says. With `full`, `meter` counts the bytes read.

    Raises:
        DataError: naming the file and what is wrong in it.
    """
    if verify == "none":
        return
    if verify == "full":
        manifest.verify(split, meter=meter)
    elif manifest.checksums is not None:
        _check_blocks(manifest, manifest.checksums, split)
    draw = np.random.default_rng()
    shards = manifest.split(split).shards
    chosen = {0, len(shards) - 1, *draw.integers(0, len(shards), SAMPLE_SHARDS).tolist()} if shards else set()
    for i in sorted(chosen):
        _check_documents(manifest, shards[i], draw)


def verify_folder(folder: str | Path) -> Manifest:
    """Read every file of a prepared folder and compare its hash.

    Raises:
        DataError: naming the first file that is damaged or missing.
    """
    manifest = Manifest.load(folder)
    if manifest.checksums is not None:
        _read_checksums(manifest, manifest.checksums)
    total = sum(file.n_bytes for file in manifest.files())
    with ProgressMeter(total, f"verifying {folder}", "B", scaled=True) as meter:
        for split in manifest.splits:
            check(manifest, split, "full", meter=meter)
    return manifest


def write_checksums(manifest: Manifest, folder: Path) -> Checksums:
    """Compare every file in `folder` with its hash in `manifest`, and write the checksums of all blocks.

    Raises:
        Damaged: naming the first file whose content on the disk differs from what was written.
        OSError: if the checksums cannot be written.
    """
    files, sums = manifest.files(), list[int]()
    with ProgressMeter(sum(file.n_bytes for file in files), "reading back", "B", scaled=True) as meter:
        for file in files:
            sums += _read_back(folder / file.name, file)
            meter.update(file.n_bytes)
    raw = np.array(sums, dtype=_CRC).tobytes()
    write_atomic(folder / CHECKSUMS, raw)
    return Checksums(file=CHECKSUMS, block_bytes=BLOCK_BYTES, sha256=hashlib.sha256(raw).hexdigest())


def _read_back(path: Path, expected: File) -> list[int]:
    """The CRC-32 of each block of a synced file, read from the disk and not from the page cache if the system can."""
    sha256, sums = hashlib.sha256(), []
    try:
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drop its pages from the cache
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                sums.append(zlib.crc32(block))
    except OSError as error:
        raise Damaged(f"{path}: cannot be read back: {error}; the same command starts clean") from None
    if (found := sha256.hexdigest()) != expected.sha256:
        raise Damaged(
            f"{path}: damaged on the disk: written with sha256 {expected.sha256}, read back with {found}; "
            "the same command starts clean"
        )
    return sums


def _check_blocks(manifest: Manifest, checksums: Checksums, split: str) -> None:
    """Compare blocks of a split with their checksums: all of them, or a new random sample in each call."""
    size, files = checksums.block_bytes, manifest.files(split)
    sums = _read_checksums(manifest, checksums)
    offset = sum(_count(manifest.files(name), size) for name in manifest.splits if name < split)
    starts = np.cumsum([0, *(_count([file], size) for file in files)])
    total, n_bytes = int(starts[-1]), sum(file.n_bytes for file in files)
    wanted = np.arange(total)
    if total > SAMPLE_BLOCKS or n_bytes > SAMPLE_BYTES:
        count = min(SAMPLE_BLOCKS, max(SAMPLE_BYTES * total // n_bytes, 1))
        wanted = np.unique(np.random.default_rng().integers(0, total, count))
    owner = np.searchsorted(starts, wanted, side="right") - 1
    for number in np.unique(owner):
        path = manifest.folder / files[number].name
        try:
            with path.open("rb") as file:
                for block in wanted[owner == number].tolist():
                    start = (block - int(starts[number])) * size
                    file.seek(start)
                    raw = file.read(size)
                    if zlib.crc32(raw) != sums[offset + block]:
                        raise DataError(
                            f"{path}: damaged: bytes {start} to {start + len(raw)} are not those that were written; "
                            "restore the file, or prepare the folder again"
                        )
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None


def _count(files: list[File], block_bytes: int) -> int:
    """The number of blocks of all `files`."""
    return sum(-(-file.n_bytes // block_bytes) for file in files)


def _read_checksums(manifest: Manifest, checksums: Checksums) -> np.ndarray:
    """uint32 (blocks of all files,)."""
    n = _count(manifest.files(), checksums.block_bytes)
    path = manifest.folder / checksums.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(raw) != n * _CRC.itemsize or hashlib.sha256(raw).hexdigest() != checksums.sha256:
        raise DataError(f"{path}: damaged: it is not the file of checksums that the manifest names")
    return np.frombuffer(raw, dtype=_CRC)


def _check_documents(manifest: Manifest, shard: Shard, draw: np.random.Generator) -> None:
    """Check that a shard's index ends with its totals, that documents end in EOS, and that ids are in range.

    The first rows of the index, the last ones and a random run of them are checked, and some of these documents' ends.
    """
    path, n = manifest.folder / shard.index, shard.documents
    firsts = {0, max(n - _ROWS, 0), int(draw.integers(0, max(n - _ROWS, 0) + 1))} if n else set()
    if (shard.tokens > 0) != (n > 0):
        raise DataError(f"{path}: damaged: {n} documents of {shard.tokens} tokens")
    for first in sorted(firsts):
        rows = _read(path, INDEX_DTYPE, 2 * first, 2 * min(_ROWS, n - first)).reshape(-1, 2)
        before = _read(path, INDEX_DTYPE, 2 * first - 2, 2) if first else np.zeros(2, dtype=INDEX_DTYPE)
        if not (np.diff(np.concatenate([before[None], rows]), axis=0) > 0).all():
            raise DataError(f"{path}: damaged: documents {first} to {first + len(rows)} do not each end after the last")
        if first + len(rows) == n and rows[-1].tolist() != [shard.tokens, shard.bytes]:
            expected = [shard.tokens, shard.bytes]
            raise DataError(f"{path}: damaged: the last document ends at {rows[-1].tolist()}, not at {expected}")
        for row in {0, len(rows) - 1, *draw.integers(0, len(rows), _ENDS).tolist()}:
            _check_end(manifest, shard, int(rows[row, 0]))


def _check_end(manifest: Manifest, shard: Shard, end: int) -> None:
    path = manifest.folder / shard.file
    tokens = _read(path, manifest.token_dtype, end - 1, 1) if 0 < end <= shard.tokens else np.empty(0, np.int64)
    if tokens.tolist() != [manifest.eos_id]:
        raise DataError(
            f"{path}: does not have the document that {shard.index} says ends at token {end}: that one is "
            f"{tokens.tolist()}, not the EOS {manifest.eos_id}; one of the two files is damaged"
        )
    first = max(end - 4096, 0)
    ids = _read(path, manifest.token_dtype, first, end - first)
    check_ids(ids, manifest.vocab_size, str(path), "the tokenizer of this data")


def _read(path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """Elements [start, start + count) of a file, as int64."""
    try:
        found = np.fromfile(path, dtype=dtype, count=count, offset=start * dtype.itemsize)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(found) != count:
        raise DataError(f"{path}: damaged: it ends before element {start + count}")
    return found.astype(np.int64)
