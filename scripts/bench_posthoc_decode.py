#!/usr/bin/env python
r"""Time decoding on an xKV-compressed cache, and the compression, on one GPU at the shape of an 8B model.

    python scripts/bench_posthoc_decode.py --out posthoc_decode.json
    python scripts/bench_posthoc_decode.py --sweep           # Triton's kernel for rebuilding keys, in many tiles

decode      ms that the attention of one layer takes for one new token a sequence: over the uncompressed cache, over
            factors with all keys rebuilt, and with `--select` tokens chosen. Several groups of layers take turns, so
            that nothing of one is left in the L2 cache by the layer before.
compress    a decoder of `--layers`, random weights: prefill of `--prompt` tokens, and the compression of its cache.

Bounds are the products' FLOPs over the rate of a bf16 matrix product, and the bytes that must be read over the rate of
a copy, both measured in the same run; the larger one counts. With --device cpu and small sizes everything runs, and the
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_kernels import replayed_ms
from decode_bench.measure import copy_bandwidth, free, time_calls, wait

from cllm.arguments import Parser
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, Rope
from cllm.environment import environment
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.kernels import split_lowrank
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.lowrank_decode import lowrank_decode
from cllm.kernels.selection import Factored
from cllm.kernels.split_lowrank import Rebuild, choose_rebuild
from cllm.model.rope import apply_rope, rope_table
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.landmarks import make_landmarks
from cllm.posthoc.registry import parse

BF16 = torch.bfloat16
SVDS = [
    *(f"svd={svd},products={products}" for svd in ("power", "random") for products in ("bf16", "tf32", "fp32")),
    "svd=gram",
]
Row = dict[str, Any]


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 matrix product."""
    size = 8192 if device.type == "cuda" else 256
    x = torch.randn(size, size, device=device, dtype=BF16)
    return 2 * size**3 / sorted(time_calls(lambda: x @ x, lambda: None, 12, device)[4:])[4] * 1000


