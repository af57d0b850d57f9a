r"""Measure decoding on one GPU: steps, time to first token, bytes, and how much fits, of designs and other libraries.

    python -m benchmarks.decode --designs mha gqa:n_kv_heads=4@32768x16 fusedkv fusedkv_lite:storage=fp8 \
      --points 1024x1 32768x4 --capacity 100 --peers --time-limit 480 --out decode.json

Steps are CUDA graphs over blocks compiled in bf16, timed by device events over a cache full of random numbers. Before
its first step each design is checked: greedy decoding must give the logits of a full forward. The bound of a step is
the bytes that it must read, weights one time and every slot as often as layers read it, over the bandwidth of a copy
measured in the same run. Times to first token are those of a prefill in chunks, with early exit and without. --capacity
finds the longest context and the largest batch that fit, and runs them. Steps of all designs come first, then times to
first token, capacity, peers and, with --generate, tokens by `generate` of transformers. A contender that fails becomes
a row with its error. Prints tables, writes JSON after every measurement, and two plots at the end; --merge makes tables
and plots of several such files. On a CPU (--device cpu) everything runs, but the times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import generating, report
from benchmarks.decode.benchmark import DecodeBenchmark
from benchmarks.decode.designs import Design, Point, parse_design, parse_point, parse_points
from benchmarks.decode.merge import merged
from benchmarks.decode.results import Results
from benchmarks.record import KEPT
from benchmarks.timing import copy_bandwidth, free
from cllm.config import Config
from cllm.config.load import ConfigParser, config_parser
from cllm.environment import clocks, environment
from cllm.errors import UserError, one_line
from cllm.signals import stoppable

ROOT = Path(__file__).resolve().parents[2]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def make_parser() -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "")
    parser.prog = "python -m benchmarks.decode"
    add = parser.add_argument
    add("--designs", nargs="+", default=["mha"], metavar="NAME[:KEY=VALUE,...][@POINT,...]", help="plans to measure")
    add("--points", nargs="+", default=["1024x1", "32768x1"], metavar="CONTEXTxBATCH", help="where to measure them")
    add("--repeat", type=positive, default=30, help="timed steps (default 30)")
    add("--chunk", type=positive, default=32768, help="tokens of a prefill chunk (default 32768)")
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
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON, and plots next to it")
    add("--plots", type=Path, metavar="DIR", help="write the plots there too")
    return parser


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a measurement failed or was left out."""
    options, overrides = make_parser().parse_settings(argv)
    device = torch.device(options.device)
    if options.merge:
        results = Results(merged(options.merge), options.out, torch.device("cpu"), math.inf)
        results.write()
        return show(results, options.out, options.plots)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmarks.decode times a GPU, and torch sees none here; --device cpu tries it out")
    files = options.config or [str(ROOT / "configs" / "bench" / "1364m.yaml")]
    points = parse_points(options.points, "--points")
    designs = [parse_design(word, files, overrides, points) for word in options.designs]
    labels = [design.label for design in designs]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"--designs names {', '.join(sorted(twice))} twice; allowed: once, with all points after one @")
    budget = check_capacity(options.capacity, device)
    if options.generate is not None:
        check_generate(options.generate, designs)
    peer_points = {parse_point(word, "--peers") for word in options.peers or []}
    results = measure(options, designs, device, budget, peer_points)
    return show(results, options.out, options.plots)


def measure(
    options: argparse.Namespace, designs: list[Design], device: torch.device, budget: int | None, peers: set[Point]
) -> Results:
    """Run all measurements that `options` ask for; `budget` and `peers` are its --capacity and --peers, checked."""
    known: dict[str, Any] = {"environment": environment(), "device": options.device, "clocks": [clocks()]}
    known["copy_bytes_per_s"] = copy_bandwidth(device, round(options.copy_gib * 2**30))
    known["configs"] = {design.label: design.config.as_yaml_data() for design in designs}
    free(device)
    compiled = device.type == "cuda" and not options.no_compile
    known["settings"] = {"repeat": options.repeat, "chunk": options.chunk, "compiled": compiled}
    results = Results(known, options.out, device, options.time_limit)
    benchmark = DecodeBenchmark(results, designs, device, compiled, options.repeat)
    benchmark.steps()
    if not options.no_ttft:
        benchmark.first_tokens(options.chunk)
    if budget is not None:
        benchmark.capacity(budget, options.capacity_context)
    if options.peers is not None:
        benchmark.peers(peers)
    if options.generate is not None:
        benchmark.generate(options.generate, None if options.peers is None else peers)
    results.results["clocks"].append(clocks())
    results.write()
    return results


def check_generate(new: int, designs: list[Design]) -> None:
    """Raise `UserError` if `new` tokens are too few for a settled time, or more than the shortest context has."""
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
    if device.type == "cuda" and budget > (total := torch.cuda.get_device_properties(device).total_memory):
        raise UserError(f"--capacity is {gib} GiB, and the device has {total / 2**30:.1f}")
    return budget


def show(results: Results, out: Path | None, plots: Path | None) -> int:
    """Print tables and write plots; returns the exit status: 1 if anything failed or was left out."""
    print(f"copy: {results.results['copy_bytes_per_s'] / 1e12:.3f} TB/s\n\ndecoding against a full forward:")
    for row in results.rows:
        if "check" in row:
            items = row["check"].items()
            check = ", ".join(f"{key} {value:.5g}" if key != "skipped" else value for key, value in items)
            print(f"  {row['design']} {report.point_name(row)}: {check}")
    print("\n" + report.table(results.rows))
    if results.capacity:
        print("\n" + report.capacity_table(results.capacity))
    if results.generated:
        print("\n" + report.generated_table(results.generated))
    if results.results["stopped"] is not None:
        missing = ", ".join(results.results["not_measured"])
        print(f"\nstopped by {results.results['stopped']}; not measured: {missing}")
    folders = [folder for folder in (out and out.parent, plots) if folder is not None]
    for file in report.write_plots(results.rows, out.stem if out else "decode", folders):
        print(f"written: {file}")
    rows = [
        *results.rows,
        *results.generated,
        *(part for row in results.capacity for part in (row["context"], row["batch"])),
    ]
    return int(any(row.get(key) is not None for row in rows for key, _ in report.FAILURES))


if __name__ == "__main__":
    sys.exit(main())
