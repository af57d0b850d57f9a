"""Entropy-coded integers: matrices of small whole numbers as compressed bytes.

A number q is stored as 2 |q| - (q < 0), so that small numbers of both signs have small codes. Each column gets the
fewest of 1, 2, 4, 8, 16 or 32 bits that its largest code needs. Columns of one width are packed one after the other.
Huffman codes of the resulting bytes (DEFLATE, RFC 1951, without string matching) remove what the width wastes: four
numbers of 2 bits are one byte with one code, so a number can take less than a bit. Normal numbers take at most 7 % more
than their entropy.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

WIDTHS = (1, 2, 4, 8, 16, 32)
_HEADER = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_MOST_KEPT = 2
"""Streams that are kept: that of a group's keys and that of its values."""
_kept: ContextVar[dict[int, tuple[Tensor, list[Tensor]]] | None] = ContextVar("kept", default=None)


def compress(numbers: Tensor) -> bytes:
    """The whole numbers (n, r) int32, each above -2^31, as bytes."""
    q = numbers.cpu().numpy().astype(np.int64).T
    codes = np.where(q < 0, -2 * q - 1, 2 * q).astype(np.uint32)
    largest = codes.max(axis=1, initial=0)
    classes = np.searchsorted(np.array([2**w - 1 for w in WIDTHS]), largest).astype(np.uint8)
    parts = [_HEADER.pack(*numbers.shape), _sized(_deflate(classes.tobytes()))]
    for i, width in enumerate(WIDTHS):
        if (chosen := codes[classes == i]).size:
            low = _pack(chosen.reshape(-1), width) if width < 8 else chosen.astype(np.uint8).tobytes()
            parts.append(_sized(_deflate(low)))
            if width > 8:
                high = np.stack([(chosen >> shift) & 255 for shift in range(8, width, 8)]).astype(np.uint8)
                parts.append(_sized(_deflate(high.tobytes(), zlib.Z_RLE)))
    return b"".join(parts)


def decompress(data: bytes) -> Tensor:
    """The numbers (n, r) int32. Bytes after the end of the code are ignored.

    Raises `ValueError` for bytes that `compress` did not write.
    """
    try:
        rows, columns = _HEADER.unpack_from(data)
        place = _HEADER.size
        raw, place = _next(data, place)
        classes = np.frombuffer(raw, np.uint8)
        codes = np.zeros((columns, rows), np.uint32)
        for i, width in enumerate(WIDTHS):
            count = int((classes == i).sum())
            if not count * rows:
                continue
            raw, place = _next(data, place)
            low = np.frombuffer(raw, np.uint8)
            low = _unpack(low, width, count * rows) if width < 8 else low
            found = low.reshape(count, rows).astype(np.uint32)
            if width > 8:
                raw, place = _next(data, place)
                high = np.frombuffer(raw, np.uint8).reshape(width // 8 - 1, count, rows).astype(np.uint32)
                for j, shift in enumerate(range(8, width, 8)):
                    found |= high[j] << shift
            codes[classes == i] = found
    except (struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"an entropy code is damaged: {error}") from None
    wide = codes.astype(np.int64)
    q = np.where(wide & 1, -((wide + 1) >> 1), wide >> 1)
    return torch.from_numpy(q.T.astype(np.int32))


def decompress_rows(stream: Tensor) -> list[Tensor]:
    """The numbers of every row of `stream` (B, bytes); inside of `shared_streams`, the last ones are kept."""
    kept = _kept.get()
    if kept is None:
        return [decompress(from_row(row)) for row in stream]
    if id(stream) not in kept:
        kept[id(stream)] = stream, [decompress(from_row(row)) for row in stream]
        for name in list(kept)[:-_MOST_KEPT]:
            del kept[name]
    return kept[id(stream)][1]


@contextmanager
def shared_streams() -> Iterator[None]:
    """Inside, a stream that several neighbouring slots share is decoded once, not once a slot."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def to_rows(streams: list[bytes], device: torch.device) -> Tensor:
    """uint8 (B, bytes): one stream for each sequence, padded with zeros to the longest."""
    rows = torch.zeros(len(streams), max(map(len, streams)), dtype=torch.uint8)
    for row, stream in zip(rows, streams, strict=True):
        row[: len(stream)] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    return rows.to(device)


def from_row(row: Tensor) -> bytes:
    """The stream of one sequence, with its padding."""
    return row.cpu().numpy().tobytes()


def _pack(codes: np.ndarray, width: int) -> bytes:
    per_byte = 8 // width
    padded = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    return (padded << (width * np.arange(per_byte))).sum(1).astype(np.uint8).tobytes()


def _unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    shifts = width * np.arange(8 // width, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:count]


def _deflate(raw: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return deflate.compress(raw) + deflate.flush()


def _sized(part: bytes) -> bytes:
    return _SIZE.pack(len(part)) + part


def _next(data: bytes, place: int) -> tuple[bytes, int]:
    """The next part of a code, and where the one after it begins."""
    (size,) = _SIZE.unpack_from(data, place)
    place += _SIZE.size
    return zlib.decompress(data[place : place + size], -15), place + size