def layer_ms(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Median ms of one of `calls`, one after another in a CUDA graph."""
    if device.type == "cuda":
        return replayed_ms(calls)
    return sum(time_calls(call, lambda: None, 1, device)[0] for call in calls) / len(calls)


class Layers:
    """What layers of some groups hold: factors of drawn numbers, A shared within a group; drawn tails and queries."""

    def __init__(self, o: argparse.Namespace, device: torch.device):
        self.o, self.device = o, device
        cos, sin = rope_table(Rope(), o.dim, torch.arange(o.tokens, device=device))
        self.turn, self.table = (cos[None], sin[None]), (cos[:, 0, 0], sin[:, 0, 1])
        self.visible = Visible(torch.tensor([o.tokens + o.tail - 1], device=device), None, None, False)
        self.scale = o.dim**-0.5
        self.keys, self.values, self.queries = [], [], []
        bases = [
            (self.rand(o.batch, o.tokens, o.rank_k), self.rand(o.batch, o.tokens, o.rank_v)) for _ in range(o.groups)
        ]
        for _ in range(o.group):
            for a_k, a_v in bases:
                self.keys.append(self.part(a_k))
                self.values.append(self.part(a_v))
                self.queries.append(self.rand(o.batch, o.heads, o.dim))

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=BF16)

    def part(self, a: Tensor) -> Factored:
        o, rank = self.o, a.shape[2]
        b = self.rand(o.batch, o.kv_heads * o.dim, rank) / rank**0.5
        return Factored(a, b, self.rand(o.batch, o.tail, o.kv_heads, o.dim))

    def made(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values (B, S + T, G, D) of layer `i`."""
        k, v = (
            (part.a @ part.b.mT).unflatten(-1, (self.o.kv_heads, self.o.dim)) for part in (self.keys[i], self.values[i])
        )
        k = apply_rope(k, self.turn)
        return torch.cat((k, self.keys[i].tail), 1), torch.cat((v, self.values[i].tail), 1)

    def attend(self, i: int, selection=None) -> Tensor:
        return lowrank_decode(
            [self.queries[i]], [self.keys[i]], [self.values[i]], self.table, self.visible, scale=self.scale,
            selection=selection,
        )[0]  # fmt: skip


def bench_decode(o: argparse.Namespace, device: torch.device, flops: float, copy: float, record: Record) -> None:
    layers = Layers(o, device)
    width, new = o.kv_heads * o.dim, o.tail

    def add(name: str, calls: list[Callable[[], Any]], products: float, numbers: float, **more: Any) -> None:
        arithmetic, read = 1000 * o.batch * products / flops, 1000 * o.batch * 2 * numbers / copy
        bound = max(arithmetic, read)
        ms = layer_ms(calls, device)
        record.add({"what": "decode", "name": name, "ms": ms, "arithmetic_bound_ms": arithmetic, "read_bound_ms": read,
                    "times_bound": ms / bound, **more})  # fmt: skip

    made = [layers.made(i) for i in range(min(o.group, len(layers.keys)))]

    def plain(i: int) -> Tensor:
        k, v = made[i]
        return decode_attention([layers.queries[i]], [Stored(k)], [Stored(v)], layers.visible, scale=layers.scale)[0]

    wanted, found = plain(0).float(), layers.attend(0).float()
    error = ((found - wanted).norm() / wanted.norm()).item()
    every = range(len(layers.keys))
    exact = 4 * (o.tokens + new) * o.heads * o.dim
    add("uncompressed", [lambda i=i: plain(i) for i in range(len(made))], exact, 2 * (o.tokens + new) * width)
    made.clear()
    free(device)
    small = width * (o.rank_k + o.rank_v) + 2 * new * width
    rebuilt = 2 * o.tokens * (o.rank_k * width + o.heads * (o.dim + o.rank_v))
    read = o.tokens * (o.rank_k + o.rank_v) + small
    add("all keys rebuilt", [lambda i=i: layers.attend(i) for i in every], rebuilt, read, relative_error=error)
    if o.sweep is not None:
        begin = time.monotonic()
        for rebuild in neighbours(choose(o, device)):
            if time.monotonic() - begin > o.sweep:
                break
            try:
                calls = [lambda i=i, r=rebuild: tiled(layers, i, r) for i in every]
                add(f"  {rebuild}".replace("Rebuild", ""), calls, rebuilt, read)
            except Exception as failure:
                wait(device)
                print(f"  {rebuild} failed: {' '.join(str(failure).split())[:90]}")
    selections = []
    for i in every:
        k = layers.made(i)[0][:, : o.tokens]
        selections.append(make_landmarks(k, None, chunk=o.chunk, budget=o.select, outliers=o.outliers, local=o.local))
        del k
        free(device)
    outliers = selections[0].outlier_keys.shape[1]
    chosen = min(o.select, max(o.tokens - outliers, 0))
    products = 2 * (
        o.tokens // o.chunk * o.heads * o.dim + chosen * o.rank_k * width + (chosen + outliers) * o.heads * o.rank_v
    )
    rows = o.kv_heads * (chosen * o.rank_k + (chosen + outliers) * o.rank_v)
    read = (o.tokens // o.chunk + outliers) * width + rows + small
    calls = [lambda i=i: layers.attend(i, selections[i]) for i in every]
    add(f"{o.select} tokens chosen", calls, products, read)


def choose(o: argparse.Namespace, device: torch.device) -> Rebuild:
    limits = split_lowrank.device_limits(device)
    return choose_rebuild(dim=o.dim, groups=o.kv_heads, size=2, gathered=False, limits=limits)


def tiled(layers: Layers, i: int, rebuild: Rebuild) -> Tensor:
    parts = ([layers.queries[i]], [layers.keys[i]], [layers.values[i]])
    return split_lowrank.run(*parts, layers.table, layers.visible, layers.scale, None, rebuild)


def neighbours(rule: Rebuild) -> list[Rebuild]:
    """Tiles that a device of 227 KiB of shared memory a multiprocessor could take; the rule's, then those like it."""
    found = [
        Rebuild(block_n=n, block_r=r, pack=pack, num_warps=warps, num_stages=stages)
        for n, pack in ((128, 2), (64, 2), (128, 1), (256, 1), (64, 1))
        for warps in (8, 4)
        for r in (64, 32, 128)
        for stages in (3, 4, 2)
    ]
    return [rule, *(tiles for tiles in found if tiles != rule and tiles.shared(64, 2) <= 219 * 1024)]


def bench_compress(o: argparse.Namespace, device: torch.device, flops: float, record: Record) -> None:
    """Prefill of `o.layers` layers and compression of their cache, both as in a decoder."""
    config = ModelConfig(
        vocab_size=256, d_model=o.heads * o.dim, n_layers=o.layers, n_heads=o.heads, head_dim=o.dim, d_ff=o.d_ff,
        max_seq_len=o.prompt, kv={"preset": "gqa", "n_kv_heads": o.kv_heads},
    )  # type: ignore[arg-type]  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = build_decoder(config)
    model.to(BF16).eval().requires_grad_(False)
    ids = torch.randint(256, (1, o.prompt), device=device)
    times: list[float] = []
    for _ in range(3):
        cache = KVCache(config)
        wait(device)
        begin = time.perf_counter()
        with torch.no_grad():
            model.hidden(ids, cache=cache)
        wait(device)
        times.append(1000 * (time.perf_counter() - begin))
    prefill = sorted(times)[1]
    weights = sum(p.numel() for block in model.blocks for p in block.parameters())
    products = 2 * weights * o.prompt + 2 * o.layers * o.prompt**2 * o.heads * o.dim
    bound = 1000 * products / flops
    record.add({"what": "compress", "name": f"prefill of {o.layers} layers, measured (blocks not compiled)",
                "ms": prefill, "arithmetic_bound_ms": bound, "times_bound": prefill / bound})  # fmt: skip
    for svd in o.svd or SVDS:
        method = parse(f"xkv:group={o.group},rank_k={o.rank_k},rank_v={o.rank_v},{svd}")
        seconds = []
        for _ in range(1 if "gram" in svd else 3):
            seconds.append(compress_cache(cache, method, measure=False).outcome.seconds)
        errors = compress_cache(cache, method).outcome.errors.values() if o.errors else []
        ms = 1000 * sorted(seconds)[len(seconds) // 2]
        record.add({"what": "compress", "name": svd, "ms": ms, "share_of_prefill": ms / prefill,
                    "share_of_prefill_at_bound": ms / bound,
                    "largest_error": max((max(e.values()) for e in errors), default=None)})  # fmt: skip
        free(device)


class Record:
    """Rows, printed and written as they come."""

    def __init__(self, found: Row, out: Path | None):
        self.found, self.out = found | {"rows": []}, out

    def add(self, row: Row) -> None:
        self.found["rows"].append(row)
        told = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float) and key != "ms"]
        print(f"{row['what']:<9}{row['name']:<58}{row['ms']:9.4f} ms  {', '.join(told)}", flush=True)
        if self.out is not None:
            write_atomic(self.out, json.dumps(self.found, indent=2) + "\n")


@one_line
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    sizes = {
        "tokens": (65536, "compressed tokens"), "tail": (64, "tokens since"), "batch": (1, "sequences"),
        "heads": (32, "query heads"), "kv-heads": (8, "KV heads"), "dim": (128, "channels of a head"),
        "d-ff": (14336, "width of the MLP"), "layers": (32, "layers whose prefill and compression are timed"),
        "group": (4, "layers of a group"),
        "groups": (3, "groups that take turns"), "rank-k": (384, "rank of a group's keys"),
        "rank-v": (576, "rank of its values"), "select": (2048, "tokens chosen"), "chunk": (8, "tokens of a chunk"),
        "outliers": (48, "chunks always read for what is in them"), "local": (4, "last chunks, always read"),
        "prompt": (32768, "tokens whose compression is timed"),
    }  # fmt: skip
    for name, (default, told) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} (default {default})")
    parser.add_argument("--only", choices=["decode", "compress"], help="one of the two")
    parser.add_argument("--svd", nargs="+", choices=SVDS, metavar="SVD", help=f"only these: {' '.join(SVDS)}")
    parser.add_argument("--errors", action="store_true", help="also measure what compression loses")
    parser.add_argument("--sweep", nargs="?", const=float("inf"), type=float, metavar="SECONDS",
                        help="also Triton's kernel for rebuilding keys, in many tiles; minutes, or less")  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to measure (default cuda)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    o = parser.parse_args(argv)
    device = torch.device(o.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("scripts/bench_posthoc_decode.py times a GPU, and torch sees none here; --device cpu tries it")
    for name in sizes:
        if (value := getattr(o, name.replace("-", "_"))) < (0 if name in ("outliers", "local") else 1):
            raise UserError(f"--{name} is {value}; allowed: 1 or more")
    torch.manual_seed(0)
    copy, flops = copy_bandwidth(device, 2**32 if device.type == "cuda" else 2**22), matmul_rate(device)
    free(device)
    told = {key: value for key, value in vars(o).items() if key != "out"}
    rates = {"copy_bytes_per_s": copy, "matmul_flops": flops}
    record = Record({"environment": environment(), "settings": told, **rates}, o.out)
    print(f"copy {copy / 1e12:.3g} TB/s, matmul {flops / 1e12:.3g} TFLOP/s")
    if o.only != "compress":
        bench_decode(o, device, flops, copy, record)
        free(device)
    if o.only != "decode":
        bench_compress(o, device, flops, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
