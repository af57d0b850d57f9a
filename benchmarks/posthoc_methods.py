r"""Time every method of post-hoc compression, and decoding from what it stores, in 150 seconds.

    python -m benchmarks.posthoc_methods --out posthoc_methods.json

Methods are those of the registry with their default options, and `ratio=4` where a size must be given; `VARIANTS` adds
combinations and faster options. Models have random weights in bf16 and the layers of `SHAPES`. Rows, one for each shape
and method, written as they come:

prefill      ms of filling a cache, blocks not compiled, and its bytes
compress     ms of compressing it (median of up to three calls after a first one, `first_ms`), the share of the prefill,
             and the ratio of bytes at this length. What a method needs besides is counted by itself: `calibration_ms`,
             once for a model, on the first `--calibration` tokens of the prompt; `recorded_prefill_ms`, of a prefill
             whose queries or inputs the method records.
decode       ms of a step of one token over the compressed cache and over the exact one, as launched from Python; of the
             first shape
failed       a method that refuses the cache, runs out of memory or exceeds a time limit: the reason

With --device cpu everything runs in small sizes, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.posthoc_options import add_outputs, device_of
from benchmarks.record import KEPT, Record, Row, reason_of
from benchmarks.timing import BF16, free, time_steps, wait, wall_time
from cllm.arguments import Parser
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.environment import environment
from cllm.errors import UserError, one_line
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import CompressedKVCache, compress_cache
from cllm.posthoc.engine import DecoderEngine
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import methods, parse
from cllm.signals import stoppable


@dataclass(frozen=True)
class Shape:
    """A decoder and a prompt."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    dim: int
    """Channels of a head."""
    d_ff: int
    tokens: int
    """Of the prompt."""

    def small(self) -> Shape:
        """A shape of the same kind for a CPU."""
        return Shape(min(self.layers, 4), 16 * self.heads, self.heads, self.kv_heads, 16, 64, 256)

    def config(self, later: int) -> ModelConfig:
        """The model, for the prompt and `later` tokens after it."""
        return ModelConfig.model_validate(
            {"vocab_size": VOCABULARY, "d_model": self.d_model, "n_layers": self.layers, "n_heads": self.heads,
             "head_dim": self.dim, "d_ff": self.d_ff, "max_seq_len": self.tokens + later,
             "kv": {"preset": "gqa", "n_kv_heads": self.kv_heads}}
        )  # fmt: skip


SHAPES = {
    "45M": Shape(layers=12, d_model=512, heads=8, kv_heads=8, dim=64, d_ff=1408, tokens=4096),
    "135M": Shape(layers=30, d_model=576, heads=9, kv_heads=3, dim=64, d_ff=1536, tokens=4096),
    "8B": Shape(layers=8, d_model=4096, heads=32, kv_heads=8, dim=128, d_ff=14336, tokens=32768),
}
"""In the order in which they are measured. Of the 8B model's 32 layers `--layers` are."""

VARIANTS = (
    "xkv:ratio=4,svd=gram", "xkv:ratio=4,svd=power,products=bf16", "xkv:ratio=4+kivi:bits=4,residual=0",
    "snapkv:ratio=4+kivi:bits=4,residual=0", "recompute:ratio=4",
)  # fmt: skip
"""Measured after the methods with their defaults."""
VOCABULARY = 256
"""Small, because logits are not timed."""
STEPS = 20
"""Decode steps; the first four are not counted."""


def specs() -> list[str]:
    """Every registered method as it is measured, and `VARIANTS`."""
    return [*map(default_spec, methods()), *VARIANTS]


def default_spec(name: str) -> str:
    """A method with its default options; with `ratio=4` if it must be given a size."""
    try:
        parse(name)
    except UserError:
        return f"{name}:ratio=4"
    return name


