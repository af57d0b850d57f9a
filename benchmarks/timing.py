"""Times, memory and peak rates of a device. On a GPU, times are those between device events."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch._dynamo

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
T = TypeVar("T")


# ---- the device ------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Wait until the device has finished everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Free unreferenced memory. Compiled code is dropped too: it keeps the tensors that it was compiled for."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of peak memory from what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes that torch has allocated on a GPU since `reset_peak`; None for a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ---- times -----------------------------------------------------------------------------------------------------------


def time_calls(
    run: Callable[[], Any], repeat: int, device: torch.device, before: Callable[[], Any] | None = None
) -> list[float]:
    """ms of each of `repeat` calls of `run`; `before` is called before each of them, untimed."""
    prepare = before or (lambda: None)
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            prepare()
            times.append(wall_time(run, device)[1])
        return times
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeat)]
    for begin, end in marks:  # no sync in between: the host runs ahead, so launches do not count
        prepare()
        begin.record()
        run()
        end.record()
    wait(device)
    return [begin.elapsed_time(end) for begin, end in marks]


def time_steps(step: Callable[[int], Any], steps: int, device: torch.device) -> list[float]:
    """ms of each of `steps` steps that follow each other without a sync; `step` gets the step's number, from 0."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for n in range(steps):
            step(n)
            marks.append(time.perf_counter())
        return [1000 * (end - begin) for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    wait(device)
    events[0].record()
    for n in range(steps):
        step(n)
        events[n + 1].record()
    wait(device)
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def wall_time(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of `run`, and its ms by the host's clock, launches and a final sync included."""
    wait(device)
    begin = time.perf_counter()
    result = run()
    wait(device)
    return result, 1000 * (time.perf_counter() - begin)


def wall_clock(device: torch.device) -> float:
    """Seconds of the host's clock at which the device has finished everything it was given."""
    wait(device)
    return time.perf_counter()


def time_ms(run: Callable[[], Any], repeat: int = 20) -> float:
    """Median ms of `run` on a GPU, after three calls that warm up."""
    return sorted(time_calls(run, 3 + repeat, CUDA)[3:])[repeat // 2]


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


# ---- peak rates ------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second of a copy of `nbytes` inside the device, reads and writes counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = time_calls(lambda: target.copy_(source), 8, device)[3:]
    return 2 * nbytes / statistics.median(times) * 1000


def host_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second of a copy of `nbytes` from host memory, pinned for a GPU, to the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    times = time_calls(lambda: target.copy_(source, non_blocking=True), 8, device)[3:]
    return nbytes / statistics.median(times) * 1000


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 matrix product."""
    size = 8192 if device.type == "cuda" else 256
    x = torch.randn(size, size, device=device, dtype=BF16)
    return 2 * size**3 / sorted(time_calls(lambda: x @ x, 12, device)[4:])[4] * 1000
