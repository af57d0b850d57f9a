"""The candidate kernel over latent slots, against the definition in fp64, and the benchmark that times it.

Run as a program, this file tests the kernel, interpreted on the CPU. Numbers are fp16: the interpreter multiplies bf16
as integers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.kernels import checked, decoding, latent, latent_kernel, table
from benchmarks.kernels.__main__ import main as kernels
from benchmarks.kernels.latent import Shape, parse_shape
from benchmarks.kernels.latent_kernel import LatentTiles
from cllm.errors import UserError
from cllm.kernels import triton_decode
from cllm.kernels.decode import Stored, Visible, decode_attention_lse
from cllm.kernels.limits import Limits

SCALE = 0.1


@dataclass(frozen=True)
class Case:
    """One call over a ring of `s` entries. `first` has a column for each sequence."""

    rank: int = 64
    rope: int = 16
    h: int = 16
    g: int = 1
    s: int = 200
    column: int = 150
    first: tuple[int, ...] | None = None
    window: int | None = None
    exclude_self: bool = False
    splits: int = 3
    chunk: int = 512
    block_n: int = 64


CASES = [
    Case(),
    Case(rank=512, rope=64, s=130, column=129),
    Case(rank=512, rope=64, s=130, column=100, chunk=128),
    Case(rank=512, rope=64, s=65, column=64, chunk=256, splits=1),
    Case(rank=384, rope=32),  # three chunks of 128
    Case(rank=96, rope=48),  # padded: two chunks of 64, RoPE keys of 64
    Case(rank=32, rope=0),
    Case(h=3),
    Case(h=128, s=70, column=69),  # two blocks of query heads
    Case(h=80, splits=1, s=70, column=69),  # the second block is not full
    Case(h=8, g=2),
    Case(column=0),
    Case(column=199),
    Case(column=200),
    Case(column=517),
    Case(column=517, window=70),
    Case(column=517, window=70, exclude_self=True),
    Case(column=0, exclude_self=True),  # nothing is seen
    Case(first=(0, 149, 90)),
    Case(first=(100, 200, 0), column=260),
    Case(splits=7, block_n=16),
    Case(splits=2, block_n=128),
]
DESCRIPTORS = (False, True)


def call(case: Case, *, written_only: bool) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]:
    """Arguments of `latent_kernel.run` until the scale, and the exact output and log-sum-exp to base e.

    Entries that were never written are NaN if `written_only`, else zero.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    rows = 2 if case.first is None else len(case.first)
    data, rope = drawn(rows, case.s, case.g, case.rank), drawn(rows, case.s, case.g, case.rope)
    for part in (data, rope):
        part[:, case.column + 1 :] = float("nan") if written_only else 0
    queries = [drawn(rows, case.h, case.rank), drawn(rows, case.h, case.rope)][: 2 if case.rope else 1]
    first = None if case.first is None else torch.tensor(case.first)
    visible = Visible(torch.tensor([case.column]), first, case.window, case.exclude_self)
    keys = [Stored(part.double()) for part in (data, rope)[: len(queries)]]
    (out,), lse = decode_attention_lse(
        [q.double() for q in queries], keys, keys[:1], visible, scale=SCALE, kernel="reference"
    )
    seen = (visible.column, visible.first, visible.window, visible.exclude_self)
    return (queries, data, rope if case.rope else None, *seen, SCALE), out, lse


def interpreted() -> None:
    """Every case, with addresses and with descriptors, which may read entries that were never written."""
    assert triton_decode.INTERPRETED
    for case in CASES:
        for descriptor in DESCRIPTORS:
            arguments, wanted, wanted_lse = call(case, written_only=not descriptor)
            tiles = LatentTiles(
                block_n=case.block_n, splits=case.splits, chunk=case.chunk, num_stages=2, descriptor=descriptor
            )
            log_sum = torch.empty(wanted.shape[:2])
            exact = latent_kernel.run(*arguments, tiles, log_sum)
            try:
                torch.testing.assert_close(exact.double(), wanted, atol=2e-3, rtol=2e-3)
                torch.testing.assert_close(log_sum.double() * math.log(2), wanted_lse, atol=2e-3, rtol=2e-3)
            except AssertionError as error:
                raise AssertionError(f"{case}, descriptor: {descriptor}") from error
    torch.testing.assert_close(latent_kernel.run(*arguments, tiles), exact.half())
    with pytest.raises(ValueError, match="needs bf16 or fp16"):
        latent_kernel.run([torch.zeros(1, 1, 64)], torch.zeros(1, 8, 1, 64), None, *arguments[3:], tiles)
    benchmark()


