"""fp8 products in the linear layers of blocks, by torchao's float8 training.

Each of a layer's three products (output, gradient of the input, gradient of the weight) casts its factors to fp8 with
scales computed from the tensors themselves, and returns bf16. Weights, gradients, optimizer states and checkpoints are
the same as without it, names included. The head, the embedding and fusion weights are never converted.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from cllm.config import Config
from cllm.errors import UserError
from cllm.model.decoder import Decoder

log = logging.getLogger(__name__)

MULTIPLE = 16
"""fp8 matrix units need dimensions that are multiples of this."""


def check_float8(config: Config, accelerator: str) -> None:
    """Refuse `train.fp8` if it cannot run here.

    Raises:
        UserError: on a CPU, on a GPU below compute capability 8.9, with a number of tokens in a micro-batch that
            is not a multiple of 16, or if torchao cannot be imported.
    """
    recipe = config.train.fp8
    if recipe is None:
        return
    if accelerator != "gpu" or not torch.cuda.is_available():
        raise UserError(f"train.fp8 is {recipe}, but the run is on a CPU, which has none; allowed here: null")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise UserError(
            f"train.fp8 is {recipe}, but {torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, capability))} and fp8 products need 8.9 or higher; allowed here: null"
        )
    tokens = config.train.micro_batch * config.data.seq_len
    if tokens % MULTIPLE:
        raise UserError(
            f"train.fp8 is {recipe}, but train.micro_batch {config.train.micro_batch} x data.seq_len "
            f"{config.data.seq_len} is {tokens} tokens; allowed: multiples of {MULTIPLE}"
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"train.fp8 is {recipe}, but torchao cannot be imported ({error}): pip install 'torchao>=0.18,<0.19'; "
            "allowed without it: null"
        ) from None


def fits(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer with both dimensions multiples of 16."""
    return type(module) is nn.Linear and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def convert_blocks(model: Decoder, recipe: str, *, emulate: bool = False) -> int:
    """Make the linear layers of all blocks compute in fp8, in place, before `compile_blocks`; returns their number.

    Args:
        model: its parameters stay the same objects under the same names.
        recipe: one of `train.fp8`, as torchao names them.
        emulate: round factors to fp8 and multiply them in fp32, for machines without fp8 products.

    Raises:
        UserError: if no layer has dimensions that are multiples of 16, and for a plan with a loop.
    """
    if model.plan.loop is not None:
        raise UserError(f"train.fp8 is {recipe}, but {model.plan.loop.text}; allowed: plans without a loop")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    converted = sum(map(fits, linears))
    if not converted:
        raise UserError(
            f"train.fp8 is {recipe}, but none of the model's {len(linears)} linear layers has dimensions that are "
            f"multiples of {MULTIPLE}; allowed here: null"
        )
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model.blocks, module_filter_fn=lambda module, _: fits(module), config=config)
    plain, rows = _kinds()
    for module in model.blocks.modules():
        if type(module) is plain:
            module.__class__ = rows  # torchao has no argument for the class
    rank_zero_only(log.info)("fp8: %d of %d linear layers of the blocks, %s scales", converted, len(linears), recipe)
    return converted


@functools.cache
def _kinds() -> tuple[type, type]:
    """torchao's linear layer, and our subclass of it."""
    from torchao.float8.float8_linear import Float8Linear

    class Float8Rows(Float8Linear):
        """Flattens its input to (N, in_features). With a 3-d input the compiler does not recognise that torchao's
        forward and backward cast the same tensor, and computes the amax twice."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    return Float8Linear, Float8Rows
