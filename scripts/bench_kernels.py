#!/usr/bin/env python
"""Time the pieces of a step on one GPU, each beside its rivals and its bound: of training, forward and backward, and of
decoding.

    python scripts/bench_kernels.py                          everything
    python scripts/bench_kernels.py attention fusion --out kernels.json

attention  every backend that is installed, causal and with documents
fusion     one fusing layer: plain, fused keys and values materialised, doubled head dimension
mlp norm   SwiGLU and RMSNorm: compiled by torch and by libraries, where they are installed
loss       the head and the cross-entropy of its logits, by every kernel that is installed
decode     one new token over cached slots; with --sweep also other tiles than the rule's, to see what it misses
Bounds are bytes over the copy rate measured in the same run, or FLOPs over the matmul rate.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.arguments import Parser
from cllm.environment import clocks, environment
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.kernels import cross_entropy, split_decode
from cllm.kernels.attention import BACKENDS, attention
from cllm.kernels.backends.mask import Mask, document_boundaries
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.swiglu import swiglu as fused_swiglu
from cllm.kernels.swiglu import unavailable as swiglu_unavailable
from cllm.model.loss import by_chunks, by_liger

BF16 = torch.bfloat16


def rand(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16).requires_grad_(grad)


def time_ms(run: Callable[[], Any], repeat: int = 20) -> float:
    """Median ms of `run` by device events, after warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeat):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        times.append((a, b))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times)[repeat // 2]


def forward_backward(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], None]:
    """A call that runs `function` and its backward with fixed gradients for each of its results."""

    def call() -> tuple[Tensor, ...]:
        found = function(*inputs)
        return found if isinstance(found, tuple) else (found,)

    with torch.no_grad():
        gradients = [torch.randn_like(t) for t in call()]

    def run() -> None:
        for t in inputs:
            t.grad = None
        torch.autograd.backward(call(), gradients)

    return run


