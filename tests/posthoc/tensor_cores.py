"""TF32 products of a GPU, emulated on a CPU, where torch computes them in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addmm_": (1, 2), "baddbmm_": (1, 2)}
"""The positions of the two factors among the arguments of a product."""


class TensorCores(TorchDispatchMode):
    """Rounds both fp32 factors of a product to the 10 fraction bits of TF32, where the process allows TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0
        """Products with rounded factors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        positions = _FACTORS.get(function.overloadpacket.__name__, ())
        if torch.get_float32_matmul_precision() == "high" and all(args[i].dtype == torch.float32 for i in positions):
            self.rounded += bool(positions)
            args = tuple(nearest_tf32(x) if i in positions else x for i, x in enumerate(args))
        return function(*args, **(kwargs or {}))


def nearest_tf32(x: Tensor) -> Tensor:
    """`x` in fp32, rounded to the nearest number with 10 fraction bits; ties away from zero, as on a GPU."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
