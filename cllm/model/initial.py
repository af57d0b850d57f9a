"""Initial weights of a decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cllm.config import ModelConfig


def check_can_initialise(name: str, module: nn.Module) -> None:
    """Raise `TypeError` for a module with direct parameters that `Decoder.init_weights` cannot initialise."""
    if isinstance(module, nn.Linear | nn.Embedding) or not dict(module.named_parameters(recurse=False)):
        return
    if not callable(getattr(module, "reset_parameters", None)):
        raise TypeError(
            f"{name} ({type(module).__name__}) has parameters but no reset_parameters(), which init_weights needs to "
            "initialise them"
        )


def check_no_buffers(name: str, module: nn.Module) -> None:
    """Raise `TypeError` for a module with buffers: a decoder is built without memory, which would lose them."""
    for key, _ in module.named_buffers(recurse=False):
        raise TypeError(
            f"{name} ({type(module).__name__}) has the buffer {key}, whose content a decoder does not keep; "
            "compute it in forward, or make it a parameter"
        )


def _reset(name: str, module: nn.Module) -> None:
    """Call `reset_parameters` of a module with direct parameters, and check that it has initialised all of them."""
    check_can_initialise(name, module)
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    with torch.no_grad():
        for parameter in own.values():
            parameter.fill_(torch.nan)
    reset: Any = module.reset_parameters
    reset()
    for key, parameter in own.items():
        if not parameter.is_meta and bool(parameter.isnan().any()):
            raise TypeError(f"{name}.reset_parameters() ({type(module).__name__}) does not initialise {key}")


def draw_weights(model: nn.Module, config: ModelConfig) -> None:
    """Draw all weights of a decoder; see `Decoder.init_weights`."""
    init = config.init
    residual_std = init.std / math.sqrt(2 * config.n_layers) if init.scale_residual else init.std
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            writes_residual = name.endswith((".o_proj", ".mlp.down_proj"))
            nn.init.normal_(module.weight, std=residual_std if writes_residual else init.std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=init.std)
        else:
            _reset(name, module)
