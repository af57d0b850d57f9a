"""Rotary position embedding (arXiv 2104.09864) and its scalings, in fp32 for any dtype of the model, angles in fp64.

Layout: rotate-half, as in Llama and Qwen checkpoints. Channel j and channel j + d/2 form a pair, which is rotated by
position * theta^(-2j/d). Fusion weights of keys must be equal within a pair, so that scores depend only on relative
positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm.config import Rope, RopeScaling


def rope_frequencies(rope: Rope, dim: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Angular frequencies (dim / 2,) fp32 in radians per token, and the factor on cos and sin."""
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
    """Llama 3.1: long wavelengths are stretched, short ones kept, with a linear transition between them."""
    turns = original * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, scaling: RopeScaling, original: int, theta: float, dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, eq. 17-20): a ramp over channels, from unchanged (fast rotation) to stretched (slow)."""

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    stretch = ((ramp - low) / max(high - low, 0.001)).clamp(0, 1)
    return (1 - stretch) * frequencies + stretch * frequencies / scaling.factor


def rope_table(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin (..., T, 1, 2, dim / 2) fp32 for integer `positions` (..., T); the 1 broadcasts over heads.

    The sine is negative for the first channel of each pair. Angles are reduced to at most half a turn in fp64. In fp32
    they would be off by up to 0.004 at position 70,000, and kernels that rotate by two parts of a position in sequence
    would not match those that rotate once.
    """
    frequencies, factor = rope_frequencies(rope, dim, positions.device)
    turns = (positions.double()[..., None] * (frequencies.double() / (2 * math.pi)))[..., None, :]  # ..., T, 1, dim/2
    angles = ((turns - turns.round()) * (2 * math.pi)).float()
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`x` (B, T, H, dim) rotated by `table`; computed in fp32, returned in the dtype of `x`.

    Flipping the two halves brings each channel to its partner, and the backward of a flip is a flip. So the compiled
    forward and backward are one pass over the data each; slicing and concatenating would need zero-filled gradients.
    """
    cos, sin = table
    halves = x.float().unflatten(-1, (2, -1))  # B, T, H, 2, dim/2
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)
