"""Times of distilled and plain steps of the same student, in turns."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import time_steps
from cllm.config import Config
from cllm.config.load import validate
from cllm.train.launch import Launch
from cllm.train.optim import make_optimizer
from cllm.train.run import make_module
from cllm.train.uptraining import UptrainingModule
from cllm.uptrain.complete import complete
from experiments.uptraining.setup import DISTILLED, Folders, Size, Student
from experiments.uptraining.students import data_module, student_data

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl": 1.0},
    "distilled": DISTILLED,
    "distilled, all layers": DISTILLED | {"hidden_layers": "all"},
}
"""`uptrain.loss` by name; the others are compared with the first."""
_WARMUP, _TURNS = 5, 6
"""Untimed steps of each kind, and timed turns."""


def measure_steps(
    folders: Folders, size: Size, student: Student, *, device: torch.device, compiled: bool, steps: int
) -> list[dict[str, Any]]:
    """A row for each of `WAYS`: the median over several turns of `steps` steps.

    A step is the forward passes, backward, clipping at norm 1 and AdamW. The batch is already on the device.
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
            ms = time_training(module, optimizer, batch, device, steps if turn else _WARMUP)
            times[name] += ms if turn else []
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


def time_training(
    module: UptrainingModule,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    device: torch.device,
    steps: int,
) -> list[float]:
    """Milliseconds of each of `steps` training steps on the same batch."""

    def step(_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module.objective(batch)["objective"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_steps(step, steps, device)
