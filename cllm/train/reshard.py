"""ZeRO's states set parameter by parameter, and read from the shards of another number of processes.

DeepSpeed loads only shards that the same number of processes has written. Their content does not depend on that number:
fp32 weights, which the checkpoint has as safetensors too, the optimizer's states of each weight, and its step count.
So `load_resharded` takes the fp32 weights from the safetensors and concatenates each parameter's states from all
shards. These are mapped into memory, and one parameter at a time is read. The layout of the shards may differ: with
another accumulation DeepSpeed may use another optimizer for the same stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cllm.errors import UserError

_OF_DEEPSPEED = {"module", "optimizer", "lr_scheduler"}
"""Entries of a checkpoint that are not for Lightning."""


def shards(checkpoint: Path) -> list[Path]:
    """The optimizer states of a ZeRO checkpoint: one file for each process that wrote it, in their order.

    Raises:
        UserError: if a file is missing.
    """
    files = list(checkpoint.glob("checkpoint/*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    found = {int(file.name.partition("zero_pp_rank_")[2].partition("_")[0]): file for file in files}
    if not found:
        raise UserError(f"{checkpoint}: not a checkpoint of a ZeRO run: it has no optimizer states")
    missing = sorted(set(range(max(found) + 1)) - found.keys())
    if missing:
        raise UserError(f"{checkpoint}: damaged: the optimizer states of process {missing[0]} are missing")
    return [found[rank] for rank in range(len(found))]


# ---- setting one parameter's states ----------------------------------------------------------------------------------


@torch.no_grad()
def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a weight in the engine's precision. Collective under ZeRO-3."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def set_fp32(parameter: nn.Parameter, value: Tensor, rank: int, state: str | None = None) -> None:
    """Overwrite this process's part of a parameter's fp32 master weight, or of the optimizer's `state` of that name.

    Args:
        value: the entire tensor, of the parameter's shape.
    """
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        if state is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, state)
        return
    # ZeRO-3 pads each parameter to a multiple of the processes; DeepSpeed's setter of entire tensors ignores that.
    part = safe_get_local_fp32_param(parameter) if state is None else safe_get_local_optimizer_state(parameter, state)
    start = min(rank * part.numel(), value.numel())
    new = value.flatten()[start : start + part.numel()].to(part.device)
    part = part.flatten().clone()
    part[: new.numel()] = new
    if state is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, state)


# ---- reading shards of another number --------------------------------------------------------------------------------


def load_resharded(
    engine: Any, checkpoint: Path, weights: dict[str, Tensor], rank: int, *, states: Sequence[str]
) -> dict[str, Any]:
    """Set weights, optimizer states and counters of an engine from the shards of any number of processes. Collective.

    Args:
        engine: DeepSpeed's.
        checkpoint: a folder with shards.
        weights: the fp32 weights of all parameters by the engine's names.
        rank: of this process.
        states: names of the optimizer's fp32 states that have the shape of the parameter.

    Returns:
        Lightning's entries of the checkpoint.

    Raises:
        UserError: if a parameter is missing.
    """
    files = shards(checkpoint)
    optimizer = engine.optimizer
    read = _Stage3(files) if hasattr(optimizer, "fp32_partitioned_groups_flat") else _Stages1And2(files)
    _make_states(optimizer, read.base, states)
    for name, parameter in engine.module.named_parameters():
        if name not in weights:
            raise UserError(f"{checkpoint}: not a checkpoint of this run: no tensor {name} in it")
        set_weight(parameter, weights[name])
        if not parameter.requires_grad:
            continue
        set_fp32(parameter, weights[name], rank)
        for state in states:
            value = read.state(name, state, parameter)
            if value is None:
                raise UserError(f"{checkpoint}: not a checkpoint of this run: its optimizer has no weight {name}")
            set_fp32(parameter, value, rank, state)
    saved = read.model_states
    engine.global_steps, engine.skipped_steps = saved["global_steps"], saved["skipped_steps"]
    engine.global_samples = saved["global_samples"]
    return {key: value for key, value in saved.items() if key not in _OF_DEEPSPEED}


def _make_states(optimizer: Any, saved: dict[str, Any], states: Sequence[str]) -> None:
    """Create the states of DeepSpeed's optimizer, which has not taken a step, with the saved settings and scalars."""
    base = optimizer.optimizer
    for group, settings in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    first = saved["state"].get(0, {})
    scalars = {k: v for k, v in first.items() if k not in states and (not isinstance(v, Tensor) or v.numel() == 1)}
    on_device = base.defaults.get("fused") or base.defaults.get("capturable")
    for flat in _flat_partitions(optimizer):
        device = flat.device if on_device else "cpu"
        base.state[flat] = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in scalars.items()}
        base.state[flat] |= {state: torch.zeros_like(flat) for state in states}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_partitions(optimizer: Any) -> Iterator[Tensor]:
    """The fp32 weights of this process, as its optimizer gets them."""
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return
    raise RuntimeError(f"{type(optimizer).__name__}: not an optimizer of ZeRO that is known here")


def _load(file: Path) -> dict[str, Any]:
    """A pickle of DeepSpeed, its tensors mapped into memory."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return content


class _Stages1And2:
    """Shards that are contiguous slices of all parameters of an optimizer group, with a table of the slices."""

    def __init__(self, files: list[Path]):
        self.shards = [_load(file)["optimizer_state_dict"] for file in files]
        self.base = self.shards[0]["base_optimizer_state"]
        self.model_states = _load(files[0].parent / "mp_rank_00_model_states.pt")

    def state(self, name: str, state: str, parameter: nn.Parameter) -> Tensor | None:
        """An optimizer state of one parameter, in its shape; None if the shards do not have the parameter."""
        fragments = []
        for shard in self.shards:
            for group, slices in enumerate(shard["param_slice_mappings"]):
                if (part := slices.get(name)) is not None:
                    flat = shard["base_optimizer_state"]["state"][group][state]
                    fragments.append(flat.narrow(0, part.start, part.numel))
        return torch.cat(fragments).view(parameter.shape) if fragments else None


class _Stage3:
    """Shards with an equal part of every parameter, padded to a multiple of the processes."""

    def __init__(self, files: list[Path]):
        self.shards = [_load(file)["optimizer_state_dict"]["optimizer_state_dict"] for file in files]
        self.base = self.shards[0]
        self.model_states = _load(files[0].parent / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        self._start: dict[str, int] = {}
        """Offset of each parameter's part in the concatenated tensors of a shard."""
        start = 0
        for shapes in self.model_states["param_shapes"]:
            for name, shape in shapes.items():
                self._start[name] = start
                start += -(-shape.numel() // len(files))

    def state(self, name: str, state: str, parameter: nn.Parameter) -> Tensor | None:
        """An optimizer state of one parameter, in its shape; None if the shards do not have the parameter."""
        if name not in self._start:
            return None
        shape = torch.Size(parameter.ds_shape)  # type: ignore[attr-defined] # the parameter itself is empty
        parts = [
            self._part(s["state"], state, self._start[name], -(-shape.numel() // len(self.shards))) for s in self.shards
        ]
        return torch.cat(parts)[: shape.numel()].view(shape)

    @staticmethod
    def _part(groups: dict[int, dict[str, Tensor]], state: str, start: int, length: int) -> Tensor:
        """A slice of the concatenated tensors of one process; each parameter lies within one of them."""
        for index in sorted(groups):
            flat = groups[index][state]
            if start < flat.numel():
                return flat.narrow(0, start, length)
            start -= flat.numel()
        raise RuntimeError("ZeRO-3's shards are shorter than its parameters")
