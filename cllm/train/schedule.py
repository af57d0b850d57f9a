"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from cllm.config import Config, OptimConfig
from cllm.errors import UserError


class Schedule(LambdaLR):
    """`learning_rate_factor` over a run of `steps`, also after loading the state of a run of another length."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, config: OptimConfig):
        super().__init__(optimizer, lambda step: learning_rate_factor(step, steps, config))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from the state and compute the next step's learning rate from this schedule."""
        super().load_state_dict(state_dict)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def check_warmup(config: Config) -> None:
    """Refuse a run that would end during its warm-up.

    This is not a rule of the schema, so that folders of such runs can still be read.
    """
    optim, steps = config.optim, config.train.steps
    if optim.warmup(steps) > steps:
        raise UserError(
            f"optim.warmup_steps is {optim.warmup_steps}, but train.steps is {steps}, so that the run would end in its "
            f"warm-up; allowed: up to {steps}, or null"
        )


def learning_rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`, as a fraction of `config.lr`.

    Warm-up is linear and reaches 1 with its last step. `cosine` and `linear` then fall to `min_lr` at the last step;
    `wsd` stays at 1 and falls linearly over the last `decay_fraction` of all steps; `constant` stays at 1.
    """
    floor = config.min_lr / config.lr
    warmup = config.warmup(steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    begin = warmup
    if config.schedule == "wsd":
        begin = max(begin, round(steps * (1 - config.decay_fraction)))
    done = min(max((step - begin) / max(steps - 1 - begin, 1), 0.0), 1.0)
    if config.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * (1 - done)
