"""Times of compressing a cache: groups in threads or as one batch, and quantisers; part of `posthoc_variants.py`."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import reason_of
from benchmarks.timing import BF16, free, wait, wall_time
from benchmarks.variants import SECONDS, Variants
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.registry import parse

QUANTISERS = (
    "int8", "fp8", "kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32", "turboquant:bits=4",
    "turboquant:bits=4,sketch=true", "kvquant:bits=4", "kvquant:bits=4,levels=uniform",
)  # fmt: skip


def bench_compress(shape: dict[str, Any], prompt: int, methods: Sequence[str], variants: Variants, what: str) -> None:
    """Time a prefill and the compression of its cache in threads and as one batch, by each of `methods`, whose last
    options are those of the solver."""
    device = variants.device
    config = ModelConfig.model_validate({"vocab_size": 256, "max_seq_len": prompt, **shape})
    torch.manual_seed(0)
    with torch.device(device):
        model = build_decoder(config)
    model.to(BF16).eval().requires_grad_(False)
    ids = torch.randint(256, (1, prompt), device=device)
    times = []
    for _ in range(3):
        cache = KVCache(config)
        with torch.no_grad():
            times.append(wall_time(functools.partial(model.hidden, ids, cache=cache), device)[1])
    prefill = sorted(times)[1]
    variants.record.add({"what": what, "name": f"prefill of {prompt} tokens", "ms": prefill})
    del model
    for method in methods:
        fast, solver = "svd=gram" not in method, method.partition("svd=")[2]
        for name, together in (("threads", False), ("one batch", True)):
            if time.monotonic() - variants.start > SECONDS - 20:
                continue
            spec = f"{method},batched={together}".lower()
            row: dict[str, Any] = {}
            try:
                seconds = [compress_cache(cache, parse(spec), measure=False).outcome.seconds for _ in range(6)]
                if fast:
                    made = compress_cache(cache, parse(spec)).outcome.errors
                    row["largest_error"] = max(max(e.values()) for e in made.values())
                    row["mean_error"] = sum(sum(e.values()) / 2 for e in made.values()) / len(made)
            except Exception as failure:
                reason = reason_of(failure, 150)
                wait(device)
                print(f"{what} {name} failed: {reason}", flush=True)
                continue
            if fast and together:
                profile_compression(cache, spec, variants, f"{what} svd={solver}")
            ms = 1000 * sorted(seconds[1:])[2]
            variants.record.add({"what": what, "name": f"svd={solver} {name}", "ms": ms,
                                 "least_ms": 1000 * min(seconds), "share_of_prefill": ms / prefill, **row,
                                 "method": spec})  # fmt: skip
            free(device)
    bench_quantisers(cache, prefill, variants, what)


def profile_compression(cache: KVCache, method: str, variants: Variants, name: str) -> None:
    """Print and keep the total µs, and the number, of each kernel of a compression."""
    on_gpu = variants.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as made:
            compress_cache(cache, parse(method), measure=False)
            wait(variants.device)
    except Exception as failure:
        print(f"{name}: no profile: {reason_of(failure, 150)}", flush=True)
        return
    found = [(e.device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in made.key_averages()]
    found.sort(reverse=True)
    total, count = sum(us for us, _, _ in found), sum(count for _, count, _ in found)
    print(f"  {name}: {count} kernels, {total / 1000:.2f} ms", flush=True)
    for us, times, key in found[:15]:
        print(f"    {us:10.1f} µs  {times:5}  {key[:90]}", flush=True)
    results = variants.record.results
    results.setdefault("kernels_us", {})[name] = {key: round(us, 1) for us, _, key in found[:40]}
    results.setdefault("kernel_calls", {})[name] = {key: times for _, times, key in found[:40]}
    results.setdefault("kernels", {})[name] = {"count": count, "us": round(total, 1)}
    variants.record.write()


def bench_quantisers(cache: KVCache, prefill: float, variants: Variants, what: str) -> None:
    """Time the compression of `cache` by each quantiser."""
    for method in QUANTISERS:
        if time.monotonic() - variants.start > SECONDS - 10:
            return
        try:
            seconds = [compress_cache(cache, parse(method), measure=False).outcome.seconds for _ in range(3)]
        except Exception as failure:
            reason = reason_of(failure, 150)
            wait(variants.device)
            print(f"{what} {method} failed: {reason}", flush=True)
            continue
        ms = 1000 * sorted(seconds)[1]
        variants.record.add({"what": what, "name": method, "ms": ms, "share_of_prefill": ms / prefill})
        free(variants.device)


def bench_all_compression(o: argparse.Namespace, variants: Variants) -> None:
    wide = {"d_model": o.heads * o.dim, "n_layers": o.layers, "n_heads": o.heads, "head_dim": o.dim, "d_ff": o.d_ff,
            "kv": {"preset": "gqa", "n_kv_heads": o.kv_heads}}  # fmt: skip
    given = f"xkv:group={o.group},rank_k={o.rank_k},rank_v={o.rank_v}"
    bench_compress(wide, o.prompt, [f"{given},svd={svd}" for svd in ("auto", "power,products=bf16")], variants, "8B")
    free(variants.device)
    scale = 1 if variants.device.type == "cuda" else 16
    small = {"d_model": 512 // scale, "n_layers": 12, "n_heads": 8, "head_dim": 64 // scale, "d_ff": 1408 // scale,
             "kv": {"preset": "mha"}}  # fmt: skip
    methods = [f"xkv:group=4,ratio=8,svd={svd}" for svd in ("auto", "gram", "power,products=bf16")]
    bench_compress(small, 4096 // scale, methods, variants, "45M")
    free(variants.device)
    small = {"d_model": 576 // scale, "n_layers": 30, "n_heads": 9, "head_dim": 64 // scale, "d_ff": 1536 // scale,
             "kv": {"preset": "gqa", "n_kv_heads": 3}}  # fmt: skip
    bench_compress(small, 4096 // scale, methods, variants, "135M")
