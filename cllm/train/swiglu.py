"""The kernels of feed-forward layers: `train.swiglu`."""

from __future__ import annotations

import logging

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from cllm.config import Config
from cllm.errors import UserError
from cllm.kernels import swiglu
from cllm.model.decoder import Decoder
from cllm.model.mlp import GatedMLP
from cllm.train.launch import Launch

log = logging.getLogger(__name__)


def fuse_swiglu(model: Decoder, config: Config, launch: Launch) -> bool:
    """Fuse SwiGLU into the matrix products of the blocks' feed-forward layers if `train.swiglu` asks for it and it is
    supported. Call it before `compile_blocks`.

    Logs what `auto` chose, and why. Returns whether the layers are fused.

    Raises:
        UserError: if `train.swiglu` is "quack" and that is not supported.
    """
    wanted = config.train.swiglu
    if wanted == "torch":
        return False
    reason = _obstacle(model, config, launch)
    if reason is not None and wanted == "quack":
        raise UserError(f"train.swiglu is quack, which cannot be: {reason}; allowed here: auto, torch")
    for layer in _layers(model):
        layer.fused = reason is None
    rank_zero_only(log.info)("swiglu: %s", "quack" if reason is None else f"torch; not quack ({reason})")
    return reason is None


def will_fuse(model: Decoder, config: Config, launch: Launch) -> bool:
    """Whether a planned run would fuse SwiGLU, as far as this machine can tell: without a GPU, `auto` does not."""
    if config.train.swiglu != "auto":
        return config.train.swiglu == "quack"
    on_gpu = torch.cuda.is_available() and launch.accelerator == "gpu"
    return on_gpu and _obstacle(model, config, launch) is None


def _layers(model: Decoder) -> list[GatedMLP]:
    return [module for module in model.blocks.modules() if isinstance(module, GatedMLP)]


def _obstacle(model: Decoder, config: Config, launch: Launch) -> str | None:
    """The reason why SwiGLU cannot be fused, or None."""
    if config.model.mlp_activation != "silu":
        return f"model.mlp_activation is {config.model.mlp_activation}"
    if not launch.bf16:
        return "precision is fp32"
    if config.train.fp8 is not None:
        return f"fp8 is {config.train.fp8}"
    if launch.zero_stage == 3:
        return "zero3 would keep every weight that it has gathered until the backward"
    for layer in _layers(model):
        for name, linear in layer.named_children():
            if type(linear) is not nn.Linear:
                return f"{name} is a {type(linear).__name__}"
            if reason := swiglu.unsupported(linear.in_features, linear.out_features):
                return reason
    return swiglu.unavailable(launch.device)
