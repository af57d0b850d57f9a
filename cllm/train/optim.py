"""AdamW's parameter groups and the learning rate's course."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cllm.config import Config, OptimConfig
from cllm.errors import UserError
from cllm.model.sources import Reader


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not; fusion weights neither, and have a learning rate of their own."""
    fusion = {id(p) for module in model.modules() if isinstance(module, Reader) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": "decay",
            "params": [p for p in trained if id(p) not in fusion and p.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "name": "no_decay",
            "params": [p for p in trained if id(p) not in fusion and p.ndim < 2],
            "weight_decay": 0.0,
        },
        {
            "name": "fusion",
            "params": [p for p in trained if id(p) in fusion],
            "weight_decay": 0.0,
            "lr": config.lr * config.fusion_lr_multiplier,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. Its fused kernel, and no other form of it, can leave out a step on the device."""
    groups = parameter_groups(model, config)
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


class Schedule(LambdaLR):
    """`learning_rate_factor` over a run of `steps`, also after a state is loaded that was saved for another length."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, config: OptimConfig):
        super().__init__(optimizer, lambda step: learning_rate_factor(step, steps, config))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from the state, and the rate of the next step from this schedule and not from the state."""
        super().load_state_dict(state_dict)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def check_warmup(config: Config) -> None:
    """Refuse a run that would end in its warm-up. Not a rule of the schema: folders of such runs can be read."""
    optim, steps = config.optim, config.train.steps
    if optim.warmup(steps) > steps:
        raise UserError(
            f"optim.warmup_steps is {optim.warmup_steps}, but train.steps is {steps}, so that the run would end in its "
            f"warm-up; allowed: up to {steps}, or null"
        )


def learning_rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`, as a share of `config.lr`.

    Warm-up is linear and reaches 1 with its last step. `cosine` and `linear` then fall to `min_lr` at the last step;
    `wsd` stays at 1 and falls linearly over the last `decay_fraction` of all steps; `constant` stays.
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
