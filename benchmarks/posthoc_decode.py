r"""Time decoding on an xKV-compressed cache, and the compression, on one GPU at the shape of an 8B model.

    python -m benchmarks.posthoc_decode --out posthoc_decode.json
    python -m benchmarks.posthoc_decode --sweep           # Triton's kernel for rebuilding keys, in many tiles

decode      ms of one layer's attention for one new token a sequence: over the uncompressed cache, over factors with
            all tokens, and over factors with `--select` tokens chosen; and over chosen tokens of factored keys and
            uncompressed values (ShadowKV), with values on the device and in host memory. Several groups of layers
            alternate, so that the L2 cache has nothing of a layer from the call before.
compress    a decoder of `--layers` with random weights: prefill of `--prompt` tokens, and compression of its cache.

Bounds are the products' FLOPs over the rate of a bf16 matrix product, the bytes that must be read over the bandwidth
of a copy, and those that must be read from host memory over the bandwidth of a copy from pinned memory to the device,
all measured in the same run; the largest one counts. With --device cpu and small sizes everything
runs, but the times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.posthoc_options import (
    add_outputs,
    add_sizes,
    begin_record,
    check_sizes,
    device_of,
    layer_ms,
)
from benchmarks.record import KEPT, Record, reason_of
from benchmarks.timing import (
    BF16,
    free,
    host_bandwidth,
    wait,
    wall_time,
)
from cllm.arguments import Parser
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, Rope
from cllm.errors import one_line
from cllm.kernels import split_lowrank
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.limits import device_limits
from cllm.kernels.lowrank_decode import lowrank_decode
from cllm.kernels.lowrank_tiles import Rebuild, Tuning, choose_rebuild
from cllm.kernels.selection import Factored, Selection
from cllm.model.rope import apply_rope, rope_table
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.landmarks import make_landmarks
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import consecutive_table
from cllm.signals import stoppable

SVDS = [
    "svd=auto",
    *(f"svd={svd},products={products}" for svd in ("power", "random") for products in ("bf16", "tf32", "fp32")),
    "svd=gram",
]
# ---- decode ----------------------------------------------------------------------------------------------------------


class Layers:
    """Compressed caches of the layers of some groups, filled with random numbers: factors, tails, and queries.

    The factor A is shared within a group. `o` has the sizes.
    """

    def __init__(self, o: argparse.Namespace, device: torch.device):
        self.o, self.device = o, device
        positions = torch.arange(o.tokens, device=device)
        rope = Rope(theta=o.theta)
        self.rope, self.table = rope_table(rope, o.dim, positions[None]), consecutive_table(rope, o.dim, positions)
        self.visible = Visible(torch.tensor([o.tokens + o.tail - 1], device=device), None, None, False)
        self.scale = o.dim**-0.5
        self.keys: list[Factored] = []
        self.values: list[Factored] = []
        self.queries: list[Tensor] = []
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
        """Keys or values with the factor `a` (B, S, R), and a tail of uncompressed tokens."""
        o, rank = self.o, a.shape[2]
        b = self.rand(o.batch, o.kv_heads * o.dim, rank) / rank**0.5
        return Factored(a, b, self.rand(o.batch, o.tail, o.kv_heads, o.dim))

    def uncompressed(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values (B, S + T, G, D) of layer `i`."""
        parts = (self.keys[i], self.values[i])
        k, v = (
            (part.a @ part.b.mT).unflatten(-1, (self.o.kv_heads, self.o.dim)) for part in parts if part.b is not None
        )
        k = apply_rope(k, self.rope)
        return torch.cat((k, self.keys[i].tail), 1), torch.cat((v, self.values[i].tail), 1)

    def attend_uncompressed(self, i: int, k: Tensor, v: Tensor) -> Tensor:
        """Attention of layer `i` over the keys and values of `uncompressed`."""
        return decode_attention([self.queries[i]], [Stored(k)], [Stored(v)], self.visible, scale=self.scale)[0]

    def attend(self, i: int, selection: Selection | None = None) -> Tensor:
        """Attention of layer `i` over its factors: over all tokens, or those of `selection`."""
        return lowrank_decode(
            [self.queries[i]], [self.keys[i]], [self.values[i]], self.table, self.visible, scale=self.scale,
            selection=selection,
        )[0]  # fmt: skip

    def attend_tiled(self, i: int, rebuild: Rebuild) -> object:
        """`attend` by Triton's kernel with the tiles of `rebuild`."""
        parts = ([self.queries[i]], [self.keys[i]], [self.values[i]])
        return split_lowrank.run(*parts, self.table, self.visible, self.scale, None, Tuning(rebuild=rebuild))


