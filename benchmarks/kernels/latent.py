"""Kernels that decode over a latent slot: the one in use and a candidate, each with many tiles, checked and timed.

A latent slot (multi-head latent attention with absorbed up-projections) has one KV head, whose keys are the latent and
a RoPE key, and whose values are the latent. The kernel in use has query heads as rows of its matrix products; the
candidate, `latent_kernel`, has tokens as rows, and says why.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.kernels import latent_kernel
from benchmarks.kernels.checked import Checked, print_row
from benchmarks.kernels.decoding import Decode, run_tiles, unpacked
from benchmarks.kernels.latent_kernel import LatentTiles
from benchmarks.kernels.table import Table
from benchmarks.record import Row
from cllm.errors import UserError, nearest
from cllm.kernels import split_decode
from cllm.kernels.limits import Limits, device_limits
from cllm.kernels.split_decode import Tiles
from cllm.key_values import read_options

IN_USE, CANDIDATE = "heads as rows", "tokens as rows"
PRINTED = 12
"""Rows of each kernel in the table at the end; the file has all."""
WAVES = (1, 2, 3, 4, 6, 8)
"""Programs for each multiprocessor, of which each form is timed with every number."""
MOST_SPLITS = 256
MOST_OUTPUTS = 160
"""Registers of a thread for outputs. Forms of the candidate with more would spill, and are not timed."""


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
        most = f"up to {split_decode.MAX_WIDTH}, which the kernel in use computes"
        raise UserError(f'--shape "{text}": rank + rope is {width}; allowed: {most}')
    return shape


# ---- forms -----------------------------------------------------------------------------------------------------------

Form = Tiles | LatentTiles
"""Tiles, whose number of splits is chosen later."""


def forms_in_use(shape: Shape, limits: Limits) -> list[Form]:
    """Forms of the kernel in use whose tiles fit into shared memory, those like the rule's first."""
    size = 2 * (shape.rank + shape.rope)
    grid = itertools.product((32, 64, 16, 128), (4, 8), (3, 2, 4, 1))
    return [
        Tiles(block_n=n, splits=1, num_warps=warps, num_stages=stages)
        for n, warps, stages in grid
        if max(1, stages - 1) * n * size <= limits.shared
    ]


