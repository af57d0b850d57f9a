"""Optimizers by name: `optim.name`.

A new optimizer is one subclass of `Optimizer`: here, listed in `BUILT_IN`, or in another package, which names an
instance in its pyproject.toml and so makes it selectable without a change to cllm:

    [project.entry-points."cllm.optim"]
    lion = "my_package.lion:lion"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cllm.config import OptimConfig
from cllm.errors import UserError
from cllm.model.parts import parts_of
from cllm.plugins import origin, plugins
from cllm.train.muon import MuonAdamW, hidden_matrices, split_groups

GROUP = "cllm.optim"
"""The entry point group of optimizers of other packages."""


class Optimizer(ABC):
    """How an optimizer is built, and what the rest of training needs to know about it."""

    states: ClassVar[tuple[str, ...]]
    """Names of the fp32 states that have the shape of the parameter, as in torch's `optimizer.state[parameter]`. Any
    further state is a scalar that is equal for all parameters, such as the step count."""
    elementwise: ClassVar[bool] = True
    """Whether each element of a weight is updated from its own gradient and states alone. ZeRO needs it: it passes flat
    parts of many weights to the optimizer."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Keys that `optim.options` may set, with their defaults."""

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state per trained parameter."""
        return 4 * len(self.states)

    def total_state_bytes(self, model: nn.Module) -> int:
        """Bytes of optimizer state for all trained parameters of `model`."""
        return self.state_bytes * sum(p.numel() for p in model.parameters() if p.requires_grad)

    def check(self, config: OptimConfig) -> None:
        """Refuse `optim.options` that the optimizer does not have, or of another type than their defaults.

        Raises:
            UserError: names the key and what is allowed.
        """
        for key in config.options:
            if key not in self.options:
                raise UserError(
                    f"optim.options has the key {key!r}, which {config.name} does not have; allowed: "
                    f"{', '.join(sorted(self.options)) or 'none'}"
                )
            value, default = config.options[key], self.options[key]
            is_number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
            if default is not None and type(value) is not type(default) and not is_number:
                kind = "an int" if type(default) is int else f"a {type(default).__name__}"
                raise UserError(f"optim.options.{key} is {value!r}; allowed: {kind}, such as {default!r}")

    def groups(self, model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
        """Parameter groups of `model`, as torch's optimizers take them."""
        return parameter_groups(model, config)

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
        """A torch optimizer over `groups` with the learning rate `config.lr`."""

    def skip_step(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        """Make the next step change no weight and no state if `skip` (scalar fp32 on the device) is 1 and not 0.

        This way works for every torch optimizer, but the host waits for the device in each step.
        """
        if skip.item():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def option(self, config: OptimConfig, key: str) -> Any:
        """The value of `optim.options.KEY`, or its default."""
        return config.options.get(key, self.options[key])


class AdamW(Optimizer):
    """torch's fused AdamW."""

    states = ("exp_avg", "exp_avg_sq")

    def build(self, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
        beta1, beta2 = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)

    def skip_step(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        optimizer.found_inf = skip  # type: ignore[attr-defined] # read by the fused kernel on the device


class Muon(Optimizer):
    """torch's Muon for the weights of the blocks' linear layers, its fused AdamW for all others; see `MuonAdamW`.

    A step that is skipped makes the host wait for the device, in every step: torch's Muon cannot skip on the device.
    """

    states = ("momentum_buffer",)  # and AdamW's for other weights; only ZeRO, which is refused, would need them here
    elementwise = False
    options: ClassVar[Mapping[str, Any]] = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adamw_lr_ratio": 1.0}

    def total_state_bytes(self, model: nn.Module) -> int:
        hidden = sum(p.numel() for p in hidden_matrices(model) if p.requires_grad)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self.state_bytes * hidden + AdamW().state_bytes * (trained - hidden)

    def check(self, config: OptimConfig) -> None:
        super().check(config)
        allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "momentum": ("a number from 0 to less than 1", lambda v: is_number(v) and 0 <= v < 1),
            "nesterov": ("true, false", lambda v: isinstance(v, bool)),
            "ns_steps": ("an integer from 1 to 99", lambda v: type(v) is int and 1 <= v <= 99),
            "adamw_lr_ratio": ("a number above 0", lambda v: is_number(v) and v > 0),
        }
        for key, (text, accepts) in allowed.items():
            value = self.option(config, key)
            if not accepts(value):
                raise UserError(f"optim.options.{key} is {value!r}; allowed with muon: {text}")

    def groups(self, model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
        """The group `muon`, and the groups of `parameter_groups` with the other weights."""
        ratio = self.option(config, "adamw_lr_ratio")
        groups = parameter_groups(model, config)
        return split_groups(groups, hidden_matrices(model), lr=config.lr, adamw_lr_ratio=ratio)

    def build(self, groups: list[dict[str, Any]], config: OptimConfig) -> MuonAdamW:
        muon = {key: self.option(config, key) for key in ("momentum", "nesterov", "ns_steps")}
        return MuonAdamW(groups, config.lr, muon, {"betas": tuple(config.betas), "eps": config.eps, "fused": True})


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


BUILT_IN: dict[str, Optimizer] = {"adamw": AdamW(), "muon": Muon()}
"""Optimizers of this package by `optim.name`."""


def find_optimizer(config: OptimConfig) -> Optimizer:
    """The optimizer of `optim.name`, from this package or a plug-in.

    Raises:
        UserError: for an unknown name, for `optim.options` that the optimizer refuses, and, unless the name is that of
            a built-in optimizer, for any plug-in that cannot be used.
    """
    known = BUILT_IN if config.name in BUILT_IN else _with_plugins()
    if config.name not in known:
        raise UserError(
            f"optim.name is {config.name!r}; allowed: {', '.join(sorted(known))}, and what installed packages register "
            f"in the entry point group {GROUP}"
        )
    optimizer = known[config.name]
    optimizer.check(config)
    return optimizer


def _with_plugins() -> dict[str, Optimizer]:
    others = plugins(GROUP)
    for name, other in others.items():
        if name in BUILT_IN:
            raise UserError(f"{origin(GROUP, name)}: cllm has an optimizer of this name; choose another")
        if not isinstance(other, Optimizer):
            raise UserError(f"{origin(GROUP, name)}: not an instance of cllm.train.optim.Optimizer")
        if not isinstance(getattr(other, "states", None), tuple):
            raise UserError(f"{origin(GROUP, name)}: has no states, a tuple of the names of its fp32 states")
    return BUILT_IN | others


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` over the trained parameters of `model`."""
    optimizer = find_optimizer(config)
    built = optimizer.build(optimizer.groups(model, config), config)
    if not isinstance(built, torch.optim.Optimizer):
        raise UserError(f"optim.name {config.name}: built a {type(built).__name__}; allowed: a torch.optim.Optimizer")
    return built


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups `decay` (matrices), `no_decay` (norms and biases) and `fusion` (fusion weights).

    Fusion weights do not decay, and their learning rate is multiplied by `fusion_lr_multiplier`. A part of the model
    with a rate in `rates` has groups of its own, such as `decay_kv` and `no_decay_kv`.
    """
    parts = parts_of(model)
    chosen: dict[str, dict[str, Any]] = {"decay": {}, "no_decay": {}, "fusion": {}}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part = parts[id(parameter)]
        if part == "fusion":
            name, multiple = "fusion", config.fusion_lr_multiplier
        else:
            name, multiple = ("decay" if parameter.ndim >= 2 else "no_decay"), getattr(config.rates, part)
            if multiple != 1:
                name = f"{name}_{part}"
        group = chosen.setdefault(name, {})
        if not group:
            decays = name.startswith("decay")
            group |= {"name": name, "params": [], "weight_decay": config.weight_decay if decays else 0.0}
            if multiple != 1 or part == "fusion":
                group["lr"] = config.lr * multiple
        group["params"].append(parameter)
    return [group for group in chosen.values() if group]
