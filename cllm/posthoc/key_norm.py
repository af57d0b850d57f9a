"""The norm of a slot's keys, between their projection and RoPE (`qk_norm`).

    k = g ⊙ y / √(mean(y²) + ε),    y = W x + b

over the channels of a head (Qwen3, cllm) or over those of all heads (OLMo2). For a token it is one number, which g and
y share, times diag(g) y. So a subspace that contains diag(g) y contains k.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.errors import UserError


@dataclass(frozen=True)
class KeyNorm:
    """An RMSNorm of keys before RoPE."""

    module: nn.Module
    gains: Tensor
    """g (w,) fp64; w is the width of a head, or of all heads."""

    @classmethod
    @torch.no_grad()
    def of(cls, slot: int, module: nn.Module, channels: int) -> KeyNorm:
        """The norm `module` of the keys of `slot`, which have `channels` numbers a token.

        The gains are measured, because some classes multiply by their weight and others by 1 + weight.

        Raises:
            UserError: naming the class, if it is not an RMSNorm over a head or over all heads, with one weight for
                each channel.
        """
        weight, seen = getattr(module, "weight", None), type(module).__name__
        allowed = "allowed: an RMSNorm with a weight for each channel of a head, or of all heads"
        if not isinstance(weight, Tensor) or weight.ndim != 1 or channels % len(weight):
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
            raise UserError(f"slot {slot}: the norm of its keys, {seen}, has a weight of shape {shape}; {allowed}")
        norm, random = copy.deepcopy(module).float(), torch.Generator().manual_seed(0)
        ones = torch.ones(1, len(weight))
        probes = 100 * torch.cat((ones, torch.randn(7, len(weight), generator=random)))  # large, so that ε is nothing
        probes = probes.to(weight.device)
        outputs = norm.forward(probes).double()
        directions = probes.double() / probes.double().square().mean(1, keepdim=True).sqrt()
        gains = outputs[0]
        if not torch.allclose(outputs, gains * directions, rtol=1e-3, atol=1e-4 * max(gains.abs().max().item(), 1e-30)):
            raise UserError(f"slot {slot}: the norm of its keys, {seen}, is not an RMSNorm; {allowed}")
        return cls(module, gains)

    def per_channel(self, channels: int) -> Tensor:
        """The gains (channels,) of all heads."""
        return self.gains.repeat(channels // len(self.gains))

    @torch.no_grad()
    def __call__(self, y: Tensor) -> Tensor:
        """Normalised keys (..., channels), in the form of `y`."""
        return self.module(y.unflatten(-1, (-1, len(self.gains)))).flatten(-2)
