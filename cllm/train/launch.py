"""How a run is spread over devices, resolved once from its config and the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from cllm.config import Config
from cllm.errors import UserError
from cllm.train.optim import Optimizer, find_optimizer
from cllm.train.replay import resolve


@dataclass(frozen=True, slots=True)
class Launch:
    """Every `auto` of a config resolved: one object a run, which everything in training receives."""

    accelerator: str
    """`gpu` or `cpu`."""
    device: torch.device
    """The device of this process."""
    devices: int
    """Processes on each machine, one a device."""
    num_nodes: int
    """Machines."""
    accumulate: int
    """Micro-batches of one process in an optimizer step."""
    strategy: str
    """`single`, `ddp`, `zero1`, `zero2` or `zero3`."""
    bf16: bool
    """Whether forward and backward compute in bf16."""
    compiled: bool
    """Whether blocks are compiled."""
    not_graphed: str | None
    """Why forward and backward of a step are not one CUDA graph; None if they are."""
    optimizer: Optimizer
    """The optimizer of `optim.name`."""

    @property
    def processes(self) -> int:
        """Processes of the run, on all machines."""
        return self.devices * self.num_nodes

    @property
    def zero_stage(self) -> int | None:
        """1, 2 or 3; None without DeepSpeed."""
        return int(self.strategy.removeprefix("zero")) if self.strategy.startswith("zero") else None

    @classmethod
    def here(cls, config: Config) -> Launch:
        """The launch of a run on this machine.

        Raises:
            UserError: for devices that this machine does not have, for processes started by torchrun or SLURM that the
                config does not ask for, for a global batch that the processes cannot divide, and as `on` does.
        """
        train = config.train
        if train.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("train.accelerator is gpu, but torch sees no GPU; allowed here: cpu, auto")
        accelerator = "gpu" if train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        available = torch.cuda.device_count() if accelerator == "gpu" else 1
        if train.devices == "auto":
            devices = 1 if train.strategy == "single" else available
        else:
            devices = train.devices
            if accelerator == "gpu" and devices > available:
                raise UserError(f"train.devices is {devices}; this machine has {available}")
        check_launcher(devices, train.num_nodes)
        launch = cls.on(config, accelerator, devices)
        if train.global_batch % (train.micro_batch * launch.processes):
            raise UserError(
                f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
                f"{launch.processes} devices"
            )
        return launch

    @classmethod
    def planned(cls, config: Config) -> Launch:
        """The launch that a dry run reports: on GPUs unless the config asks for a CPU, here or elsewhere.

        `train.devices: auto` counts the GPUs of this machine, or one if it has none.

        Raises:
            UserError: as `on` does.
        """
        train = config.train
        available = 1 if train.strategy == "single" else max(torch.cuda.device_count(), 1)
        devices = available if train.devices == "auto" else train.devices
        return cls.on(config, "cpu" if train.accelerator == "cpu" else "gpu", devices)

    @classmethod
    def on(cls, config: Config, accelerator: str, devices: int) -> Launch:
        """The launch on machines with `devices` devices each.

        Raises:
            UserError: for an unknown optimizer, for ZeRO with an optimizer that is not elementwise, and for a
                `train.cuda_graph` that cannot be.
        """
        train = config.train
        gpu, processes = accelerator == "gpu", devices * train.num_nodes
        strategy: str = train.strategy
        if strategy == "auto":
            strategy = "single" if processes == 1 else "ddp"
        optimizer = find_optimizer(config.optim)
        if strategy.startswith("zero") and not optimizer.elementwise:
            raise UserError(
                f"train.strategy is {strategy}, but optim.name is {config.optim.name}, which needs entire weights, and "
                "ZeRO gives it parts of them; allowed with it: auto, single, ddp"
            )
        accumulate = -(-train.global_batch // (train.micro_batch * processes))
        compiled = train.compile
        if compiled == "auto":  # compiled blocks would hold weights that ZeRO-3 gathers inside of them
            compiled = gpu and strategy != "zero3"
        return cls(
            accelerator=accelerator,
            device=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu"),
            devices=devices,
            num_nodes=train.num_nodes,
            accumulate=accumulate,
            strategy=strategy,
            bf16=train.in_bf16(gpu=gpu),
            compiled=compiled,
            not_graphed=resolve(config, gpu=gpu, strategy=strategy, accumulate=accumulate),
            optimizer=optimizer,
        )


def check_launcher(devices: int, num_nodes: int) -> None:
    """Refuse a number of processes, started by torchrun or SLURM, that the config does not ask for.

    Raises:
        UserError: names `train.devices`, `train.num_nodes` and what was started.
    """
    if TorchElasticEnvironment.detect():
        launcher, variable = "torchrun", "WORLD_SIZE"
    elif SLURMEnvironment.detect():
        launcher, variable = "SLURM", "SLURM_NTASKS"
    else:
        return
    started = int(os.environ[variable])
    if started != devices * num_nodes:
        raise UserError(
            f"train.devices is {devices} and train.num_nodes {num_nodes}, but {launcher} has started {started} "
            f"processes ({variable}); allowed: as many as train.devices x train.num_nodes"
        )


def is_first_process() -> bool:
    """Whether this process writes the run's files: the only one, or the first of the first machine."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
