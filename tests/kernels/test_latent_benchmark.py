"""The benchmark of the kernel over latent slots.

Run as a program, this file runs it in the interpreter on the CPU. Numbers are fp16: the interpreter multiplies bf16 as
integers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.kernels import checked, decoding, latent, table
from benchmarks.kernels.__main__ import main as kernels
from benchmarks.kernels.latent import Shape, parse_shape
from cllm.errors import UserError
from cllm.kernels.limits import Limits
from cllm.kernels.split_decode import Tiles


def benchmark() -> None:
    """The benchmark finds the first forms correct, and stops at its deadline. Times are not real."""
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
    assert len(rows.rows) > 5
    progress, _, best = printed.getvalue().partition("best first")
    count = len(latent.forms(shape, Limits()))
    assert f"{count - 4} of {count} forms were not timed: 5 seconds have passed" in progress
    assert len(progress.splitlines()) == 1 + 4 + 2
    sorted_ms = [float(ms) for ms in re.findall(r"([0-9.]+) ms .* error", best)]
    assert len(sorted_ms) == 6
    assert sorted_ms == sorted(sorted_ms)
    assert sorted_ms[0] < sorted_ms[-1]


def test_forms_fit_into_shared_memory() -> None:
    limits, size = Limits(), 2 * (512 + 64)
    forms = latent.forms(Shape(), limits)
    assert len(forms) == 28
    assert {(f.block_n, f.num_stages) for f in forms} >= {(32, 3), (64, 4), (128, 2), (16, 1)}
    assert (128, 4) not in {(f.block_n, f.num_stages) for f in forms}
    assert all(max(1, f.num_stages - 1) * f.block_n * size <= limits.shared for f in forms)


def test_splits_fill_the_device() -> None:
    form = Tiles(block_n=64, splits=1, num_warps=4, num_stages=3)
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


def test_the_benchmark_interpreted(run_interpreted: Any) -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    benchmark()
