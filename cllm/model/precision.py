"""The dtype of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(factor: Tensor) -> torch.dtype:
    """The dtype of products with `factor`: autocast's if it is enabled, otherwise the dtype of `factor`."""
    device = factor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else factor.dtype
