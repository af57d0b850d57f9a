"""Kernel times of one process's steps: communication, and the part of it that overlaps with other kernels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from cllm.files import write_atomic

Span = tuple[float, float]
"""Begin and end in microseconds."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of spans as sorted spans that do not touch."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def length(spans: Sequence[Span]) -> float:
    """The sum of the lengths of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def overlap(a: Sequence[Span], b: Sequence[Span]) -> float:
    """The time that two unions of spans have in common."""
    return length(a) + length(b) - length(merged([*a, *b]))


def shares(kernels: Iterable[tuple[str, Span]], steps: int) -> dict[str, float]:
    """Milliseconds of a step, from (name, span) of every kernel of `steps` steps.

    `communication` is the time in which an NCCL kernel runs, waiting for slower processes included. `exposed` is the
    part of it in which no other kernel runs. `computation` is the time in which another kernel runs, `idle` the rest.
    """
    listed = list(kernels)
    if not listed:
        return dict.fromkeys(("step", "computation", "communication", "exposed", "idle"), 0.0)
    ours = merged(span for name, span in listed if "nccl" not in name.lower())
    sent = merged(span for name, span in listed if "nccl" in name.lower())
    begin, end = min(span[0] for _, span in listed), max(span[1] for _, span in listed)
    parts = {
        "step": end - begin,
        "computation": length(ours),
        "communication": length(sent),
        "exposed": length(sent) - overlap(sent, ours),
        "idle": end - begin - length(merged([*ours, *sent])),
    }
    return {part: us / 1000 / steps for part, us in parts.items()}


class KernelProfile(Callback):
    """Profiles the last `steps` steps of a run and writes `kernels-RANK.json` into the run's folder.

    The profiler slows these steps down, so their row of metrics is not used for times.
    """

    def __init__(self, folder: Path, *, first: int, steps: int):
        self.folder, self.first, self.steps = folder, first, steps
        self.trace: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first and self.trace is None and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.trace = profile(activities=[ProfilerActivity.CUDA])
            self.trace.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.trace is None or trainer.global_step < self.first + self.steps:
            return
        torch.cuda.synchronize()
        self.trace.stop()
        events = self.trace.events() or []
        kernels = [
            (event.name, (event.time_range.start, event.time_range.end))
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA and "Memcpy" not in event.name
        ]
        self.trace = None
        write_atomic(
            self.folder / f"kernels-{trainer.global_rank}.json", json.dumps(shares(kernels, self.steps)) + "\n"
        )


def read_profiles(folder: Path) -> dict[str, Any] | None:
    """The shares of the first process, and `straggling`: the difference of the slowest and the fastest computation.

    None if no process wrote a profile.
    """
    profiles = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("kernels-*.json"))]
    if not profiles:
        return None
    computed = [one["computation"] for one in profiles]
    waited = [one["communication"] for one in profiles]
    return profiles[0] | {
        "processes": len(profiles),
        "straggling": max(computed) - min(computed),
        "communication_range": [min(waited), max(waited)],
    }
