"""Decoding calls whose results are compared with plain torch in fp32 before they are timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.kernels.decoding import Decode, run_tiles
from benchmarks.kernels.table import Table, rand
from benchmarks.record import Row, reason_of
from benchmarks.timing import replayed_ms
from cllm.kernels.decode import Stored, Visible, decode_attention_reference
from cllm.kernels.split_decode import AnyTiles

LARGEST_ERROR = 2**-5
"""Of a head, relative to its largest number. Results are rounded to bf16; matrix products round keys too."""


class Checked:
    """The arguments of one case of the benchmark `what`, and its exact result."""

    def __init__(self, what: str, case: Decode):
        self.what, self.case, self.sets = what, case, case.sets()
        self.queries = [rand(case.b, case.h, d, grad=False) for d in case.d]
        self.queries[0][:, ::2] *= 4  # every other head sees few tokens, so that an error of one of them shows
        self.visible = Visible(torch.tensor([case.live - 1], device=self.queries[0].device), None, None, False)
        keys, values = self.sets[0]
        rows = [
            decode_attention_reference(
                [q[b : b + 1].float() for q in self.queries],
                _row(keys, b),
                _row(values, b),
                self.visible,
                scale=case.scale,
            )[0]
            for b in range(case.b)
        ]
        self.wanted = torch.cat(rows)

    def run(self, tiles: AnyTiles, number: int = 0) -> Tensor:
        """Attention (B, H, sum of E) over one of the sets of slots."""
        return run_tiles(self.queries, *self.sets[number], self.visible, self.case.scale, tiles)

    def measure(self, table: Table, copy: float, name: str, tiles: AnyTiles) -> Row:
        """Add a row: ms, the share of the copy's rate and the largest error. Infinite ms: it failed or is wrong.

        Args:
            table: receives the row.
            copy: bytes per second of a copy.
            name: the variant that is timed.
            tiles: of the variant.
        """
        bound = self.case.bytes() / copy * 1000
        row: Row = {"what": self.what, "case": self.case.name, "name": name, "ms": math.inf, "bound_ms": bound}
        try:
            error = (self.run(tiles).float() - self.wanted).abs().amax(-1) / self.wanted.abs().amax(-1)
            row["error"] = error.max().item()
            if not row["error"] <= LARGEST_ERROR:
                raise ArithmeticError(f"error {row['error']:.1e}, more than {LARGEST_ERROR:.1e}")
            row["ms"] = replayed_ms([functools.partial(self.run, tiles, n) for n in range(len(self.sets))])
        except Exception as failure:
            row["failed"] = reason_of(failure, 150)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        row |= {"share": bound / row["ms"], "tiles": asdict(tiles)}
        table.add({key: value for key, value in row.items() if value != math.inf})
        return row


def _row(parts: Sequence[Stored], b: int) -> list[Stored]:
    """One sequence of the parts; their tables have one row for all."""
    return [replace(x, data=x.data[b : b + 1], scale=None if x.scale is None else x.scale[b : b + 1]) for x in parts]


def fastest(rows: Iterable[Row]) -> Row:
    """The fastest of `rows` of one kernel, which are measured as they are taken: none after one that failed."""
    measured = []
    for row in rows:
        measured.append(row)
        if "failed" in row:
            break
    return min(measured, key=lambda row: row["ms"])


def print_row(row: Row) -> None:
    """Print a row of `Checked.measure`."""
    result = f"{row['ms']:9.4f} ms {100 * row['share']:6.1f} % of copy  error {row.get('error', math.nan):.1e}"
    print(f"{row['what']:<10}{row['case']:<38}{row['name']:<58}{row.get('failed', result)}", flush=True)
