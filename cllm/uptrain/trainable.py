"""The trained parameters: all, parts of attention, or low-rank updates that are merged when weights are saved."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.config import Config
from cllm.config.uptraining import TRAINED, Lora
from cllm.model.decoder import Decoder
from cllm.model.parts import parts_of
from cllm.uptrain.curriculum import OWN

LORA_A, LORA_B = "lora_a", "lora_b"


class LoraLinear(nn.Linear):
    """y = (W + alpha / rank B A) x + bias with W and bias frozen (LoRA, arXiv 2106.09685); B starts at 0."""

    lora_a: nn.Parameter
    """(rank, in_features)."""
    lora_b: nn.Parameter
    """(out_features, rank)."""
    scale: float

    @classmethod
    def of(cls, linear: nn.Linear, lora: Lora, generator: torch.Generator) -> LoraLinear:
        """`linear` with an update; its parameters are the same objects under the same names."""
        rank = lora.rank
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        bound = math.sqrt(1 / linear.in_features)
        drawn = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        made.lora_a = nn.Parameter(drawn.to(linear.weight.device))
        made.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        made.scale = lora.alpha / rank
        return made

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def merge(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W + alpha / rank B A of full weights, since those of the module may be sharded."""
        return weight + self.scale * b @ a


def make_trainable(model: Decoder, config: Config) -> None:
    """Freeze the parameters that `uptrain.trainable` leaves out; for `lora`, add updates to the blocks' linear layers.

    Fusion weights are always trained, since the teacher has none.
    """
    kind = config.uptrain.trainable
    if kind == "all":
        return
    trained, parts = TRAINED[kind], parts_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parts[id(parameter)] in trained)
    if kind == "lora":
        generator = torch.Generator().manual_seed(config.train.seed)
        for block in model.blocks:
            for name, linear in list(block.named_modules()):
                if type(linear) is nn.Linear and OWN not in name.split("."):  # a curriculum's are not saved
                    parent, _, leaf = name.rpartition(".")
                    setattr(block.get_submodule(parent), leaf, LoraLinear.of(linear, config.uptrain.lora, generator))


def lora_layers(model: Decoder) -> dict[str, LoraLinear]:
    """All layers with a low-rank update, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
