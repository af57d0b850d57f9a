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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cllm.posthoc.tensor_tree import TensorTree

T = TypeVar("T")
WIDTHS = (1, 2, 4, 8, 16, 32)
SIZE_BYTES = 4
"""Bytes of the size of a code in `Streams`."""
_HEADER = struct.Struct("<II")
_SIZE = struct.Struct("<I")
_MOST_KEPT = 2
"""Codes that are kept: that of a group's keys and that of its values."""
_kept: ContextVar[dict[tuple[int, int], tuple[Tensor, list[Any]]] | None] = ContextVar("kept", default=None)


def compress(numbers: Tensor) -> bytes:
    """The whole numbers (n, r) int32, each above -2^31, as bytes."""
    q = np.ascontiguousarray(numbers.cpu().numpy().T)
    codes = ((q << 1) ^ (q >> 31)).view(np.uint32)
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
    """The numbers (n, r) int32, one column after the other in memory. Bytes after the end of the code are ignored.

    Raises `ValueError` for bytes that `compress` did not write.
    """
    try:
        rows, columns = _HEADER.unpack_from(data)
        place = _HEADER.size
        raw, place = _next(data, place)
        classes = np.frombuffer(raw, np.uint8)
        q = np.zeros((columns, rows), np.int32)
        for i, width in enumerate(WIDTHS):
            chosen = classes == i
            count = int(chosen.sum())
            if not count * rows:
                continue
            raw, place = _next(data, place)
            low = np.frombuffer(raw, np.uint8)
            if width <= 8:
                q[chosen] = _NUMBERS[width][low].reshape(-1)[: count * rows].reshape(count, rows)
                continue
            codes = low.reshape(count, rows).astype(np.uint32)
            raw, place = _next(data, place)
            high = np.frombuffer(raw, np.uint8).reshape(width // 8 - 1, count, rows).astype(np.uint32)
            for j, shift in enumerate(range(8, width, 8)):
                codes |= high[j] << shift
            q[chosen] = (codes >> 1).view(np.int32) ^ -(codes & 1).view(np.int32)
    except (struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"an entropy code is damaged: {error}") from None
    return torch.from_numpy(q).T


@contextmanager
def shared_streams() -> Iterator[None]:
    """Inside, a code that several neighbouring slots share is decoded once, not once a slot."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


@dataclass(frozen=True)
class Streams(TensorTree):
    """All entropy codes of a cache: those of a sequence one after the other, so that only their sum is padded to the
    longest sequence of a batch."""

    data: Tensor
    """uint8 (B, bytes)."""
    sizes: Tensor
    """(B, streams) int32: bytes of each code."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[bytes]], device: torch.device) -> Streams:
        """From as many codes for every sequence."""
        rows = [torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8) for streams in sequences]
        data = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.uint8)
        for row, filled in zip(data, rows, strict=True):
            row[: len(filled)] = filled
        sizes = torch.tensor([[len(stream) for stream in streams] for streams in sequences], dtype=torch.int32)
        return cls(data.to(device), sizes.to(device))

    def numbers(self, row: int, place: int) -> Tensor:
        """The numbers (n, r) int32 of code `place` of sequence `row`."""
        end = int(self.sizes[row, : place + 1].sum())
        code = self.data[row, end - int(self.sizes[row, place]) : end]
        return decompress(code.cpu().numpy().tobytes())

    def each_row(self, place: int, decode: Callable[[int, Tensor], T]) -> list[T]:
        """`decode(row, numbers)` of code `place` for every sequence; inside of `shared_streams`, the last are kept."""
        kept = _kept.get()
        if kept is None:
            return [decode(row, self.numbers(row, place)) for row in range(len(self.data))]
        name = id(self.data), place
        if name not in kept:
            kept[name] = self.data, [decode(row, self.numbers(row, place)) for row in range(len(self.data))]
            for other in list(kept)[:-_MOST_KEPT]:
                del kept[other]
        return kept[name][1]


def _pack(codes: np.ndarray, width: int) -> bytes:
    per_byte = 8 // width
    padded = np.pad(codes.astype(np.uint8), (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    packed = padded[:, 0].copy()
    for i in range(1, per_byte):
        packed |= padded[:, i] << (width * i)
    return packed.tobytes()


def _numbers(width: int) -> np.ndarray:
    """(256, 8 / width) int16: the numbers in each byte of codes of `width` bits."""
    shifts = width * np.arange(8 // width)
    codes = (np.arange(256)[:, None] >> shifts) & (2**width - 1)
    return ((codes >> 1) ^ -(codes & 1)).astype(np.int16)


_NUMBERS = {width: _numbers(width) for width in WIDTHS if width <= 8}


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
