"""Weights of layers that are computed in several turns (`KVPlan.loop`).

The layers of later turns contain the modules of the first turn themselves, so that whatever moves, casts or loads the
weights of one turn does so for all. Their names are those of the first turn: `state_dict` leaves the other names out,
as `named_parameters` does, and `load_state_dict` adds them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from cllm.errors import UserError
from cllm.model.sources import Reader
from cllm.plan.plan import KVPlan


def _shared(blocks: nn.ModuleList, plan: KVPlan, i: int) -> list[str]:
    """The names in layer `i` of modules with weights that it shares with the first turn; none outside of a loop.

    Fusion weights, gates and sinks (`Reader`) belong to each layer: they weight the slots that this layer reads.
    """
    j = plan.weights_of(i)
    if j == i:
        return []
    first = dict(blocks[j].named_modules())
    return [
        name
        for name, module in blocks[i].named_modules()
        if name in first and dict(module.named_parameters(recurse=False)) and not isinstance(module, Reader)
    ]


def share_turns(model: nn.Module, blocks: nn.ModuleList, plan: KVPlan) -> None:
    """Give the layers of later turns the linear layers and norms of the first turn.

    Args:
        model: contains `blocks` under that name; its `state_dict` is the one that changes.
        blocks: one for each layer of the plan.
        plan: with or without a loop.
    """
    names: dict[str, str] = {}
    for i, block in enumerate(blocks):
        j = plan.weights_of(i)
        for name in _shared(blocks, plan, i):
            parent, _, leaf = name.rpartition(".")
            module = blocks[j].get_submodule(name)
            setattr(block.get_submodule(parent), leaf, module)
            parameters = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            names |= {f"blocks.{i}.{name}.{p}": f"blocks.{j}.{name}.{p}" for p in parameters}
    if names:
        model.register_state_dict_post_hook(partial(_drop_turns, names))
        model.register_load_state_dict_pre_hook(partial(_add_turns, names))


def check_turns(blocks: nn.ModuleList, plan: KVPlan) -> None:
    """Check that no module of a loop was replaced in one turn alone, as PEFT's adapters do.

    Raises:
        UserError: naming the module.
    """
    if plan.loop is None:
        return
    for j in range(plan.loop.first, plan.loop.first + plan.loop.count):
        i = j + plan.loop.count
        for name in _shared(blocks, plan, i):
            if blocks[i].get_submodule(name) is not blocks[j].get_submodule(name):
                raise UserError(
                    f"blocks.{j}.{name} was replaced (by an adapter?), but layer {i}, a later turn of model.kv.loop, "
                    "still has the former weights; allowed: modules outside of the loop, layers "
                    f"{plan.loop.first}-{plan.loop.last}"
                )


def _drop_turns(names: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for later in names:
        state.pop(prefix + later, None)


def _add_turns(
    names: dict[str, str], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any
) -> None:
    for later, first in names.items():
        if prefix + first in state:
            state.setdefault(prefix + later, state[prefix + first])