def benchmark() -> None:
    """The benchmark finds the first forms of both kernels correct, and stops at its deadline. Times are not real."""
    times, seconds = itertools.cycle((3.0, 1.0, 4.0, 2.0, 7.0)), itertools.count()

    def replayed_ms(calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        return next(times)

    checked.replayed_ms = replayed_ms  # type: ignore[assignment]
    for module in (checked, decoding):
        module.rand = lambda *shape, grad=True: torch.randn(shape).half()  # type: ignore[attr-defined]
    decoding.Decode.bytes = lambda self: 2**29  # type: ignore[method-assign] # so that there is one set of slots
    latent.device_limits = lambda device: Limits(processors=6)  # type: ignore[assignment]
    rows = table.Table({}, None)
    shape = Shape(rank=128, rope=16, heads=4, sequences=2, tokens=150)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        latent.bench_latent(rows, 1e9, shape, seconds=5, clock=lambda: next(seconds))
    assert not [row["failed"] for row in rows.rows if "failed" in row]
    assert [row["name"].endswith("by rule, again") for row in rows.rows].index(True) == len(rows.rows) - 1
    kernels = [row["name"].partition(":")[0] for row in rows.rows]
    assert kernels.count(latent.IN_USE) > 3
    assert kernels.count(latent.CANDIDATE) > 1
    progress, _, best = printed.getvalue().partition("best first")
    count = len(latent.forms_in_use(shape, Limits())) + len(latent.forms_of_candidate(shape, Limits()))
    assert f"{count - 4} of {count} forms were not timed: 5 seconds have passed" in progress
    assert len(progress.splitlines()) == 1 + 4 + 2
    sorted_ms = [float(ms) for ms in re.findall(r"([0-9.]+) ms .* error", best)]
    assert len(sorted_ms) == 6
    assert sorted_ms == sorted(sorted_ms)
    assert sorted_ms[0] < sorted_ms[-1]


def test_forms_fit_into_shared_memory_and_registers() -> None:
    limits = Limits()
    forms = latent.forms_of_candidate(Shape(), limits)
    assert forms[0] == LatentTiles(splits=1)  # the default ones, with which the kernel is compiled for a Hopper GPU
    size = 2 * (512 + 64)
    assert {(f.block_n, f.num_stages) for f in forms} == {
        (64, 2),
        (64, 1),
        (128, 1),
        (32, 2),
        (32, 3),
        (32, 4),
        (32, 1),
    }
    assert len(forms) == 44
    assert all(f.num_stages * f.block_n * size <= limits.shared for f in forms)
    assert {f.num_warps for f in latent.forms_of_candidate(Shape(heads=128), limits)} == {8}
    assert {f.chunk for f in latent.forms_of_candidate(Shape(rank=384), limits)} == {128}
    assert len(latent.forms_in_use(Shape(), limits)) == 28


def test_splits_fill_the_device() -> None:
    form = LatentTiles(block_n=64)
    assert latent.splits_for(Shape(), form, Limits()) == [33, 66, 99, 132, 198, 256]
    assert latent.splits_for(Shape(tokens=640), form, Limits()) == [10]
    assert latent.splits_for(Shape(heads=128, sequences=200), form, Limits()) == [1, 2]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("rank=384", Shape(rank=384)),
        (
            "rank=256, rope=0,heads=128,sequences=8,tokens=1001",
            Shape(rank=256, rope=0, heads=128, sequences=8, tokens=1001),
        ),
    ],
)
def test_a_shape_is_read(text: str, shape: Shape) -> None:
    assert parse_shape(text) == shape
    assert Shape(rope=0).case().d == (512,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks=512", 'unknown ranks; did you mean "rank"'),
        ("rank=500", "rank is 500; allowed: whole numbers from 16 on, multiples of 16"),
        ("heads=0", "heads is 0; allowed: whole numbers from 1 on"),
        ("heads=1.5", "heads is 1.5"),
        ("rank=1024", "rank [+] rope is 1088; allowed: up to 640"),
        ("rank", "not of the form KEY=VALUE; allowed: rank, rope, heads, sequences, tokens"),
    ],
)
def test_other_shapes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f'--shape "{text}".*{message}'):
        parse_shape(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels(["latent", "--shape", "heads=32", "--seconds", "1"]) == 2
    assert "times a GPU, and torch sees none" in capsys.readouterr().err
    assert kernels(["latent", "--shape", "head=32"]) == 2
    assert 'did you mean "heads"' in capsys.readouterr().err


def test_the_kernel_interpreted_is_the_definition(run_interpreted: Any) -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreted()
