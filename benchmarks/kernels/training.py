"""Pieces of a training step, forward and backward: attention, fusion, MLP, loss and norm.

Bounds are bytes over the copy bandwidth, or FLOPs over the matmul rate; `copy` is in bytes/s, `flops` in FLOP/s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.table import Table, rand
from benchmarks.record import reason_of
from benchmarks.timing import BF16
from cllm.cache.slot import Slot
from cllm.kernels import cross_entropy
from cllm.kernels.attention import BACKENDS, attention
from cllm.kernels.backends.mask import Mask, document_boundaries
from cllm.kernels.swiglu import swiglu as fused_swiglu
from cllm.kernels.swiglu import unavailable as swiglu_unavailable
from cllm.model.loss import by_chunks, by_liger
from cllm.model.norm import RMSNorm
from cllm.model.sources import FusedRead
from cllm.plan.plan import Fuse


def bench_attention(table: Table, flops: float) -> None:
    """Time every installed backend, causal and with documents."""
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
                    table.time("attention", f"{kind}, {heads}/{kv} heads of {dim}", name, run, q, k, v, bound=bound)


def bench_fusion(table: Table, copy: float) -> None:
    """Time a fusing layer: plain attention, fused keys and values materialised, and a doubled head dimension."""
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
        table.time("fusion", case, "plain", functools.partial(attention, mask=Mask()), q, *slots[:2])
        table.time("fusion", case, "materialised", fused, q, *slots)
        table.time("fusion", case, "doubled head dimension", doubled, q, *slots)
        # Forward reads four tensors and writes two. Backward reads two gradients and, for the gradients of the fusion
        # weights, the four tensors again; it writes four.
        bound = 16 * slots[0].numel() * 2 / copy * 1000

        def alone(k1, v1, kn, vn, fuse=fuse):
            pair = [Slot(k1, v1), Slot(kn, vn)]
            return fuse[0](pair), fuse[1](pair)

        table.time("fusion", case, "the fusion alone", alone, *slots, bound=bound)


def bench_mlp(table: Table, flops: float) -> None:
    """Time SwiGLU."""
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
        table.time("mlp", case, "compiled", torch.compile(swiglu), x, gate, up, down, bound=bound)
        table.time("mlp", case, "compiled, joint", torch.compile(joint), x, gate, up, down, bound=bound)
        if reason := swiglu_unavailable(x.device):
            print(f"quack-kernels cannot be used: {reason}")
        else:
            table.time("mlp", case, "epilogues", fused_swiglu, x, gate, up, down, bound=bound)


def bench_loss(table: Table, flops: float) -> None:
    """Time the head and the cross-entropy of its logits."""
    for tokens, d, vocabulary in ((65536, 1024, 32_000), (32768, 2048, 32_000), (16384, 1024, 128_256)):
        hidden, weight = rand(tokens, d), rand(vocabulary, d)
        weight.data *= d**-0.5
        labels = torch.randint(vocabulary, (tokens,), device="cuda")
        chunks = functools.partial(by_chunks, labels=labels, reduction="mean")
        forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "liger": functools.partial(by_liger, labels=labels, reduction="mean"),
            "torch": functools.partial(chunks, kernel=cross_entropy.by_torch),
        }
        if reason := cross_entropy.unavailable(hidden.device, vocabulary, BF16):
            print(f"quack-kernels cannot be used: {reason}")
        else:
            forms["quack"] = functools.partial(chunks, kernel=cross_entropy.by_quack)
        for name, form in forms.items():
            case = f"{tokens} tokens, {d} to {vocabulary}"
            table.time("loss", case, name, form, hidden, weight, bound=6 * tokens * d * vocabulary / flops * 1000)


def bench_norm(table: Table, copy: float) -> None:
    """Time RMSNorm with the addition before it."""
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
            table.time("norm", case, "compiled", torch.compile(add_norm), x, y, bound=bound)
            try:
                from quack.rmsnorm import rmsnorm
            except Exception as error:
                print(f"quack cannot be used: {reason_of(error, 300)}")
                continue

            def quack(x, y, norm=norm, rmsnorm=rmsnorm):
                return rmsnorm(y, norm.weight, residual=x, prenorm=True)

            table.time("norm", case, "quack", quack, x, y, bound=bound)
