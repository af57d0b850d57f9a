"""A decoder set up for training: recomputation, precision, kernels, compilation."""

from __future__ import annotations

from cllm.config import Config
from cllm.model.decoder import Decoder
from cllm.train.float8 import convert_blocks
from cllm.train.launch import Launch
from cllm.train.swiglu import fuse_swiglu


def prepare_for_training(model: Decoder, config: Config, launch: Launch) -> None:
    """Set up `model`, in place, as `config.train` says.

    Raises:
        UserError: for `train.fp8` or `train.swiglu` if the model or the device does not support it.
    """
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.recompute_fusion = config.train.recompute_fusion
    model.fp32_residual = config.train.fp32_residual
    if config.train.fp8 is not None:
        convert_blocks(model, config.train.fp8)
    fuse_swiglu(model, config, launch)
    if launch.compiled:
        model.compile_blocks()
