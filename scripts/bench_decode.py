#!/usr/bin/env python
r"""Measure decoding on one GPU: steps, time to first token, bytes, and how much fits, of designs and other libraries.

    python scripts/bench_decode.py --designs mha gqa:n_kv_heads=4@32768x16 fusedkv fusedkv_lite:storage=fp8 \
      --points 1024x1 32768x4 --capacity 100 --peers --time-limit 480 --out decode.json

Steps are CUDA graphs over blocks compiled in bf16, timed by device events over a cache full of drawn numbers, each
design after a check that its greedy decoding gives the logits of a full forward. The bound of a step is the bytes that
it must read, weights once and every slot as often as layers read it, over the bandwidth of a copy measured in the same
run. Times to first token are those of a prefill in chunks with early exit, and of one without. --capacity finds the
longest context and the largest batch that fit, and runs them. Steps of all designs come first, then times to first
token, capacity, peers and, with --generate, tokens by `generate` of transformers; a contender that fails is a row that
says so. Prints tables, and writes JSON after every measurement and two plots at the end; --merge makes tables and plots
of several such files. On a CPU (--device cpu) everything runs, and the times mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_train import clocks
from decode_bench import capacity as fitting
from decode_bench import generating, peers, report
from decode_bench.designs import Design, Point, parse_design, parse_point, parse_points
from decode_bench.measure import (
    build,
    bytes_of,
    bytes_read,
    copy_bandwidth,
    free,
    measure_first_token,
    measure_point,
    wait,
)
from decode_bench.merge import merged

from cllm.config import Config
from cllm.config.load import config_parser
from cllm.environment import environment
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


class Record:
    """What was found so far, in a file after every measurement, and whether there is time for more."""

    def __init__(self, found: dict[str, Any], out: Path | None, device: torch.device, limit: float):
        self.found = {"rows": [], "capacity": [], "generated": [], "not_measured": [], "stopped": None} | found
        self.rows: list[Row] = self.found["rows"]
        self.capacity: list[Row] = self.found["capacity"]
        self.generated: list[Row] = self.found["generated"]
        self.out, self.device, self.limit = out, device, limit
        self.begin = time.monotonic()

    def measure(self, what: str, row: Row, function: Callable[[], Row], error: str = "error") -> None:
        """Add what `function` finds to `row`, or under `error` why it failed; nothing once the run was stopped."""
        if self.found["stopped"] is None and self.seconds > self.limit:
            self.found["stopped"] = f"the time limit of {self.limit:g} s"
        if self.found["stopped"] is not None:
            self.found["not_measured"].append(what)
            row[error] = f"not measured: {self.found['stopped']}"
            return
        begin = time.monotonic()
        told = ""
        try:
            row |= (found := function())
            told = f", decoding checked: {found['check']}" if "check" in found else ""
        except Exception as failure:
            row[error] = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
            told = f", failed: {row[error][:300]}"
        self._check_device()
        print(f"[{self.seconds:6.1f} s] {what}: {time.monotonic() - begin:.1f} s{told}", file=sys.stderr, flush=True)
        self.write()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def write(self) -> None:
        report.relate(self.rows, self.capacity)
        if self.out is not None:
            write_atomic(self.out, json.dumps(self.found, indent=2) + "\n")

    def _check_device(self) -> None:
        try:
            wait(self.device)
        except Exception as failure:
            self.found["stopped"] = f"the device does not answer any more: {' '.join(str(failure).split())[:300]}"


class Model:
    """A design's decoder, built when it is first asked for."""

    def __init__(self, design: Design, device: torch.device, compiled: bool):
        self.design, self.device, self.compiled = design, device, compiled
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            decoder = build(self.design.config, self.device)
            if self.compiled:
                decoder.compile_decoding()
            self._decoder = decoder
        return self._decoder

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder = None
        free(self.device)


def new_row(name: str, design: Design, point: Point, peer_of: str | None = None) -> Row:
    """A row with nothing measured in it."""
    return {
        "design": name,
        "context": point.context,
        "batch": point.batch,
        "storage": design.storage,
        "is_baseline": peer_of is None and design.is_baseline,
        "peer_of": peer_of,
    }


def bench_steps(record: Record, designs: list[Design], device: torch.device, compiled: bool, repeat: int) -> None:
    """A row for every point of every design, with its step."""
    for design in designs:
        with Model(design, device, compiled) as model:
            for point in design.points:
                row = new_row(design.label, design, point) | bytes_of(design, point)
                record.rows.append(row)

                def step(design=design, point=point, model=model, row=row) -> Row:
                    found = measure_point(model.decoder, design, point, repeat)
                    decoder, kv_read = model.decoder, row["kv_read_per_token"]
                    read = bytes_read(decoder, decoder.embed, decoder.head, kv_read, point)
                    return found | {"bytes_read": read} | bound(read, found["step_ms"], record)

                record.measure(f"{design.label} {point} step", row, step)