def forms_of_candidate(shape: Shape, limits: Limits) -> list[Form]:
    """Forms of the candidate that fit into shared memory and registers, the most promising first."""
    heads, whole = latent_kernel.block_h(shape.heads), latent_kernel.chunk_of(shape.rank, 512)
    size, queries = 2 * (shape.rank + shape.rope), 2 * heads * (shape.rank + shape.rope)
    grid = itertools.product(sorted({whole, min(whole, 128)}, reverse=True), (64, 128, 32), (4, 8))
    found: list[Form] = []
    for (chunk, n, warps), stages in itertools.product(grid, (2, 3, 4, 1)):
        outputs = -(-shape.rank // chunk) * chunk * heads / (32 * warps)
        if stages * n * size + queries > limits.shared or outputs > MOST_OUTPUTS:
            continue
        form = LatentTiles(block_n=n, splits=1, chunk=chunk, num_warps=warps, num_stages=stages)
        if stages > 1:  # with one stage a tile without TMA would be loaded through registers
            found.append(form)
        found.append(replace(form, descriptor=True))
    return found


def alternating(*lists: Sequence[Form]) -> Iterator[Form]:
    """One item of each list in turn, so that a deadline leaves some of each untimed."""
    for items in itertools.zip_longest(*lists):
        yield from (item for item in items if item is not None)


def splits_for(shape: Shape, form: Form, limits: Limits) -> list[int]:
    """Numbers of splits to time: for each of WAVES, as many as its programs allow, and at most one for each tile."""
    groups = shape.sequences * -(-shape.heads // latent_kernel.block_h(shape.heads))
    most = min(MOST_SPLITS, -(-shape.tokens // form.block_n))
    return sorted({max(1, min(most, waves * limits.processors // groups)) for waves in WAVES})


# ---- times -----------------------------------------------------------------------------------------------------------


class _Call(Checked):
    """A call of either kernel."""

    def run(self, tiles: Form, number: int = 0) -> Tensor:
        """Attention over one of the sets of slots."""
        keys, values = self.sets[number]
        if isinstance(tiles, Tiles):
            return run_tiles(self.queries, keys, values, self.visible, self.case.scale, tiles)
        rope = keys[1].data if len(keys) > 1 else None
        seen = (self.visible.column, self.visible.first, self.visible.window, self.visible.exclude_self)
        return latent_kernel.run(self.queries, keys[0].data, rope, *seen, self.case.scale, tiles)

    def rule(self) -> Tiles:
        k, _, v, _ = unpacked(*self.sets[0])
        return split_decode.tiles_for(self.queries, k, v, None)[0]

    def measure(self, table: Table, copy: float, tiles: Form, note: str = "") -> Row:
        """Add a row; see `Checked.add_row`."""
        kernel = IN_USE if isinstance(tiles, Tiles) else CANDIDATE
        name, run = f"{kernel}: {name_of(tiles)}{note}", functools.partial(self.run, tiles)
        row = self.add_row(table, copy, "latent", name, asdict(tiles), run)
        return row | {"kernel": kernel}


def name_of(tiles: Form) -> str:
    if isinstance(tiles, LatentTiles):
        return str(tiles)
    return f"N{tiles.block_n} splits{tiles.splits} warps{tiles.num_warps} stages{tiles.num_stages}"


def bench_latent(
    table: Table,
    copy: float,
    shape: Shape | None = None,
    seconds: float = 100,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Check and time both kernels, and print the fastest tiles of each, best first.

    The tiles by rule are timed first and last: what is timed first on an idle GPU is slower.

    Args:
        table: receives a row for each form and number of splits.
        copy: bytes per second of a copy.
        shape: by default that of `Shape`.
        seconds: no form starts later than this.
        clock: seconds since a fixed time.
    """
    end, shape = clock() + seconds, shape or Shape()
    call, limits = _Call(shape.case()), device_limits(torch.device("cuda"))
    by_rule = call.rule()
    rows = [call.measure(table, copy, by_rule, ", by rule")]
    print_row(rows[0])
    forms = list(alternating(forms_of_candidate(shape, limits), forms_in_use(shape, limits)))
    for number, form in enumerate(forms):
        if clock() >= end:
            left = f"{len(forms) - number} of {len(forms)} forms were not timed"
            print(f"latent    {left}: {seconds:g} seconds have passed")
            break
        rows.append(_best_splits(call, table, copy, form, splits_for(shape, form, limits)))
        print_row(rows[-1])
    rows.append(call.measure(table, copy, by_rule, ", by rule, again"))
    _print_best(rows, call.case.bytes() / copy * 1000)


def _best_splits(call: _Call, table: Table, copy: float, form: Form, splits: Sequence[int]) -> Row:
    """The row of the fastest number of splits."""
    rows = []
    for number in splits:
        rows.append(call.measure(table, copy, replace(form, splits=number)))
        if "failed" in rows[-1]:
            break  # other splits are the same kernel
    return min(rows, key=lambda row: row["ms"])


def _print_best(rows: Sequence[Row], bound: float) -> None:
    """Print the fastest rows of each kernel, best first, and the bound."""
    print(f"latent    best first; reading the slot at the copy's rate: {bound:.4f} ms")
    shown = set()
    for kernel in (IN_USE, CANDIDATE):
        of_kernel = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: row["ms"])
        shown |= {row["name"] for row in of_kernel[:PRINTED]}
    for row in sorted(rows, key=lambda row: row["ms"]):
        if row["ms"] < math.inf and (row["name"] in shown or "by rule" in row["name"]):
            print_row(row)
