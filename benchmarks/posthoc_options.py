"""Options and records of the benchmarks over compressed caches: sizes, the device, and rows that are printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.record import Record, Row
from benchmarks.timing import copy_bandwidth, free, matmul_rate, replayed_ms, time_calls
from cllm.arguments import Parser
from cllm.environment import environment
from cllm.errors import UserError
from cllm.kernels.split_lowrank import MAX_DIM

SIZES = {
    "tokens": (65536, "compressed tokens"), "tail": (64, "tokens since"), "batch": (1, "sequences"),
    "heads": (32, "query heads"), "kv-heads": (8, "KV heads"), "dim": (128, "channels of a head"),
    "d-ff": (14336, "width of the MLP"), "layers": (32, "layers whose prefill and compression are timed"),
    "group": (4, "layers of a group"),
    "groups": (3, "groups that take turns"), "rank-k": (384, "rank of a group's keys"),
    "rank-v": (576, "rank of its values"), "select": (2048, "tokens chosen"), "chunk": (8, "tokens of a chunk"),
    "outliers": (48, "chunks always read because they differ from their landmark"),
    "local": (4, "last chunks, always read"), "prompt": (32768, "tokens whose compression is timed"),
    "theta": (500_000, "base of RoPE: that of Llama 3"),
}  # fmt: skip
"""Options: default, help."""


def add_sizes(parser: Parser) -> None:
    """Add the options of `SIZES`, and `--only`."""
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--only", choices=["decode", "compress"], help="one of the two")


def check_sizes(o: argparse.Namespace, *, least_rank: int = 1) -> None:
    """Raise `UserError` for sizes that cannot be measured together, before anything is."""

    def check(name: str, wrong: bool, allowed: str) -> None:
        if wrong:
            raise UserError(f"--{name} is {getattr(o, name.replace('-', '_'))}; allowed: {allowed}")

    for name in SIZES:
        least = {"outliers": 0, "local": 0, "rank-k": least_rank, "rank-v": least_rank}.get(name, 1)
        check(name, getattr(o, name.replace("-", "_")) < least, f"{least} or more")
    check("heads", o.heads % o.kv_heads > 0, f"multiples of --kv-heads, {o.kv_heads}")
    check("dim", o.dim % 2 > 0 or o.dim > MAX_DIM, f"even numbers up to {MAX_DIM}")
    if o.only != "compress":
        check("chunk", o.chunk > o.tokens, f"up to --tokens, {o.tokens}")
        check("select", o.select % o.chunk > 0, f"multiples of --chunk, {o.chunk}")
        read = (o.outliers + o.local) * o.chunk
        most = max(o.tokens - read, 0) // o.chunk * o.chunk
        left = f"up to {most}: of {o.tokens} tokens, --outliers and --local always read {read}"
        check("select", o.select > most, left if most else f"no number ({left}); set fewer of these")
    if o.only != "decode":
        layers = o.layers % o.group or o.group  # of the last group
        most = min(o.prompt, layers * o.kv_heads * o.dim)
        for name in ("rank-k", "rank-v"):
            allowed = f"up to {most}: a group of {layers} layers has {o.kv_heads} x {o.dim} channels in each"
            check(name, getattr(o, name.replace("-", "_")) > most, f"{allowed}, and --prompt {o.prompt} tokens")


def add_outputs(parser: Parser) -> None:
    """Add `--device` and `--out`."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to measure (default cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")


def device_of(o: argparse.Namespace, program: str) -> torch.device:
    """The device of `--device`. Raises `UserError`, naming `program`, for a GPU that torch does not see."""
    device = torch.device(o.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{program} times a GPU, and torch sees none here; --device cpu tries it")
    return device


def begin_record(o: argparse.Namespace, device: torch.device) -> tuple[PrintedRecord, float, float]:
    """Measure and print the rates of `device`, seeded with 0.

    Returns:
        The record with environment, settings and rates, written to `o.out`; bytes of a copy and products (FLOP) per
        second.
    """
    torch.manual_seed(0)
    copy, flops = copy_bandwidth(device, 2**32 if device.type == "cuda" else 2**22), matmul_rate(device)
    free(device)
    settings = {key: value for key, value in vars(o).items() if key != "out"}
    rates = {"copy_bytes_per_s": copy, "matmul_flops": flops}
    record = PrintedRecord({"environment": environment(), "settings": settings, **rates}, o.out)
    print(f"copy {copy / 1e12:.3g} TB/s, matmul {flops / 1e12:.3g} TFLOP/s")
    return record, copy, flops


# ---- results ---------------------------------------------------------------------------------------------------------


class PrintedRecord(Record):
    """Rows, printed and written as they come."""

    def add(self, row: Row) -> None:
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float) and key != "ms"]
        print(f"{row['what']:<9}{row['name']:<58}{row['ms']:9.4f} ms  {', '.join(numbers)}", flush=True)
        super().add(row)


def layer_ms(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median ms of one of `calls`, one after another in a CUDA graph."""
    if device.type == "cuda":
        return replayed_ms(calls)
    return sum(time_calls(call, 1, device)[0] for call in calls) / len(calls)