def bound(nbytes: int, step_ms: float, record: Record) -> Row:
    """The least ms in which `nbytes` can be read, and how much longer a step took."""
    ms = 1000 * nbytes / record.found["copy_bytes_per_s"]
    return {"bound_ms": ms, "step_vs_bound": step_ms / ms}


def bench_first_tokens(record: Record, designs: list[Design], device: torch.device, chunk: int) -> None:
    """Times to first token, into the rows that are there."""
    for design in designs:
        with Model(design, device, compiled=False) as model:
            for row, point in zip([r for r in record.rows if r["design"] == design.label], design.points, strict=True):

                def first(design=design, point=point, model=model) -> Row:
                    return measure_first_token(model.decoder, design, point, chunk)

                record.measure(f"{design.label} {point} time to first token", row, first, error="ttft_error")


def bench_capacity(
    record: Record, designs: list[Design], device: torch.device, compiled: bool, budget: int, context: int, repeat: int
) -> None:
    """The longest context and the largest batch of every design in `budget` bytes."""
    for design in designs:
        row: Row = {"design": design.label, "is_baseline": design.is_baseline, "budget_bytes": budget}
        row |= {"batch_context": context, "context": {}, "batch": {}}
        record.capacity.append(row)
        measured = fitting.overhead(r for r in record.rows if r["design"] == design.label)
        with Model(design, device, compiled=False) as model:

            def longest(design=design, model=model, measured=measured) -> Row:
                return fitting.Search(design, model.decoder, budget, measured, repeat).context()

            def most(design=design, model=model, measured=measured) -> Row:
                if compiled:
                    model.decoder.compile_decoding()
                return fitting.Search(design, model.decoder, budget, measured, repeat).batch(context)

            record.measure(f"{design.label} longest context", row["context"], longest)
            record.measure(f"{design.label} largest batch", row["batch"], most)


def bench_peers(
    record: Record, designs: list[Design], device: torch.device, compiled: bool, repeat: int, points: set[Point]
) -> None:
    """Hugging Face's Llama for every design that is one, at its points, or those of them that are in `points`."""
    llamas = [d for d in designs if peers.has_llama(d)]
    cases = itertools.product(llamas, [(kind, compiled and kind == "static") for kind in peers.KINDS])
    for design, (kind, graphs) in cases:
        for point in design.points:
            if points and point not in points:
                continue
            name = f"HF {kind}, {'compiled' if graphs else 'eager'} ({design.label})"
            row = new_row(name, design, point, peer_of=design.label)
            record.rows.append(row)

            def step(design=design, point=point, kind=kind, graphs=graphs) -> Row:
                found = peers.measure_peer(design, point, kind, repeat, device, compiled=graphs)
                return found | bound(found["bytes_read"], found["step_ms"], record)

            record.measure(f"{name} {point} step", row, step)
            free(device)


def bench_generate(
    record: Record, designs: list[Design], device: torch.device, compiled: bool, new: int, points: set[Point] | None
) -> None:
    """`new` tokens by `generate` over a static cache, at every point of every design; with `points`, which may be
    empty for all, by Hugging Face's Llama as well."""
    for design in designs:
        for point in design.points:
            made = {"generate": functools.partial(generating.own_model, compiled=compiled)}
            if points is not None and peers.has_llama(design) and (not points or point in points):
                made["HF generate"] = peers.llama
            for what, make in made.items():
                name = f"{what} ({design.label})"
                row = new_row(name, design, point, peer_of=design.label)
                record.generated.append(row)

                def tokens(design=design, point=point, make=make) -> Row:
                    return generating.measure_generate(make(design, point, device), point, new, device)

                record.measure(f"{name} {point}", row, tokens)
                free(device)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@one_line
