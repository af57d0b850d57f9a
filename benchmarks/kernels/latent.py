"""The kernel that decodes over a latent slot, with many tiles, each checked and timed.

A latent slot (multi-head latent attention with absorbed up-projections) has one KV head, whose keys are the latent and
a RoPE key, and whose values are the latent.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from benchmarks.kernels.checked import Checked, fastest, print_row
from benchmarks.kernels.decoding import Decode, unpacked
from benchmarks.kernels.table import Table
from benchmarks.record import Row
from cllm.errors import UserError, nearest
from cllm.kernels import split_decode
from cllm.kernels.limits import Limits, device_limits
from cllm.kernels.split_decode import Tiles
from cllm.kernels.split_latent import LatentTiles
from cllm.key_values import read_options

PRINTED = 12
"""Rows of the table at the end; the file has all."""
WAVES = (1, 2, 3, 4, 6, 8)
"""Programs for each multiprocessor, of which each form is timed with every number."""
MOST_SPLITS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One decode call over a latent slot in bf16."""

    rank: int = 512
    """Channels of the latent."""
    rope: int = 64
    """Channels of the RoPE key, or 0 without one."""
    heads: int = 16
    """Query heads."""
    sequences: int = 4
    tokens: int = 32768
    """Of each sequence."""

    def case(self) -> Decode:
        parts = (self.rank, self.rope) if self.rope else (self.rank,)
        rope = f" + {self.rope}" if self.rope else ""
        name = f"{self.rank}{rope}, {self.heads} heads, {self.sequences} x {self.tokens}"
        return Decode(
            name=name, b=self.sequences, h=self.heads, g=1, s=self.tokens, live=self.tokens,
            d=parts, e=(self.rank,), latent=True,
        )  # fmt: skip


def parse_shape(text: str) -> Shape:
    """The shape of `rank=512,rope=64,heads=16,sequences=4,tokens=32768`, of which each has its default.

    Raises:
        UserError: for another key or number, and for keys that are too wide.
    """
    allowed, numbers = [field.name for field in fields(Shape)], {}
    for key, value in read_options(text, f'--shape "{text}"', allowed=", ".join(allowed)):
        if key not in allowed:
            raise UserError(f'--shape "{text}": unknown {key}; {nearest(key, allowed)}')
        least = {"rope": 0, "rank": 16}.get(key, 1)
        step = 16 if key in ("rank", "rope") else 1
        if not value.isdecimal() or int(value) < least or int(value) % step:
            multiples = f", multiples of {step}" if step > 1 else ""
            raise UserError(f'--shape "{text}": {key} is {value}; allowed: whole numbers from {least} on{multiples}')
        numbers[key] = int(value)
    shape = Shape(**numbers)
    if (width := shape.rank + shape.rope) > split_decode.MAX_WIDTH:
        most = f"up to {split_decode.MAX_WIDTH}, which the kernel computes"
        raise UserError(f'--shape "{text}": rank + rope is {width}; allowed: {most}')
    return shape


# ---- forms -----------------------------------------------------------------------------------------------------------


def forms(shape: Shape, limits: Limits) -> list[Tiles]:
    """Forms whose tiles fit into shared memory, those like the rule's first. Their number of splits is chosen later."""
    size = 2 * (shape.rank + shape.rope)
    grid = itertools.product((32, 64, 16, 128), (4, 8), (3, 2, 4, 1))
    return [
        Tiles(block_n=n, splits=1, num_warps=warps, num_stages=stages)
        for n, warps, stages in grid
        if max(1, stages - 1) * n * size <= limits.shared
    ]


def splits_for(shape: Shape, form: Tiles, limits: Limits) -> list[int]:
    """Numbers of splits to time: for each of WAVES, as many as its programs allow, and at most one for each tile."""
    groups = shape.sequences * -(-shape.heads // split_decode.head_block(shape.heads))
    most = min(MOST_SPLITS, -(-shape.tokens // form.block_n))
    return sorted({max(1, min(most, waves * limits.processors // groups)) for waves in WAVES})


# ---- times -----------------------------------------------------------------------------------------------------------


def _rule(call: Checked) -> Tiles:
    k, _, v, _ = unpacked(*call.sets[0])
    return split_decode.tiles_for(call.queries, k, v, None)[0]


def _special(call: Checked) -> LatentTiles | None:
    """Tiles by rule of the kernel for latents on Hopper GPUs, if it computes the call."""
    best = split_decode.best_tiles(call.queries, *unpacked(*call.sets[0]), None)
    return best if isinstance(best, LatentTiles) else None


def name_of(tiles: Tiles | LatentTiles) -> str:
    if isinstance(tiles, LatentTiles):
        return f"for Hopper, splits{tiles.splits}"
    return f"N{tiles.block_n} splits{tiles.splits} warps{tiles.num_warps} stages{tiles.num_stages}"


def bench_latent(
    table: Table,
    copy: float,
    shape: Shape | None = None,
    seconds: float = 100,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Check and time the kernel with many tiles, and print the fastest, best first.

    The tiles by rule are timed first and last: what is timed first on an idle GPU is slower.

    Args:
        table: receives a row for each form and number of splits.
        copy: bytes per second of a copy.
        shape: by default that of `Shape`.
        seconds: no form starts later than this.
        clock: seconds since a fixed time.
    """
    end, shape = clock() + seconds, shape or Shape()
    call, limits = Checked("latent", shape.case()), device_limits(torch.device("cuda"))
    by_rule = _rule(call)
    rows = [call.measure(table, copy, f"{name_of(by_rule)}, by rule", by_rule)]
    print_row(rows[0])
    every = forms(shape, limits)
    for number, form in enumerate(every):
        if clock() >= end:
            left = f"{len(every) - number} of {len(every)} forms were not timed"
            print(f"latent    {left}: {seconds:g} seconds have passed")
            break
        each = (replace(form, splits=splits) for splits in splits_for(shape, form, limits))
        rows.append(fastest(call.measure(table, copy, name_of(tiles), tiles) for tiles in each))
        print_row(rows[-1])
    if (special := _special(call)) is not None:
        rows.append(call.measure(table, copy, f"{name_of(special)}, by rule", special))
        print_row(rows[-1])
    rows.append(call.measure(table, copy, f"{name_of(by_rule)}, by rule, again", by_rule))
    _print_best(rows, call.case.bytes() / copy * 1000)


def _print_best(rows: Sequence[Row], bound: float) -> None:
    """Print the fastest rows, best first, and the bound."""
    print(f"latent    best first; reading the slot at the copy's rate: {bound:.4f} ms")
    ordered = sorted((row for row in rows if row["ms"] < math.inf), key=lambda row: row["ms"])
    for place, row in enumerate(ordered):
        if place < PRINTED or "by rule" in row["name"]:
            print_row(row)
