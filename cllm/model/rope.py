"""Rotary position embedding (arXiv 2104.09864) and its scalings, in fp32 whatever the model's dtype, angles in fp64.

Layout: rotate-half, as in Llama and Qwen checkpoints. Channel j and channel j + d/2 form the pair that turns by
position * theta^(-2j/d); weights on keys must be equal within such a pair to leave scores relative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm.config import Rope, RopeScaling


def rope_frequencies(rope: Rope, dim: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Angular frequencies (dim / 2,) fp32 in radians a token, and the factor on cos and sin."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    frequencies = rope.theta ** (-pairs / dim)
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    assert scaling.original_max_seq_len is not None
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling, scaling.original_max_seq_len), 1.0
    factor = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)
    return _yarn(frequencies, scaling, scaling.original_max_seq_len, rope.theta, dim), factor


def _llama3(frequencies: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Llama 3.1: wavelengths beyond the original context are stretched, short ones kept, a linear blend between."""
    turns = original * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, scaling: RopeScaling, original: int, theta: float, dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, eq. 17-20): a ramp over channels, from kept (many turns) to stretched (few turns)."""

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    stretch = ((ramp - low) / max(high - low, 0.001)).clamp(0, 1)
    return (1 - stretch) * frequencies + stretch * frequencies / scaling.factor


def rope_table(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin (..., T, 1, 2, dim / 2) fp32 for integer `positions` (..., T); the 1 broadcasts over heads.

    The sine is negative for the first channel of each pair. Angles are taken to less than half a turn in fp64: their
    products are off by up to 0.004 at position 70,000 in fp32, and kernels that turn by parts of a position, one after
    the other, would not agree with those that turn by the whole.
    """
    frequencies, factor = rope_frequencies(rope, dim, positions.device)
    turns = (positions.double()[..., None] * (frequencies.double() / (2 * math.pi)))[..., None, :]  # ..., T, 1, dim/2
    angles = ((turns - turns.round()) * (2 * math.pi)).float()
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x` (B, T, H, dim) turned by `table`; computed in fp32, returned in the dtype of `x`.

    The partner of each channel is fetched by a flip of the two halves, whose backward is a flip again: compiled, both
    directions are one pass over the data, where slicing and concatenating would need zero-filled gradients.
    """
    cos, sin = table
    halves = x.float().unflatten(-1, (2, -1))  # B, T, H, 2, dim/2
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)
