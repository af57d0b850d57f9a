"""Decoding kernels: attention of one new token over cached slots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.table import Table, rand
from benchmarks.record import reason_of
from benchmarks.timing import BF16, replayed_ms
from cllm.config import Rope
from cllm.kernels import split_decode
from cllm.kernels.decode import Stored, Visible, decode_attention, rotation_of
from cllm.kernels.split_latent import LatentTiles
from cllm.kernels.split_tied import TiedTiles
from cllm.model.rope import rope_table


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One decode call of `h` query heads and `g` KV heads over a ring of `s` entries, of which `live` are filled."""

    name: str
    b: int = 4
    """Sequences."""
    h: int = 16
    g: int = 16
    s: int = 32768
    live: int = 32768
    d: tuple[int, ...] = (128,)
    """Width of each key part."""
    e: tuple[int, ...] = (128,)
    """Width of each value part."""
    latent: bool = False
    """The value is the first key part."""
    float8: bool = False
    rope: bool = False
    """The first key part is stored before RoPE."""

    @property
    def scale(self) -> float:
        return sum(self.d) ** -0.5

    def stored(self, width: int) -> Stored:
        """One random part of the cache."""
        if not self.float8:
            return Stored(rand(self.b, self.s, self.g, width, grad=False))
        data = torch.empty((self.b, self.s, self.g, width), device="cuda", dtype=torch.float8_e4m3fn)
        for row in data:
            row.copy_((torch.randn(row.shape, device="cuda", dtype=BF16) * 100).clamp(-448, 448))  # the largest number
        return Stored(data, torch.full((self.b, self.s, self.g), 0.01, device="cuda", dtype=BF16))

    def sets(self) -> list[tuple[list[Stored], list[Stored]]]:
        """Keys and values of several caches, so that none is left in the L2 cache by the call before."""
        number = max(1, min(2**29 // self.bytes(), 2**34 * self.live // (self.s * self.bytes())))
        table = rope_table(Rope(), self.d[0], torch.arange(self.s, device="cuda")[None]) if self.rope else None
        sets = []
        for _ in range(number):
            keys = [self.stored(d) for d in self.d]
            values = keys[:1] if self.latent else [self.stored(e) for e in self.e]
            sets.append(([replace(keys[0], rope=table), *keys[1:]] if self.rope else keys, values))
        return sets

    def bytes(self) -> int:
        """Stored bytes of the filled entries."""
        width = sum(self.d) + (0 if self.latent else sum(self.e))
        parts = len(self.d) + (0 if self.latent else len(self.e))
        return self.b * self.live * self.g * (width + 2 * parts if self.float8 else 2 * width)


DECODES = (
    Decode(name="4 x 16 heads"),
    Decode(name="16 x 4 heads, 16 queries", b=16, g=4),
    Decode(name="fused, 4 x 16 heads", d=(128, 128), e=(128, 128)),
    Decode(name="fused, 16 x 4 heads, 16 queries", b=16, g=4, d=(128, 128), e=(128, 128)),
    Decode(name="latent, 8 x 16 queries", b=8, g=1, d=(512, 64), e=(512,), latent=True),
    Decode(name="latent, 8 x 128 queries", b=8, h=128, g=1, d=(512, 64), e=(512,), latent=True),
    Decode(name="tied, 4 x 16 heads", latent=True, rope=True),
    Decode(name="tied, 16 x 4 heads, 16 queries", b=16, g=4, latent=True, rope=True),
    Decode(name="float8, 4 x 16 heads", float8=True),
    Decode(name="float8, 16 x 4 heads, 16 queries", b=16, g=4, float8=True),
    Decode(name="1 x 16 heads, 1024 tokens", b=1, s=1024, live=1024),
    Decode(name="1 x 16 heads, 1024 of 131072", b=1, s=131072, live=1024),
    Decode(name="1 x 4 heads, 16 queries, 1024 tokens", b=1, g=4, s=1024, live=1024),
)


def bench_decode(table: Table, copy: float, sweep: bool = False, only: str = "") -> None:
    """Time every case whose name contains `only`; `copy`: bytes/s, `sweep`: also other tiles than the default ones."""
    for case in (case for case in DECODES if only in case.name):
        _bench_case(table, case, copy, sweep)
        torch.cuda.empty_cache()


def _bench_case(table: Table, case: Decode, copy: float, sweep: bool) -> None:
    visible = Visible(torch.tensor([case.live - 1], device="cuda"), None, None, False)
    queries = [rand(case.b, case.h, d, grad=False) for d in case.d]
    sets = case.sets()

    def time(name: str, calls: list[Callable[[], object]]) -> float:
        return _time(table, case, name, calls, case.bytes() / copy * 1000)

    def triton(tiles: split_decode.Tiles | None = None) -> list[Callable[[], object]]:
        return [functools.partial(_triton, queries, keys, values, visible, case.scale, tiles) for keys, values in sets]

    k, k_scales, v, v_scales = unpacked(*sets[0])
    rotation = rotation_of(sets[0][0])
    default = split_decode.best_tiles(queries, k, k_scales, v, v_scales, None, rotation)
    time(f"triton, {_tiles(default)}", triton())
    if not isinstance(default, split_decode.Tiles):
        default = split_decode.tiles_for(queries, k, v, None, rotation)[0]
        time(f"triton, {_tiles(default)}", triton(default))
    if case.h == case.g and rotation is None:
        element = replace(default, elementwise=True)
        time(f"triton, {_tiles(element)}", triton(element))
    if not case.float8 and not case.latent:
        joined = [[torch.cat([x.data[:, : case.live] for x in part], -1) for part in pair] for pair in sets]
        name = "torch" if len(case.d) == 1 else "torch, doubled head dimension"
        time(name, [functools.partial(_torch, queries, k, v, case.scale) for k, v in joined])
        del joined
    if sweep:
        times = {
            tiles: time(_tiles(tiles), triton(tiles))
            for tiles in _neighbours(default, case.h == case.g and rotation is None)
        }
        for tiles in sorted(times, key=lambda tiles: times[tiles])[:3]:
            print(f"best      {case.name:<38}{_tiles(tiles):<38}{times[tiles]:9.4f} ms", flush=True)


def _time(table: Table, case: Decode, name: str, calls: list[Callable[[], object]], bound: float) -> float:
    """Add a row with the ms of one of `calls`; infinity for calls that fail."""
    try:
        ms = replayed_ms(calls)
    except Exception as error:
        reason = reason_of(error, 90)
        torch.cuda.synchronize()
        print(f"decode    {case.name:<38}{name:<38} failed: {reason}")
        return float("inf")
    table.add({"what": "decode", "case": case.name, "name": name, "ms": ms, "bound_ms": bound})
    rate = f"{case.bytes() / ms / 1e6:6.0f} GB/s {100 * bound / ms:5.1f} % of copy"
    print(f"decode    {case.name:<38}{name:<38}{ms:9.4f} ms {rate}", flush=True)
    return ms


def _triton(
    queries: list[Tensor],
    keys: list[Stored],
    values: list[Stored],
    visible: Visible,
    scale: float,
    tiles: split_decode.Tiles | None,
) -> object:
    """One call of the Triton kernel, with its default tiles if `tiles` is None."""
    if tiles is None:
        return decode_attention(queries, keys, values, visible, scale=scale, kernel="triton")
    return run_tiles(queries, keys, values, visible, scale, tiles)


def run_tiles(
    queries: list[Tensor],
    keys: list[Stored],
    values: list[Stored],
    visible: Visible,
    scale: float,
    tiles: split_decode.AnyTiles,
) -> Tensor:
    """(B, H, sum of E): one call of the Triton kernel that `tiles` are of."""
    seen = (visible.column, visible.first, visible.window, visible.exclude_self)
    return split_decode.run(queries, *unpacked(keys, values), *seen, scale, tiles, rotation=rotation_of(keys))


def unpacked(
    keys: list[Stored], values: list[Stored]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor | None]]:
    """Keys, their scales, values and their scales, as `split_decode` takes them."""
    return [x.data for x in keys], [x.scale for x in keys], [x.data for x in values], [x.scale for x in values]


def _torch(queries: list[Tensor], keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One call of torch's attention; `keys` and `values` (B, S, G, D)."""
    q, k, v = torch.cat(queries, -1)[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _tiles(tiles: split_decode.AnyTiles) -> str:
    if isinstance(tiles, TiedTiles):
        return f"tied parts{tiles.parts} splits{tiles.splits} warps{tiles.num_warps} stages{tiles.num_stages}"
    if isinstance(tiles, LatentTiles):
        return f"latent on Hopper splits{tiles.splits}"
    form = " elementwise" if tiles.elementwise else ""
    return f"N{tiles.block_n} splits{tiles.splits} warps{tiles.num_warps} stages{tiles.num_stages}{form}"


def _neighbours(default: split_decode.Tiles, elementwise: bool) -> list[split_decode.Tiles]:
    """Tiles with half, the same and double of each default value, in every combination, and in both forms."""
    return [
        split_decode.Tiles(block_n=n, splits=splits, num_warps=warps, num_stages=stages, elementwise=form)
        for n in sorted({max(16, default.block_n // 2), default.block_n, 2 * default.block_n})
        for warps in sorted({max(2, default.num_warps // 2), default.num_warps})
        for stages in (2, 3, 4)
        for form in ((False, True) if elementwise else (False,))
        for splits in sorted({max(1, default.splits // 2), default.splits, 2 * default.splits})
    ]
