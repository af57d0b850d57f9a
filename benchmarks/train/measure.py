"""Warm-up, timed steps and kernel profile of one contender."""

from __future__ import annotations

import itertools
import sys

import torch

from benchmarks.timing import reset_peak, time_steps, wait
from benchmarks.train.contender import Batches, Contender

_KINDS = {
    "matmul": ("gemm", "nvjet", "cutlass_80", "sm90_xmma", "splitk", "cublas"),
    "attention": ("flash", "fmha", "cudnn", "attention"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "loss": ("cross_entropy", "liger"),
}
"""Parts of kernel names by kind; all other kernels are `elementwise`."""


def warm_up(contender: Contender, batches: Batches, steps: int) -> bool:
    """Take untimed steps. Returns False, with the memory freed, if the contender does not fit next to the others."""
    try:
        for _, batch in zip(range(steps), itertools.cycle(batches), strict=False):
            contender.step(batch)
        wait(batches[0][0][0].device)
    except torch.OutOfMemoryError:
        print(f"out of memory: {contender.name}", file=sys.stderr, flush=True)
        contender.drop()
        return False
    return True


def measure(contender: Contender, batches: Batches, steps: int) -> None:
    """Take `steps` timed steps and store times, peak memory and the last loss in the contender."""
    device = batches[0][0][0].device
    gpu = device.type == "cuda"
    reset_peak(device)
    before = torch.cuda.memory_allocated() if gpu else 0
    loss = torch.tensor(float("nan"))

    def step(n: int) -> None:
        nonlocal loss
        loss = contender.step(batches[n % len(batches)])

    contender.rounds.append(time_steps(step, steps, device))
    contender.last_loss = float(loss)
    if gpu:
        kept = sum(tensor.nbytes for tensor in contender.tensors())  # already part of `before`
        contender.peak_gib = (torch.cuda.max_memory_allocated() - before + kept) / 2**30


def profile(contender: Contender, batches: Batches) -> dict[str, float]:
    """Kernel ms of one step by kind; prints the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        contender.step(batches[0])
        torch.cuda.synchronize()
    totals: dict[str, float] = dict.fromkeys((*_KINDS, "elementwise"), 0.0)
    kernels = []
    for event in trace.key_averages():
        ms = event.self_device_time_total / 1000
        if ms <= 0:
            continue
        kind = next((k for k, words in _KINDS.items() if any(w in event.key.lower() for w in words)), "elementwise")
        totals[kind] += ms
        kernels.append((ms, event.count, kind, event.key[:110]))
    for ms, count, kind, name in sorted(kernels, reverse=True)[:22]:
        print(f"    {ms:8.2f} ms  x{count:<4} {kind:<11} {name}")
    parts = "  ".join(f"{kind} {ms:.1f}" for kind, ms in totals.items())
    print(f"    {parts}  sum {sum(totals.values()):.1f} ms")
    return totals