def main(argv: list[str] | None = None) -> int:
    parser = config_parser(Config, __doc__ or "")
    add = parser.add_argument
    add("--designs", nargs="+", default=["mha"], metavar="NAME[:KEY=VALUE,...][@POINT,...]", help="plans to measure")
    add("--points", nargs="+", default=["1024x1", "32768x1"], metavar="CONTEXTxBATCH", help="where to measure them")
    add("--repeat", type=positive, default=30, help="timed steps (default 30)")
    add("--chunk", type=positive, default=32768, help="tokens that a prefill takes at once (default 32768)")
    add("--no-ttft", action="store_true", help="leave out the times to first token")
    add("--no-compile", action="store_true", help="do not compile blocks")
    add("--capacity", type=float, metavar="GIB", help="also the longest context and largest batch that fit this")
    add("--capacity-context", type=positive, default=32768, metavar="TOKENS", help="context of that batch")
    add("--peers", nargs="*", metavar="CONTEXTxBATCH", help="also Hugging Face's Llama, at all points or at these")
    add("--generate", type=positive, metavar="N", help="also N tokens by transformers' generate, static cache")
    add("--copy-gib", type=float, default=4.0, metavar="GIB", help="size of the copy for the bandwidth (default 4)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="where to measure (default cuda)")
    add("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="start no new measurement after that")
    add(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: tables and plots of these files together",
    )
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON, and plots beside it")
    add("--plots", type=Path, metavar="DIR", help="write the plots there too")
    arguments, overrides = parser.parse_settings(argv)
    device = torch.device(arguments.device)
    if arguments.merge:
        record = Record(merged(arguments.merge), arguments.out, torch.device("cpu"), math.inf)
        record.write()
        return tell(record, arguments.out, arguments.plots)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("scripts/bench_decode.py times a GPU, and torch sees none here; --device cpu tries it out")
    files = arguments.config or [str(ROOT / "configs" / "bench" / "1364m.yaml")]
    points = parse_points(arguments.points, "--points")
    designs = [parse_design(word, files, overrides, points) for word in arguments.designs]
    labels = [design.label for design in designs]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--designs names {', '.join(sorted(twice))} twice; allowed: once, with all points after one @")
    budget = check_capacity(arguments.capacity, device)
    if arguments.generate is not None:
        check_generate(arguments.generate, designs)
    peer_points = {parse_point(word, "--peers") for word in arguments.peers or []}
    before = clocks()
    found: dict[str, Any] = {"environment": environment(), "device": arguments.device, "clocks": [before]}
    found["copy_bytes_per_s"] = copy_bandwidth(device, round(arguments.copy_gib * 2**30))
    found["configs"] = {design.label: design.config.as_yaml_data() for design in designs}
    free(device)
    compiled = device.type == "cuda" and not arguments.no_compile
    found["settings"] = {"repeat": arguments.repeat, "chunk": arguments.chunk, "compiled": compiled}
    record = Record(found, arguments.out, device, arguments.time_limit)
    bench_steps(record, designs, device, compiled, arguments.repeat)
    if not arguments.no_ttft:
        bench_first_tokens(record, designs, device, arguments.chunk)
    if budget is not None:
        bench_capacity(record, designs, device, compiled, budget, arguments.capacity_context, arguments.repeat)
    if arguments.peers is not None:
        bench_peers(record, designs, device, compiled, arguments.repeat, peer_points)
    if arguments.generate is not None:
        wanted = None if arguments.peers is None else peer_points
        bench_generate(record, designs, device, compiled, arguments.generate, wanted)
    record.found["clocks"].append(clocks())
    record.write()
    return tell(record, arguments.out, arguments.plots)


def check_generate(new: int, designs: list[Design]) -> None:
    """Raises `UserError` for too few tokens to settle, and for more than a context has."""
    shortest = min(point.context for design in designs for point in design.points)
    if not generating.SETTLED < new < shortest:
        raise UserError(
            f"--generate is {new}; allowed: {generating.SETTLED + 1} to {shortest - 1}, fewer than the shortest "
            "context of --points"
        )


def check_capacity(gib: float | None, device: torch.device) -> int | None:
    """The budget in bytes. Raises `UserError` for more than the device has."""
    if gib is None:
        return None
    budget = round(gib * 2**30)
    if budget < 1:
        raise UserError(f"--capacity is {gib}; allowed: more than 0")
    if device.type == "cuda" and budget > (held := torch.cuda.get_device_properties(device).total_memory):
        raise UserError(f"--capacity is {gib} GiB, and the device has {held / 2**30:.1f}")
    return budget


def tell(record: Record, out: Path | None, plots: Path | None) -> int:
    """Print tables and write plots; the exit status is 1 if anything failed or was left out."""
    print(f"copy: {record.found['copy_bytes_per_s'] / 1e12:.3f} TB/s\n\ndecoding against a full forward:")
    for row in record.rows:
        if "check" in row:
            told = ", ".join(f"{key} {value:.5g}" if key != "skipped" else value for key, value in row["check"].items())
            print(f"  {row['design']} {report.point_name(row)}: {told}")
    print("\n" + report.table(record.rows))
    if record.capacity:
        print("\n" + report.capacity_table(record.capacity))
    if record.generated:
        print("\n" + report.generated_table(record.generated))
    if record.found["stopped"] is not None:
        print(f"\nstopped by {record.found['stopped']}; not measured: {', '.join(record.found['not_measured'])}")
    folders = [folder for folder in (out and out.parent, plots) if folder is not None]
    for file in report.write_plots(record.rows, out.stem if out else "decode", folders):
        print(f"written: {file}")
    rows = [
        *record.rows,
        *record.generated,
        *(part for row in record.capacity for part in (row["context"], row["batch"])),
    ]
    return int(any(row.get(key) is not None for row in rows for key, _ in report.FAILURES))


if __name__ == "__main__":
    sys.exit(main())
