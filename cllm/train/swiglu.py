"""Which kernels compute the feed-forward layers of a run: `train.swiglu`."""

from __future__ import annotations

import logging

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from cllm.config import Config
from cllm.errors import UserError
from cllm.kernels import swiglu
from cllm.model.decoder import Decoder
from cllm.model.mlp import SwiGLU

log = logging.getLogger(__name__)


def fuse_swiglu(model: Decoder, config: Config, device: torch.device) -> bool:
    """Let the blocks' SwiGLU compute within its products where `train.swiglu` says so, before `compile_blocks`; whether
    it does. Logs what `auto` chose, and why.

    Raises:
        UserError: where it is "quack" and cannot be.
    """
    wanted = config.train.swiglu
    if wanted == "torch":
        return False
    reason = _obstacle(model, config, device)
    if reason is not None and wanted == "quack":
        raise UserError(f"train.swiglu is quack, which cannot be: {reason}; allowed here: auto, torch")
    for layer in _layers(model):
        layer.fused = reason is None
    rank_zero_only(log.info)("swiglu: %s", "quack" if reason is None else f"torch; not quack ({reason})")
    return reason is None


def will_fuse(model: Decoder, config: Config) -> bool:
    """Whether a run of `config` will, as far as this machine can tell: without a GPU `auto` does not."""
    if config.train.swiglu != "auto":
        return config.train.swiglu == "quack"
    on_gpu = torch.cuda.is_available() and config.train.accelerator != "cpu"
    return on_gpu and _obstacle(model, config, torch.device("cuda")) is None


def _layers(model: Decoder) -> list[SwiGLU]:
    return [module for module in model.blocks.modules() if isinstance(module, SwiGLU)]


def _obstacle(model: Decoder, config: Config, device: torch.device) -> str | None:
    """Why not, or None."""
    train = config.train
    if not train.in_bf16(gpu=device.type != "cpu"):
        return "precision is fp32"
    if train.fp8 is not None:
        return f"fp8 is {train.fp8}"
    if train.strategy == "zero3":
        return "zero3 would keep every weight that it has gathered until the backward"
    for layer in _layers(model):
        for name, linear in layer.named_children():
            if type(linear) is not nn.Linear:
                return f"{name} is a {type(linear).__name__}"
            if reason := swiglu.unsupported(linear.in_features, linear.out_features):
                return reason
    return swiglu.unavailable(device)