class DecodeBenchmark:
    """Times of attention over the layers' caches; `flops` and `copy` are the device's rates in FLOP/s and bytes/s."""

    def __init__(self, o: argparse.Namespace, device: torch.device, flops: float, copy: float, record: Record):
        self.o, self.device, self.flops, self.copy, self.record = o, device, flops, copy, record
        self.layers = Layers(o, device)
        self.every = range(len(self.layers.keys))
        self.width = o.kv_heads * o.dim
        self.small = self.width * (o.rank_k + o.rank_v) + 2 * o.tail * self.width
        """Numbers of the factors B and the tails of a layer."""

    def run(self) -> None:
        """Time all of it."""
        self.uncompressed()
        if self.o.sweep is not None:
            self.sweep(self.o.sweep)
        self.chosen()

    def add(
        self, name: str, calls: Sequence[Callable[[], object]], products: float, numbers: float,
        bounds: Sequence[float] = (), **more: Any,
    ) -> None:  # fmt: skip
        """Add a row with the ms of a call. `products`: FLOPs of a sequence, `numbers`: elements that it must read,
        `bounds`: others, in ms."""
        o = self.o
        arithmetic, read = 1000 * o.batch * products / self.flops, 1000 * o.batch * 2 * numbers / self.copy
        bound = max(arithmetic, read, *bounds)
        ms = layer_ms(calls, self.device)
        self.record.add({"what": "decode", "name": name, "ms": ms, "arithmetic_bound_ms": arithmetic,
                         "read_bound_ms": read, "times_bound": ms / bound, **more})  # fmt: skip

    def uncompressed(self) -> None:
        """Time attention over uncompressed keys and values, and over all tokens of the factors."""
        o, layers = self.o, self.layers
        made = [layers.uncompressed(i) for i in range(min(o.group, len(self.every)))]
        expected, computed = layers.attend_uncompressed(0, *made[0]).float(), layers.attend(0).float()
        error = ((computed - expected).norm() / expected.norm()).item()
        exact = 4 * (o.tokens + o.tail) * o.heads * o.dim
        calls = [functools.partial(layers.attend_uncompressed, i, k, v) for i, (k, v) in enumerate(made)]
        self.add("uncompressed", calls, exact, 2 * (o.tokens + o.tail) * self.width)
        made.clear()
        calls.clear()
        free(self.device)
        rebuilt = [functools.partial(layers.attend, i) for i in self.every]
        self.add("all tokens of the factors", rebuilt, *self._rebuilding(), relative_error=error)

    def _rebuilding(self) -> tuple[int, int]:
        """FLOPs and elements read of attention over all tokens, with every key rebuilt."""
        o = self.o
        products = 2 * o.tokens * (o.rank_k * self.width + o.heads * (o.dim + o.rank_v))
        return products, o.tokens * (o.rank_k + o.rank_v) + self.small

    def sweep(self, seconds: float) -> None:
        """Time Triton's kernel for rebuilding keys in many tiles, for `seconds` at most."""
        begin = time.monotonic()
        for rebuild in neighbours(default_tiles(self.o, self.device)):
            if time.monotonic() - begin > seconds:
                break
            try:
                calls = [functools.partial(self.layers.attend_tiled, i, rebuild) for i in self.every]
                self.add(f"  {rebuild}".replace("Rebuild", ""), calls, *self._rebuilding())
            except Exception as failure:
                reason = reason_of(failure, 90)
                wait(self.device)
                print(f"  {rebuild} failed: {reason}")

    def chosen(self) -> None:
        """Time attention over the tokens that landmarks choose."""
        o, layers = self.o, self.layers
        selections = []
        for i in self.every:
            k = layers.uncompressed(i)[0][:, : o.tokens]
            selections.append(
                make_landmarks(k, None, chunk=o.chunk, budget=o.select, outliers=o.outliers, local=o.local)
            )
            del k
            free(self.device)
        outliers = selections[0].outlier_keys.shape[1]
        chosen = min(o.select, max(o.tokens - outliers, 0))
        products = 2 * (
            o.tokens // o.chunk * o.heads * o.dim
            + chosen * o.rank_k * self.width
            + (chosen + outliers) * o.heads * o.rank_v
        )
        rows = o.kv_heads * (chosen * o.rank_k + (chosen + outliers) * o.rank_v)
        read = (o.tokens // o.chunk + outliers) * self.width + rows + self.small
        calls = [functools.partial(layers.attend, i, selection) for i, selection in enumerate(selections)]
        self.add(f"{o.select} tokens chosen", calls, products, read)
        self.chosen_uncompressed(selections, chosen, outliers)

    def chosen_uncompressed(self, selections: Sequence[Selection], chosen: int, outliers: int) -> None:
        """Time attention over the tokens that landmarks choose, with uncompressed values on the device and in host
        memory."""
        o, layers, marks = self.o, self.layers, self.o.tokens // self.o.chunk
        tokens, factored = chosen + outliers, list(layers.values)
        products = 2 * (marks * o.heads * o.dim + chosen * o.rank_k * self.width + tokens * o.heads * o.dim)
        small = self.width * o.rank_k + 2 * o.tail * self.width
        read = (marks + outliers) * self.width + o.kv_heads * chosen * o.rank_k + small
        of_values = tokens * self.width
        calls = [functools.partial(layers.attend, i, selection) for i, selection in enumerate(selections)]
        name = f"{o.select} tokens chosen, uncompressed values"
        for i, part in enumerate(factored):
            layers.values[i] = Factored(layers.rand(o.batch, o.tokens, self.width), None, part.tail)
        self.add(f"{name} on the device", calls, products, read + of_values)
        free(self.device)
        for i, part in enumerate(layers.values):
            pinned = torch.empty(part.a.shape, dtype=BF16, pin_memory=self.device.type == "cuda").copy_(part.a)
            layers.values[i] = Factored(pinned, None, part.tail)
        rate = host_bandwidth(self.device, 2**30 if self.device.type == "cuda" else 2**22)
        bound = 1000 * o.batch * 2 * of_values / rate
        self.add(f"{name} in host memory", calls, products, read + of_values, [bound], host_bound_ms=bound,
                 host_copy_bytes_per_s=rate)  # fmt: skip
        layers.values[:] = factored
        free(self.device)


def default_tiles(o: argparse.Namespace, device: torch.device) -> Rebuild:
    """The tiles that the kernel uses for these sizes."""
    limits = device_limits(device)
    return choose_rebuild(dim=o.dim, groups=o.kv_heads, size=2, gathered=False, limits=limits)


def neighbours(default: Rebuild) -> list[Rebuild]:
    """Tiles that fit 227 KiB of shared memory a multiprocessor: the default ones, then others."""
    tiles = [
        Rebuild(block_n=n, block_r=r, pack=pack, num_warps=warps, num_stages=stages)
        for n, pack in ((128, 2), (64, 2), (128, 1), (256, 1), (64, 1))
        for warps in (8, 4)
        for r in (64, 32, 128)
        for stages in (3, 4, 2)
    ]
    return [default, *(other for other in tiles if other != default and other.shared(64, 2) <= 219 * 1024)]


# ---- compress --------------------------------------------------------------------------------------------------------


def bench_compress(o: argparse.Namespace, device: torch.device, flops: float, record: Record) -> None:
    """Time the prefill of `o.layers` layers and the compression of their cache, both as in a decoder."""
    shape = {
        "vocab_size": 256, "d_model": o.heads * o.dim, "n_layers": o.layers, "n_heads": o.heads, "head_dim": o.dim,
        "d_ff": o.d_ff, "max_seq_len": o.prompt, "rope": {"theta": o.theta},
        "kv": {"preset": "gqa", "n_kv_heads": o.kv_heads},
    }  # fmt: skip
    config = ModelConfig.model_validate(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = build_decoder(config)
    model.to(BF16).eval().requires_grad_(False)
    ids = torch.randint(256, (1, o.prompt), device=device)
    times: list[float] = []
    for _ in range(3):
        cache = KVCache(config)
        with torch.no_grad():
            times.append(wall_time(functools.partial(model.hidden, ids, cache=cache), device)[1])
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


# ---- the command line ------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m benchmarks.posthoc_decode", description=__doc__)
    add_sizes(parser)
    parser.add_argument("--svd", nargs="+", choices=SVDS, metavar="SVD", help=f"only these: {' '.join(SVDS)}")
    parser.add_argument("--errors", action="store_true", help="also measure the error of the compression")
    parser.add_argument("--sweep", nargs="?", const=float("inf"), type=float, metavar="SECONDS",
                        help="also Triton's kernel for rebuilding keys, in many tiles; minutes, or less")  # fmt: skip
    add_outputs(parser)
    return parser


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    o = make_parser().parse_args(argv)
    check_sizes(o)
    device = device_of(o, "benchmarks.posthoc_decode")
    record, copy, flops = begin_record(o, device)
    if o.only != "compress":
        DecodeBenchmark(o, device, flops, copy, record).run()
        free(device)
    if o.only != "decode":
        bench_compress(o, device, flops, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
