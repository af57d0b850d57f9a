"""Parts of keys and values as chunks of channels, which the kernels of `triton_decode` take.

Tiles have power-of-two widths, so a part of another width is cut in two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cllm.kernels.limits import next_power_of_2

MAX_PAIRS = 64
"""Maximum of RoPE's pairs in one product: queries are rotated in every tile, and all of them need registers at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Channels [start, start + width) of one part, in tiles of `block` channels."""

    part: int
    start: int
    width: int
    block: int


def chunks_of(parts: Sequence[Tensor], halved: Collection[int] = ()) -> list[Chunk]:
    """Every part as one chunk if its width is a power of two; otherwise the largest power of two below, and the rest.

    576 = 512 + 64: almost half of a tile of 1024 would be padding. A matrix product needs at least 16 channels. Parts
    that are `halved` are cut into the two channels of at most 64 pairs of RoPE each, one after the other.
    """
    chunks = []
    for part, tensor in enumerate(parts):
        width = tensor.shape[-1]
        head = width if width < 16 or width == next_power_of_2(width) else next_power_of_2(width) // 2
        cuts, half = [(0, head), (head, width - head)], width // 2
        if part in halved:
            pieces = [(start, min(MAX_PAIRS, half - start)) for start in range(0, half, MAX_PAIRS)]
            cuts = [(first + start, size) for start, size in pieces for first in (0, half)]
        for start, size in cuts:
            if size:
                chunks.append(Chunk(part, start, size, max(16, next_power_of_2(size))))
    return chunks


def channels(parts: Sequence[Tensor], chunk: Chunk) -> Tensor:
    """The part of a chunk from its first channel on."""
    return parts[chunk.part][..., chunk.start :]


def argument(chunk: Chunk, parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A chunk as an argument of the kernels: pointer and strides of the data and of its scales."""
    data, scale = channels(parts, chunk), scales[chunk.part]
    scale = data if scale is None else scale  # a tuple cannot hold None; without scales the kernel does not read it
    return (data, data.stride()[:3], scale, scale.stride()[:3])


def out_starts(chunks: Sequence[Chunk], values: Sequence[Tensor]) -> tuple[int, ...]:
    """The first channel of each value chunk among the outputs of all parts side by side."""
    return tuple(sum(v.shape[-1] for v in values[: chunk.part]) + chunk.start for chunk in chunks)


def key_chunk_of(
    value_chunks: Sequence[Chunk],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    key_chunks: Sequence[Chunk],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
) -> tuple[int, ...]:
    """For each value chunk, the index of the key chunk with the same data, or -1. Such a chunk is loaded once."""

    def same(v: int, k: int) -> bool:
        a, b = value_scales[v], key_scales[k]
        return values[v].is_set_to(keys[k]) and (a.is_set_to(b) if a is not None and b is not None else a is b)

    indices = []
    for value in value_chunks:
        matches = (i for i, key in enumerate(key_chunks) if same(value.part, key.part) and (value.start == key.start))
        indices.append(next(matches, -1))
    return tuple(indices)