class TooLong(BaseException):
    """A measurement exceeded its time limit. No `except Exception` inside of it, as for a slower kernel, catches it."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` inside, between two operations of Python, after `seconds`; for the main thread."""

    def stop(*_: object) -> None:
        raise TooLong(f"took more than {seconds:.3g} s")

    if seconds <= 0:
        raise TooLong("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def median_ms(run: Callable[[], float], most: int = 3, seconds: float = 1.5) -> float:
    """The median of up to `most` calls of `run`, which returns ms; no further ones after `seconds`."""
    times: list[float] = []
    while len(times) < most and sum(times) < 1000 * seconds:
        times.append(run())
    return statistics.median(times)


class Bench:
    """Measurements of one shape: its model, its prompt and the exact cache of the prompt."""

    def __init__(self, name: str, shape: Shape, o: argparse.Namespace, device: torch.device, rows: Rows):
        self.name, self.shape, self.device, self.rows = name, shape, device, rows
        self.decodes = name == o.shapes[0]
        torch.manual_seed(0)
        config = shape.config(STEPS)
        with torch.device(device):
            model = build_decoder(config)
        model.to(BF16).eval().requires_grad_(False)
        self.engine = DecoderEngine(model)
        self.ids = torch.randint(VOCABULARY, (1, shape.tokens + STEPS), device=device)
        self.calibration = self.ids[:, : min(o.calibration, shape.tokens)]
        self.prefill()  # libraries are loaded
        self.prefill_ms = median_ms(lambda: self.prefill()[1])
        self.exact = self.prefill()[0]
        row = {"ms": self.prefill_ms, "bytes": self.exact.nbytes(), **asdict(shape)}
        self.rows.add(name, "prefill", "none", row)
        self.exact_step_ms = self.step_ms(self.prefill()[0]) if self.decodes else None

    @torch.no_grad()
    def prefill(self) -> tuple[KVCache, float]:
        """A cache of the prompt, and ms."""
        cache = self.engine.new_cache()
        ids = self.ids[:, : self.shape.tokens]
        return cache, wall_time(functools.partial(self.engine.hidden, ids, cache), self.device)[1]

    @torch.no_grad()
    def step_ms(self, cache: KVCache) -> float:
        """Median ms of a decode step after `cache`, to which tokens are added."""
        ids: Sequence[Tensor] = self.ids[:, self.shape.tokens :].split(1, dim=1)
        return statistics.median(time_steps(lambda n: self.engine.hidden(ids[n], cache), STEPS, self.device)[4:])

    def measure(self, spec: str, seconds: Callable[[], float]) -> None:
        """Add the rows of a method; `seconds` returns the time limit of each."""
        made: list[CompressedKVCache] = []
        self.rows.attempt(self.name, "compress", spec, seconds(), lambda: self.compress(spec, made))
        if made and self.decodes:
            self.rows.attempt(self.name, "decode", spec, seconds(), lambda: self.decode(made.pop()))
        made.clear()
        wait(self.device)
        free(self.device)

    def compress(self, spec: str, made: list[CompressedKVCache]) -> Row:
        """The row of a compression; the compressed cache is added to `made`."""
        method, row = parse(spec), dict[str, Any]()
        if method.calibrates:
            prepare = functools.partial(method.prepare, self.engine, self.calibration)
            row["calibration_tokens"] = self.calibration.shape[1]
            row["calibration_ms"] = wall_time(prepare, self.device)[1]
        cache = self.exact
        if method.watches:
            cache, row["recorded_prefill_ms"] = self.recorded(method)
        made.append(compress_cache(cache, method, measure=False))
        row["first_ms"] = 1000 * made[0].outcome.seconds

        def again() -> float:
            made.clear()
            made.append(compress_cache(cache, method, measure=False))
            return 1000 * made[0].outcome.seconds

        ms = median_ms(again)
        method.release()
        return {"ms": ms, "share_of_prefill": ms / self.prefill_ms,
                "ratio": self.exact.nbytes() / made[0].nbytes(), **row}  # fmt: skip

    def recorded(self, method: Compressor) -> tuple[KVCache, float]:
        """A cache of the prompt of which `method` has recorded what it needs, and the median ms of filling it."""
        made: list[KVCache] = []

        def fill() -> float:
            made.clear()
            with method.watch(self.engine):
                cache, ms = self.prefill()
            made.append(cache)
            return ms

        ms = median_ms(fill)
        return made[0], ms

    def decode(self, cache: CompressedKVCache) -> Row:
        """The row of steps after a compressed cache."""
        assert self.exact_step_ms is not None
        ms = self.step_ms(cache)
        return {"ms": ms, "exact_ms": self.exact_step_ms, "of_exact": ms / self.exact_step_ms}


class Rows:
    """Rows, printed and written as they come."""

    def __init__(self, record: Record):
        self.record = record
        self.spent: dict[str, float] = {}
        """Seconds that a method has taken, with everything around it."""

    def add(self, shape: str, what: str, method: str, row: Row) -> None:
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float) and key != "ms"]
        shown = f"{row['ms']:10.2f} ms  {', '.join(numbers)}" if "ms" in row else f"failed: {row['failed']}"
        print(f"{shape:<5}{what:<9}{method:<40}{shown}", flush=True)
        self.record.add({"shape": shape, "what": what, "method": method, **row})

    def attempt(self, shape: str, what: str, method: str, seconds: float, measure: Callable[[], Row]) -> None:
        """Add the row of `measure`, or why it failed."""
        began = time.monotonic()
        try:
            with limit(seconds):
                row = measure()
        except (Exception, TooLong) as failure:
            row = {"failed": reason(failure)}
        self.add(shape, what, method, row)
        self.spent[method] = self.spent.get(method, 0.0) + time.monotonic() - began


