# mypy: disable-error-code="import-not-found,import-untyped,assignment"
"""Gluon, Triton's layer for layouts, TMA and wgmma, as kernels for Hopper GPUs import it, and where it can be used."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import triton_decode

SUPPORTED_VERSIONS = ("3.6", "3.7")
"""Versions of Triton whose Gluon the kernels are written for. Gluon may still change between versions."""
MISSING: str | None = None
"""The reason why Gluon cannot be used, or None."""
try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit = gluon.jit
    if ".".join(triton.__version__.split(".")[:2]) not in SUPPORTED_VERSIONS:
        MISSING = f"Gluon of triton {triton.__version__}; supported are those of {' and '.join(SUPPORTED_VERSIONS)}"
except ImportError as error:  # no Triton, or an older one
    MISSING = " ".join(str(error).split())
    gl = fence_async_shared = mbarrier = tma = None
    warpgroup_mma = warpgroup_mma_init = warpgroup_mma_wait = TensorDescriptor = None

    def jit(fn: Any) -> Any:
        """Without Gluon the kernels are plain functions, and never called."""
        return fn


__all__ = [
    "MISSING",
    "SUPPORTED_VERSIONS",
    "fence_async_shared",
    "gl",
    "is_usable",
    "jit",
    "mbarrier",
    "tma",
    "tma_descriptor",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]


def tma_descriptor(x: Tensor, rows: int, width: int) -> Any:
    """The TMA descriptor of a contiguous tensor (..., r) of 16 bits: (n, r) in tiles of `rows` by `width`."""
    layout = gl.NVMMASharedLayout(2 * width, 16)
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, width], layout)


def is_usable(device: torch.device) -> bool:
    """Whether kernels in Gluon run on `device`: a Hopper GPU, and Gluon of a supported version, which has no
    interpreter."""
    return MISSING is None and not triton_decode.INTERPRETED and _is_hopper(device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
