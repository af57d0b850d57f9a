"""Muon for the matrices inside blocks and AdamW for all other weights, as one torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MUON, ADAMW = "muon", "adamw"
METHOD = "method"
"""Key of a parameter group: `MUON` or `ADAMW`."""


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights (out, in) of the linear layers in `model.blocks`, each once: not embeddings, not the head."""
    linears = [m for m in model.get_submodule("blocks").modules() if isinstance(m, nn.Linear)]
    return list({id(m.weight): m.get_parameter("weight") for m in linears}.values())


def split_groups(
    groups: list[dict[str, Any]], matrices: list[nn.Parameter], *, lr: float, adamw_lr_ratio: float
) -> list[dict[str, Any]]:
    """Move the weights of the groups `decay` that are in `matrices` to groups `muon`, the first.

    A group `decay_kv`, which has a learning rate of its own, becomes `muon_kv`.

    Args:
        groups: those of `cllm.train.optim.parameter_groups`.
        matrices: weights for Muon.
        lr: learning rate of Muon, and of groups without one.
        adamw_lr_ratio: multiplies the learning rate of the groups that AdamW updates.

    Returns:
        Groups without an empty one, each with its `METHOD`.
    """
    chosen = {id(p) for p in matrices}
    result: list[dict[str, Any]] = []
    for group in groups:
        others = group["params"]
        kind, _, part = group["name"].partition("_")
        if kind == "decay":
            others = [p for p in others if id(p) not in chosen]
            hidden = [p for p in group["params"] if id(p) in chosen]
            name = f"muon_{part}" if part else "muon"
            result.append({"lr": lr} | group | {"name": name, "params": hidden, METHOD: MUON})
        result.append(group | {"params": others, "lr": group.get("lr", lr) * adamw_lr_ratio, METHOD: ADAMW})
    return [group for group in result if group["params"]]


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` over the groups of one optimizer.

    Both read and write the groups and states of this object, so schedules, checkpoints and hooks see one optimizer. A
    weight of Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) has the state `momentum_buffer`,
    a weight of AdamW `exp_avg`, `exp_avg_sq` and `step`.

    The update of a matrix (A, B) is multiplied by 0.2 sqrt(max(A, B)), which gives it the root mean square of AdamW's
    updates, so that AdamW's learning rate and weight decay can be used: Liu et al. (arXiv 2502.16982), eq. 4.

    Args:
        groups: parameter groups with `METHOD`. Weights of Muon must have two dimensions.
        lr: learning rate of groups without one.
        muon: further arguments of `torch.optim.Muon`.
        adamw: further arguments of `torch.optim.AdamW`.

    Raises:
        ValueError: as torch's optimizers do.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, muon: dict[str, Any], adamw: dict[str, Any]):
        super().__init__(groups, {"lr": lr})
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if mine := self._groups_of(MUON):
            self._parts[MUON] = torch.optim.Muon(mine, lr=lr, adjust_lr_fn="match_rms_adamw", **muon)
        if mine := self._groups_of(ADAMW):
            self._parts[ADAMW] = torch.optim.AdamW(mine, lr=lr, **adamw)
        self._share()

    def _groups_of(self, method: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[METHOD] == method]

    def _share(self) -> None:
        """Let both optimizers use the groups and states of this one."""
        for method, part in self._parts.items():
            part.__setstate__({"state": self.state, "param_groups": self._groups_of(method)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and states, as `load_state_dict` passes them."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient. Returns the result of `closure`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss
