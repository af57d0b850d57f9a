#!/usr/bin/env python
"""Time the pieces of a training step on one GPU, forward and backward, each beside its rivals and its bound.

    python scripts/bench_kernels.py                          everything
    python scripts/bench_kernels.py attention fusion --out kernels.json

attention  every backend that is installed, causal and with documents
fusion     one fusing layer: plain, fused keys and values materialised, doubled head dimension
mlp norm   SwiGLU and RMSNorm: compiled by torch and by libraries, where they are installed
Bounds are bytes over the copy rate measured in the same run, or FLOPs over the matmul rate.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.errors import UserError, one_line
from cllm.kernels.attention import BACKENDS, attention
from cllm.kernels.backends.mask import Mask, document_boundaries
from cllm.runs import write_atomic
from cllm.train.environment import environment

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
    """Rows as they come, printed and kept."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, what: str, case: str, name: str, function: Callable[..., Any], *inputs: Tensor, bound: float | None = None
    ) -> None:
        """Time `function` of `inputs`, forward and backward; one that fails is told and left out."""
        try:
            ms = time_ms(forward_backward(function, *inputs))
        except Exception as error:
            print(f"{what:<10}{case:<34}{name:<26} failed: {' '.join(str(error).split())[:90]}")
            return
        self.rows.append({"what": what, "case": case, "name": name, "ms": ms, "bound_ms": bound})
        share = f"{ms / bound:6.2f}x bound" if bound else ""
        print(f"{what:<10}{case:<34}{name:<26}{ms:9.3f} ms {share}", flush=True)


def rates() -> tuple[float, float]:
    """(copy bytes/s counting reads and writes, bf16 matmul FLOP/s) of this GPU, measured."""
    a = torch.empty(2**30, device="cuda", dtype=torch.uint8)
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
                if BACKENDS[name].available() is None:
                    run = functools.partial(attention, mask=mask, backend=name)
                    table.add("attention", f"{kind}, {heads}/{kv} heads of {dim}", name, run, q, k, v, bound=bound)


def bench_fusion(table: Table, copy: float) -> None:
    from cllm.kv.plan import Fuse
    from cllm.kv.sources import FusedRead, Slot

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
        try:
            from quack.mlp import mlp_func
        except Exception as error:
            print(f"quack cannot be used: {' '.join(str(error).split())[:300]}")
            continue
        for tuned in (False, True):

            def gemm_epilogues(x, gate, up, down, tuned=tuned, mlp_func=mlp_func):
                return mlp_func(x, torch.cat((gate, up)), down, "swiglu", tuned=tuned, concat_layout=True)

            table.add("mlp", case, f"quack tuned={tuned}", gemm_epilogues, x, gate, up, down, bound=bound)


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


@one_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["attention", "fusion", "mlp", "norm"]
    parser.add_argument("what", nargs="*", help=f"of {', '.join(kinds)}; default all")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.what) - set(kinds):
        raise UserError(f"bench_kernels: unknown {', '.join(unknown)}; allowed: {', '.join(kinds)}")
    if not torch.cuda.is_available():
        raise UserError("scripts/bench_kernels.py times a GPU, and torch sees none here")
    torch.manual_seed(0)
    copy, flops = rates()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, matmul {flops / 1e12:.0f} TFLOP/s")
    table = Table()
    for what in arguments.what or kinds:
        bench = {"attention": bench_attention, "fusion": bench_fusion, "mlp": bench_mlp, "norm": bench_norm}[what]
        bench(table, copy if what in ("fusion", "norm") else flops)
        torch.cuda.empty_cache()
    if arguments.out:
        found = {"environment": environment(), "copy_bytes_per_s": copy, "matmul_flops": flops, "rows": table.rows}
        write_atomic(Path(arguments.out), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