class Table:
    """Rows as they come, printed and, with `out`, written: what is cut off loses the row it was at."""

    def __init__(self, found: dict[str, Any], out: Path | None):
        self.found, self.out = found | {"rows": []}, out
        self.write()

    def keep(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        self.write()

    def write(self) -> None:
        if self.out is not None:
            self.found["clocks"] = [*self.found["clocks"][:1], clocks()]
            write_atomic(self.out, json.dumps(self.found, indent=2) + "\n")

    def add(
        self, what: str, case: str, name: str, function: Callable[..., Any], *inputs: Tensor, bound: float | None = None
    ) -> None:
        """Time `function` of `inputs`, forward and backward; one that fails is told and left out."""
        try:
            ms = time_ms(forward_backward(function, *inputs))
        except Exception as error:
            print(f"{what:<10}{case:<34}{name:<26} failed: {' '.join(str(error).split())[:90]}")
            return
        self.keep({"what": what, "case": case, "name": name, "ms": ms, "bound_ms": bound})
        share = f"{ms / bound:6.2f}x bound" if bound else ""
        print(f"{what:<10}{case:<34}{name:<26}{ms:9.3f} ms {share}", flush=True)


def rates() -> tuple[float, float]:
    """(copy bytes/s counting reads and writes, bf16 matmul FLOP/s) of this GPU, measured."""
    a = torch.empty(2**32, device="cuda", dtype=torch.uint8)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / time_ms(lambda: b.copy_(a)) * 1000
    x = rand(8192, 8192, grad=False)
    return copy, 2 * 8192**3 / time_ms(lambda: x @ x) * 1000


def bench_attention(table: Table, flops: float) -> None:
    for heads, dim, kv in ((16, 64, 16), (16, 128, 16), (16, 128, 4)):
        batch, length = 8, 4096
        q, k, v = rand(batch, length, heads, dim), rand(batch, length, kv, dim), rand(batch, length, kv, dim)
        ids = (torch.arange(length, device="cuda")[None] // 1024).expand(batch, -1).contiguous()
        masks = {"causal": Mask(), "4 documents": Mask(document_ids=ids, documents=document_boundaries(ids))}
        for kind, mask in masks.items():
            share = 0.5 if kind == "causal" else 0.125
            bound = 3.5 * 4 * batch * heads * length**2 * dim * share / flops * 1000
            for name in BACKENDS:
                if BACKENDS[name].unavailable() is None:
                    run = functools.partial(attention, mask=mask, backend=name)
                    table.add("attention", f"{kind}, {heads}/{kv} heads of {dim}", name, run, q, k, v, bound=bound)


def bench_fusion(table: Table, copy: float) -> None:
    from cllm.cache.slot import Slot
    from cllm.model.sources import FusedRead
    from cllm.plan.plan import Fuse

    batch, length, heads = 8, 4096, 16
    for dim, kv in ((128, 16), (64, 16), (128, 4)):
        q, slots = rand(batch, length, heads, dim), [rand(batch, length, kv, dim) for _ in range(4)]
        reads = [FusedRead(Fuse((0, 1), init="mean"), (0, 1), part, kv, dim).cuda() for part in ("k", "v")]
        for read in reads:
            read.reset_parameters()
        fuse = [torch.compile(read, dynamic=False) for read in reads]

        def fused(q, k1, v1, kn, vn, fuse=fuse):
            pair = [Slot(k1, v1), Slot(kn, vn)]
            return attention(q, fuse[0](pair), fuse[1](pair), Mask())

        def doubled(q, k1, v1, kn, vn, reads=reads):
            a, b = (read.channel_weights() for read in reads)
            wide = torch.cat([(q.float() * w).to(q.dtype) for w in a], dim=-1)
            out = attention(wide, torch.cat((k1, kn), -1), torch.cat((v1, vn), -1), Mask(), scale=q.shape[-1] ** -0.5)
            c, d = b
            first, second = out.chunk(2, dim=-1)
            return (first.float() * c + second.float() * d).to(q.dtype)

        case = f"{heads}/{kv} heads of {dim}"
        table.add("fusion", case, "plain", functools.partial(attention, mask=Mask()), q, *slots[:2])
        table.add("fusion", case, "materialised", fused, q, *slots)
        table.add("fusion", case, "doubled head dimension", doubled, q, *slots)
        # Forward reads four tensors and writes two; backward reads the two gradients and, for the weights' gradients,
        # the four tensors again, and writes four.
        bound = 16 * slots[0].numel() * 2 / copy * 1000

        def alone(k1, v1, kn, vn, fuse=fuse):
            pair = [Slot(k1, v1), Slot(kn, vn)]
            return fuse[0](pair), fuse[1](pair)

        table.add("fusion", case, "the fusion alone", alone, *slots, bound=bound)


def bench_mlp(table: Table, flops: float) -> None:
    for tokens, d, ff in ((65536, 1024, 2816), (32768, 2048, 5632)):
        x, gate, up, down = rand(tokens, d), rand(ff, d), rand(ff, d), rand(d, ff)
        for t in (gate, up, down):
            t.data *= 0.02
        bound = 6 * tokens * 3 * d * ff / flops * 1000

        def swiglu(x, gate, up, down):
            return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

        def joint(x, gate, up, down):
            a, b = (x @ torch.cat((gate, up)).T).chunk(2, dim=-1)
            return (F.silu(a) * b) @ down.T

        case = f"{tokens} tokens, {d} to {ff}"
        table.add("mlp", case, "compiled", torch.compile(swiglu), x, gate, up, down, bound=bound)
        table.add("mlp", case, "compiled, joint", torch.compile(joint), x, gate, up, down, bound=bound)
        if reason := swiglu_unavailable(x.device):
            print(f"quack-kernels cannot be used: {reason}")
        else:
            table.add("mlp", case, "epilogues", fused_swiglu, x, gate, up, down, bound=bound)


def bench_loss(table: Table, flops: float) -> None:
    for tokens, d, vocabulary in ((65536, 1024, 32_000), (32768, 2048, 32_000), (16384, 1024, 128_256)):
        hidden, weight = rand(tokens, d), rand(vocabulary, d)
        weight.data *= d**-0.5
        labels = torch.randint(vocabulary, (tokens,), device="cuda")
        forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "liger": lambda h, w, labels=labels: by_liger(h, w, labels, "mean"),
            "torch": lambda h, w, labels=labels: by_chunks(h, w, labels, "mean", cross_entropy.by_torch),
        }
        if reason := cross_entropy.unavailable(hidden.device, vocabulary, BF16):
            print(f"quack-kernels cannot be used: {reason}")
        else:
            forms["quack"] = lambda h, w, labels=labels: by_chunks(h, w, labels, "mean", cross_entropy.by_quack)
        for name, form in forms.items():
            case = f"{tokens} tokens, {d} to {vocabulary}"
            table.add("loss", case, name, form, hidden, weight, bound=6 * tokens * d * vocabulary / flops * 1000)


def bench_norm(table: Table, copy: float) -> None:
    from cllm.model.norm import RMSNorm

    for tokens, d in ((65536, 1024), (32768, 2048)):
        for dtype in (torch.float32, BF16):
            x = torch.randn(tokens, d, device="cuda", dtype=dtype).requires_grad_()
            y = rand(tokens, d)
            norm = RMSNorm(d).cuda()
            size = x.element_size()
            # Forward: read x and y, write both results. Backward: read both gradients and x, write those of x and y.
            bound = tokens * d * ((size + 2 + size + 2) + (size + 2 + size + size + 2)) / copy * 1000

            def add_norm(x, y, norm=norm):
                x = x + y
                return x, norm(x).to(BF16)

            case = f"{tokens} x {d}, residual {str(dtype)[6:]}"
            table.add("norm", case, "compiled", torch.compile(add_norm), x, y, bound=bound)
            try:
                from quack.rmsnorm import rmsnorm
            except Exception as error:
                print(f"quack cannot be used: {' '.join(str(error).split())[:300]}")
                continue

            def quack(x, y, norm=norm, rmsnorm=rmsnorm):
                return rmsnorm(y, norm.weight, residual=x, prenorm=True)

            table.add("norm", case, "quack", quack, x, y, bound=bound)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One decode call. The ring has `s` entries, of which `live` are filled."""

    name: str
    b: int = 4
    h: int = 16
    g: int = 16
    s: int = 32768
    live: int = 32768
    d: tuple[int, ...] = (128,)
    e: tuple[int, ...] = (128,)
    latent: bool = False
    """The value is the first key part."""
    float8: bool = False

    def stored(self, width: int) -> Stored:
        if not self.float8:
            return Stored(rand(self.b, self.s, self.g, width, grad=False))
        data = torch.empty((self.b, self.s, self.g, width), device="cuda", dtype=torch.float8_e4m3fn)
        for row in data:
            row.copy_(torch.randn(row.shape, device="cuda", dtype=BF16) * 100)
        return Stored(data, torch.full((self.b, self.s, self.g), 0.01, device="cuda", dtype=BF16))

    def bytes(self) -> int:
        """Stored bytes of what is seen, each once."""
        width = sum(self.d) + (0 if self.latent else sum(self.e))
        parts = len(self.d) + (0 if self.latent else len(self.e))
        return self.b * self.live * self.g * (width + 2 * parts if self.float8 else 2 * width)


DECODES = (
    Decode(name="4 x 16 heads"),
    Decode(name="16 x 4 heads, 16 queries", b=16, g=4),
    Decode(name="fused, 4 x 16 heads", d=(128, 128), e=(128, 128)),
    Decode(name="fused, 16 x 4 heads, 16 queries", b=16, g=4, d=(128, 128), e=(128, 128)),
    Decode(name="latent, 8 x 16 queries", b=8, g=1, d=(512, 64), e=(512,), latent=True),
    Decode(name="latent, 8 x 128 queries", b=8, h=128, g=1, d=(512, 64), e=(512,), latent=True),
    Decode(name="float8, 4 x 16 heads", float8=True),
    Decode(name="float8, 16 x 4 heads, 16 queries", b=16, g=4, float8=True),
    Decode(name="1 x 16 heads, 1024 tokens", b=1, s=1024, live=1024),
    Decode(name="1 x 16 heads, 1024 of 131072", b=1, s=131072, live=1024),
    Decode(name="1 x 4 heads, 16 queries, 1024 tokens", b=1, g=4, s=1024, live=1024),
)


def replayed_ms(calls: Sequence[Callable[[], Any]], repeat: int = 10) -> float:
    """Median ms of one of `calls`, replayed one after another as a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_ms(graph.replay, repeat) / len(calls)


def bench_decode(table: Table, copy: float, sweep: bool = False, only: str = "") -> None:
    for case in (c for c in DECODES if only in c.name):
        bound = case.bytes() / copy * 1000
        visible = Visible(torch.tensor([case.live - 1], device="cuda"), None, None, False)
        queries = [rand(case.b, case.h, d, grad=False) for d in case.d]
        scale = sum(case.d) ** -0.5
        sets = []
        # Several, so that nothing is left in the L2 cache by the call before.
        for _ in range(max(1, min(2**29 // case.bytes(), 2**34 * case.live // (case.s * case.bytes())))):
            keys = [case.stored(d) for d in case.d]
            sets.append((keys, keys[:1] if case.latent else [case.stored(e) for e in case.e]))

        def ours(keys, values, tiles=None, queries=queries, visible=visible, scale=scale):
            if tiles is None:
                return decode_attention(queries, keys, values, visible, scale=scale, kernel="triton")
            (k, k_scales), (v, v_scales) = (([x.data for x in p], [x.scale for x in p]) for p in (keys, values))
            rule = (visible.column, visible.first, visible.window, visible.exclude_self)
            return split_decode.run(queries, k, k_scales, v, v_scales, *rule, scale, tiles)

        def time(name: str, function, sets=sets, case=case, bound=bound) -> float:
            try:
                ms = replayed_ms([functools.partial(function, *pair) for pair in sets])
            except Exception as error:
                torch.cuda.synchronize()
                print(f"decode    {case.name:<38}{name:<38} failed: {' '.join(str(error).split())[:90]}")
                return float("inf")
            table.keep({"what": "decode", "case": case.name, "name": name, "ms": ms, "bound_ms": bound})
            rate = f"{case.bytes() / ms / 1e6:6.0f} GB/s {100 * bound / ms:5.1f} % of copy"
            print(f"decode    {case.name:<38}{name:<38}{ms:9.4f} ms {rate}", flush=True)
            return ms

        key_data, value_data = ([x.data for x in part] for part in sets[0])
        rule = split_decode.tiles_for(queries, key_data, value_data, None)[0]
        time(f"triton, {_tiles(rule)}", ours)
        if case.h == case.g:
            element = replace(rule, elementwise=True)
            time(f"triton, {_tiles(element)}", functools.partial(ours, tiles=element))
        if not case.float8 and not case.latent:
            joined = [tuple(torch.cat([x.data[:, : case.live] for x in part], -1) for part in pair) for pair in sets]

            def stock(k, v, case=case, queries=queries, scale=scale):
                q, k, v = torch.cat(queries, -1)[:, :, None], k.transpose(1, 2), v.transpose(1, 2)
                return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=case.h != case.g)

            time("torch" if len(case.d) == 1 else "torch, doubled head dimension", stock, sets=joined)
            del joined
        if sweep:
            found = {}
            for tiles in _neighbours(rule, case.h == case.g):
                found[tiles] = time(_tiles(tiles), functools.partial(ours, tiles=tiles))
            best = sorted(found, key=lambda tiles: found[tiles])[:3]
            for tiles in best:
                print(f"best      {case.name:<38}{_tiles(tiles):<38}{found[tiles]:9.4f} ms", flush=True)
        del sets
        torch.cuda.empty_cache()


def _tiles(tiles: split_decode.Tiles) -> str:
    form = " elementwise" if tiles.elementwise else ""
    return f"N{tiles.block_n} splits{tiles.splits} warps{tiles.num_warps} stages{tiles.num_stages}{form}"


def _neighbours(rule: split_decode.Tiles, elementwise: bool) -> list[split_decode.Tiles]:
    """Half, same and double of what the rule says, in every combination, and in both forms."""
    return [
        split_decode.Tiles(block_n=n, splits=splits, num_warps=warps, num_stages=stages, elementwise=form)
        for n in sorted({max(16, rule.block_n // 2), rule.block_n, 2 * rule.block_n})
        for warps in sorted({max(2, rule.num_warps // 2), rule.num_warps})
        for stages in (2, 3, 4)
        for form in ((False, True) if elementwise else (False,))
        for splits in sorted({max(1, rule.splits // 2), rule.splits, 2 * rule.splits})
    ]


@one_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    benches = {
        "attention": bench_attention,
        "fusion": bench_fusion,
        "mlp": bench_mlp,
        "norm": bench_norm,
        "loss": bench_loss,
    }
    kinds = [*benches, "decode"]
    parser.add_argument("what", nargs="*", help=f"of {', '.join(kinds)}; default all")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON, after every row")
    parser.add_argument("--sweep", action="store_true", help="decode: try other tiles too; minutes")
    parser.add_argument("--only", metavar="TEXT", default="", help="decode: cases whose name contains TEXT")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.what) - set(kinds):
        raise UserError(f"bench_kernels: unknown {', '.join(unknown)}; allowed: {', '.join(kinds)}")
    if not torch.cuda.is_available():
        raise UserError("scripts/bench_kernels.py times a GPU, and torch sees none here")
    torch.manual_seed(0)
    before = clocks()
    copy, flops = rates()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, matmul {flops / 1e12:.0f} TFLOP/s")
    found = {"environment": environment(), "copy_bytes_per_s": copy, "matmul_flops": flops, "clocks": [before]}
    table = Table(found, Path(arguments.out) if arguments.out else None)
    for what in arguments.what or kinds:
        if what == "decode":
            bench_decode(table, copy, arguments.sweep, arguments.only)
        else:
            benches[what](table, copy if what in ("fusion", "norm") else flops)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
