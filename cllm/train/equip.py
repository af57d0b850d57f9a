"""A decoder as a config trains it: what is recomputed, in which precision, by which kernels, compiled."""

from __future__ import annotations

import torch

from cllm.config import Config
from cllm.model.decoder import Decoder
from cllm.train.float8 import convert_blocks
from cllm.train.swiglu import fuse_swiglu


def equip(model: Decoder, config: Config, device: torch.device, *, compiled: bool) -> None:
    """Set up `model`, in place, as `config.train` says, to be trained on `device`.

    Raises:
        UserError: for `train.fp8` or `train.swiglu` where they cannot be.
    """
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.recompute_fusion = config.train.recompute_fusion
    model.fp32_residual = config.train.fp32_residual
    if config.train.fp8 is not None:
        convert_blocks(model, config.train.fp8)
    fuse_swiglu(model, config, device)
    if compiled:
        model.compile_blocks()
