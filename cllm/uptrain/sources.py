"""`init.sources: best`: a run whose fusing layers read the layers that suit them best."""

from __future__ import annotations

import logging

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cllm.config import Config
from cllm.data.module import DataModule
from cllm.errors import UserError
from cllm.plan.plan import KVPlan, Read
from cllm.runs import RunFolder
from cllm.uptrain.search import fusion_plan, with_plan
from cllm.uptrain.start import calibration_batches
from cllm.uptrain.teacher import Teacher

log = logging.getLogger(__name__)


def check_best_sources(config: Config, *, processes: int) -> None:
    """Raises `UserError` for a plan that fuses nothing, and for several processes, which might not choose the same."""
    plan = config.model.plan()
    if not any(plan.fuses(i) for i in range(len(plan))):
        raise UserError("init.sources is best, but model.kv fuses nothing; allowed with it: plan")
    if processes > 1:
        raise UserError(
            f"init.sources is best, and there are {processes} processes, which might choose differently; choose first: "
            "python -m cllm.uptrain.search --fusion --out plan.yaml, and give plan.yaml as one more --config"
        )


def with_best_sources(config: Config, teacher: Teacher, data: DataModule, device: torch.device) -> Config:
    """`config` with its plan written out, the sources of its fused reads chosen on the calibration text.

    `teacher` goes to `device` and stays there. Raises `UserError` for one in which a layer does not own.
    """
    plan = config.model.plan()
    batches = calibration_batches(config, data)
    chosen = fusion_plan(teacher.decoder.to(device), plan, batches, ridge=config.init.ridge)
    for i in range(len(plan)):
        if (before := _sources(plan, i)) != (after := _sources(chosen, i)):
            rank_zero_only(log.info)("init.sources best: layer %d reads %s in place of %s", i, after, before)
    return config.model_copy(update={"model": with_plan(config.model, chosen)})


def with_saved_sources(config: Config, folder: RunFolder) -> Config | None:
    """`config` with the plan that the run in `folder` chose; None where it chose none, or from another plan."""
    if config.init.sources != "best" or not folder.config_file.exists():
        return None
    saved = folder.config()
    if saved.init.sources != "best" or _counted(saved.model.plan()) != _counted(config.model.plan()):
        return None
    return config.model_copy(update={"model": config.model.model_copy(update={"kv": saved.model.kv})})


def _sources(plan: KVPlan, i: int) -> str:
    return f"keys {list(plan.keys(i).layers)}, values {list(plan.values(i).layers)}"


def _counted(plan: KVPlan) -> list[tuple[object, ...]]:
    """The plan with how many sources a fused read has in place of which."""

    def counted(read: Read) -> Read:
        return read.with_layers(tuple(range(len(read.layers)))) if read.sums else read

    layers = enumerate(plan.layers)
    return [(layer.own, counted(plan.keys(i)), counted(plan.values(i)), layer.window) for i, layer in layers]
