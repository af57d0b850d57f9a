"""What a distilled step costs beside a plain one of the same student: whole steps, timed on the device, in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from cllm.config import Config
from cllm.config.load import validate
from cllm.train.launch import Launch
from cllm.train.optim import make_optimizer
from cllm.train.run import make_module
from cllm.train.uptraining import UptrainingModule
from cllm.uptrain.complete import complete
from uptraining.setup import DISTILLED, Folders, Size, Student
from uptraining.students import data_module, student_data

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl": 1.0},
    "distilled": DISTILLED,
    "distilled, all layers": DISTILLED | {"hidden_layers": "all"},
}
"""`uptrain.loss` by name; the first is what the others are held against."""
_WARMUP, _TURNS = 5, 6
"""Steps before timing, and rounds of turns."""


def measure_steps(
    folders: Folders, size: Size, student: Student, *, device: torch.device, compiled: bool, steps: int
) -> list[dict[str, Any]]:
    """A row for each of `WAYS`: the median over steps, `steps` of them in each of several rounds.

    A step is forward passes, backward, clipping at norm 1 and AdamW, with the batch on the device already.
    """
    data = student_data(folders, size, student, device=device, compiled=compiled)
    configs = {
        name: validate(Config, complete(data)[0] | {"uptrain": {"loss": loss, "trainable": student.trainable}})
        for name, loss in WAYS.items()
    }
    text = data_module(configs["distilled"])
    distilled = configs["distilled"]
    launch = Launch.on(distilled, "gpu" if device.type == "cuda" else "cpu", 1)
    module = make_module(distilled, launch, text).to(device).train()
    assert isinstance(module, UptrainingModule)
    module.on_fit_start()
    optimizer = make_optimizer(module.model, configs["distilled"].optim)
    rows = [text.train_dataset[i] for i in range(size.uptrain_batch)]
    batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(_TURNS + 1):
        for name, config in configs.items():
            module.config = config
            found = timed(module, optimizer, batch, device, steps if turn else _WARMUP)
            times[name] += found if turn else []
    plain = statistics.median(times["plain"])
    return [
        {
            "kind": "step_time",
            "plan": student.plan,
            "trainable": student.trainable,
            "way": name,
            "compiled": compiled,
            "tokens": batch["input_ids"].numel(),
            "steps": len(ms),
            "ms": statistics.median(ms),
            "spread_ms": statistics.quantiles(ms, n=10)[-1] - statistics.quantiles(ms, n=10)[0],
            "against_plain": statistics.median(ms) / plain,
        }
        for name, ms in times.items()
    ]


def timed(
    module: UptrainingModule,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    device: torch.device,
    steps: int,
) -> list[float]:
    """Milliseconds of each step: between device events on a GPU, by the clock elsewhere."""

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module.objective(batch)["objective"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
