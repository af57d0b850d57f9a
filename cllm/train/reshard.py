"""ZeRO's states set parameter by parameter, and read from the shards of another number of processes.

DeepSpeed loads shards only where as many processes wrote them. What is in them does not depend on that number: fp32
weights, which the checkpoint has as safetensors too, AdamW's two moments of each weight, and the count of its steps.
So `load_resharded` takes the fp32 weights from the safetensors and puts each parameter's moments together from all
shards, which are mapped into memory: only one parameter at a time is read. The layout of the shards may be another one:
a run with other accumulation may have another optimizer of DeepSpeed's under the same stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cllm.errors import UserError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_DEEPSPEED = {"module", "optimizer", "lr_scheduler"}
"""Entries of a checkpoint that are not for Lightning."""


def shards(checkpoint: Path) -> list[Path]:
    """The optimizer states of a ZeRO checkpoint, one file of each process that wrote it, in their order.

    Raises:
        UserError: where there are none or one is missing.
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
    """Overwrite a weight in the precision that the engine keeps it in. Collective under ZeRO-3."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def set_fp32(parameter: nn.Parameter, value: Tensor, rank: int, moment: str | None = None) -> None:
    """Overwrite this process's share of a parameter's fp32 master weight, or of one of its `moment`s.

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
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
        return
    # ZeRO-3 pads each parameter to a multiple of the processes, which setting the entire tensor does not expect.
    if moment is None:
        share = safe_get_local_fp32_param(parameter)
    else:
        share = safe_get_local_optimizer_state(parameter, moment)
    start = min(rank * share.numel(), value.numel())
    mine = value.flatten()[start : start + share.numel()].to(share.device)
    share = share.flatten().clone()
    share[: mine.numel()] = mine
    if moment is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, moment)


# ---- reading shards of another number --------------------------------------------------------------------------------


def load_resharded(engine: Any, checkpoint: Path, weights: dict[str, Tensor], rank: int) -> dict[str, Any]:
    """Set weights, moments and counters of an engine from the shards of any number of processes. All processes call it.

    Args:
        weights: the fp32 weights of all parameters by the engine's names.
        rank: this process's.

    Returns:
        What Lightning has saved in the checkpoint.

    Raises:
        UserError: for a parameter that is missing.
    """
    files = shards(checkpoint)
    optimizer = engine.optimizer
    read = _Stage3(files) if hasattr(optimizer, "fp32_partitioned_groups_flat") else _Stages1And2(files)
    _make_states(optimizer, read.base)
    for name, parameter in engine.module.named_parameters():
        if name not in weights:
            raise UserError(f"{checkpoint}: not a checkpoint of this run: no tensor {name} in it")
        set_weight(parameter, weights[name])
        if not parameter.requires_grad:
            continue
        set_fp32(parameter, weights[name], rank)
        for moment in _MOMENTS:
            value = read.moment(name, moment, parameter)
            if value is None:
                raise UserError(f"{checkpoint}: not a checkpoint of this run: its optimizer has no weight {name}")
            set_fp32(parameter, value, rank, moment)
    state = read.model_states
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.global_samples = state["global_samples"]
    return {key: value for key, value in state.items() if key not in _OF_DEEPSPEED}


def _make_states(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give DeepSpeed's optimizer, which has not taken a step, AdamW's states with the saved settings and step count."""
    base = optimizer.optimizer
    for group, settings in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    step = saved["state"][0]["step"]
    on_device = base.defaults.get("fused") or base.defaults.get("capturable")
    for flat in _flat_partitions(optimizer):
        base.state[flat] = {"step": step.clone().to(flat.device if on_device else "cpu")}
        base.state[flat] |= {moment: torch.zeros_like(flat) for moment in _MOMENTS}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_partitions(optimizer: Any) -> Iterator[Tensor]:
    """The fp32 weights of this process, as AdamW sees them."""
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return
    raise RuntimeError(f"{type(optimizer).__name__}: not an optimizer of ZeRO that is known here")


def _load(file: Path) -> dict[str, Any]:
    """A pickle of DeepSpeed's, its tensors mapped into memory."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return content


class _Stages1And2:
    """Shards that are contiguous stretches of all parameters of an AdamW group, with a record of which."""

    def __init__(self, files: list[Path]):
        self.shards = [_load(file)["optimizer_state_dict"] for file in files]
        self.base = self.shards[0]["base_optimizer_state"]
        self.model_states = _load(files[0].parent / "mp_rank_00_model_states.pt")

    def moment(self, name: str, moment: str, parameter: nn.Parameter) -> Tensor | None:
        """A moment of one parameter, in its shape."""
        fragments = []
        for shard in self.shards:
            for group, slices in enumerate(shard["param_slice_mappings"]):
                if (part := slices.get(name)) is not None:
                    flat = shard["base_optimizer_state"]["state"][group][moment]
                    fragments.append(flat.narrow(0, part.start, part.numel))
        return torch.cat(fragments).view(parameter.shape) if fragments else None


class _Stage3:
    """Shards with an equal part of every parameter, padded to a multiple of the processes."""

    def __init__(self, files: list[Path]):
        self.shards = [_load(file)["optimizer_state_dict"]["optimizer_state_dict"] for file in files]
        self.base = self.shards[0]
        self.model_states = _load(files[0].parent / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        self._start: dict[str, int] = {}
        """Where each parameter's part begins in the shards' tensors, put end to end."""
        start = 0
        for shapes in self.model_states["param_shapes"]:
            for name, shape in shapes.items():
                self._start[name] = start
                start += -(-shape.numel() // len(files))

    def moment(self, name: str, moment: str, parameter: nn.Parameter) -> Tensor | None:
        """A moment of one parameter, in its shape."""
        if name not in self._start:
            return None
        shape = torch.Size(parameter.ds_shape)  # type: ignore[attr-defined] # the parameter itself is empty
        parts = [
            self._part(s["state"], moment, self._start[name], -(-shape.numel() // len(self.shards)))
            for s in self.shards
        ]
        return torch.cat(parts)[: shape.numel()].view(shape)

    @staticmethod
    def _part(state: dict[int, dict[str, Tensor]], moment: str, start: int, length: int) -> Tensor:
        """A stretch of the tensors of one process, put end to end; each parameter lies within one of them."""
        for index in sorted(state):
            flat = state[index][moment]
            if start < flat.numel():
                return flat.narrow(0, start, length)
            start -= flat.numel()
        raise RuntimeError("ZeRO-3's shards are shorter than its parameters")