def reason(failure: BaseException) -> str:
    """Why a measurement failed, in one line."""
    text = reason_of(failure, 300)
    return text if isinstance(failure, UserError | TooLong) else f"{type(failure).__name__}: {text}"


def make_parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m benchmarks.posthoc_methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these, with their options")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE",
                        help=f"only these: {' '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--layers", type=int, default=SHAPES["8B"].layers,
                        help=f"layers of the 8B model (default {SHAPES['8B'].layers} of its 32)")  # fmt: skip
    parser.add_argument("--calibration", type=int, default=2048, help="calibration tokens at most (default 2048)")
    parser.add_argument("--seconds", type=float, default=150, help="nothing begins after this time (default 150)")
    parser.add_argument("--row-seconds", type=float, default=15, help="the most of one row (default 15)")
    add_outputs(parser)
    return parser


def check(o: argparse.Namespace) -> None:
    """Raise `UserError` for numbers that are too small and methods that do not exist."""
    for name, least in (("layers", 1), ("calibration", 8), ("seconds", 1), ("row_seconds", 0.1)):
        if not getattr(o, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(o, name)}; allowed: {least} or more")
    for spec in o.methods or []:
        parse(spec, "--methods")


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a shape could not be measured."""
    o = make_parser().parse_args(argv)
    check(o)
    device, began = device_of(o, "benchmarks.posthoc_methods"), time.monotonic()
    settings = {key: value for key, value in vars(o).items() if key != "out"}
    record = Record({"environment": environment(), "settings": settings}, o.out)
    rows, failures = Rows(record), 0

    def seconds() -> float:
        return min(o.row_seconds, o.seconds - (time.monotonic() - began))

    for name in o.shapes:
        shape = replace(SHAPES[name], layers=o.layers) if name == "8B" else SHAPES[name]
        shape = shape if device.type == "cuda" else shape.small()
        try:
            with limit(o.seconds - (time.monotonic() - began)):
                bench = Bench(name, shape, o, device, rows)
        except (Exception, TooLong) as failure:
            failures += 1
            rows.add(name, "prefill", "none", {"failed": reason(failure)})
            continue
        # The methods that took longest for the shape before come last, so that others have been measured by then.
        for spec in sorted(o.methods or specs(), key=lambda spec: rows.spent.get(spec, 0.0)):
            bench.measure(spec, seconds)
        del bench
        free(device)
        print(f"-- {name}: {time.monotonic() - began:.0f} s since the start", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
