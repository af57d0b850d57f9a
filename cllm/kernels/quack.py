"""Checks that quack-kernels (CuTe DSL) can be used, and loads it. `swiglu` and `cross_entropy` use its kernels."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from cllm.kernels.backends.base import distribution, load
from cllm.signals import raise_if_stopped

SUPPORTED_VERSION = "0.6"
"""The version whose functions are called. They change between versions."""
PACKAGE = "quack-kernels"


def unavailable(device: torch.device, module: str, names: list[str], trial: Callable[[], object]) -> str | None:
    """The reason why functions `names` of `quack.module` cannot be used on `device`, or None if `trial` ran on it."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "needs sm_90, not sm_{}{}".format(*capability)
    found = distribution(PACKAGE)
    if found is not None and not found.version.startswith(f"{SUPPORTED_VERSION}."):
        return f"{PACKAGE} {found.version} is installed; supported is {SUPPORTED_VERSION}"
    loaded = load([PACKAGE], [f"quack.{module}"], names)
    if isinstance(loaded, str):
        return loaded
    try:
        trial()
        torch.cuda.synchronize(device)
    except Exception as error:  # an incompatible compiler raises any exception
        raise_if_stopped(error)
        message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        return f"{PACKAGE} {found.version if found else ''} does not run: {type(error).__name__}: {message[:200]}"
    return None


def load_module(name: str) -> Any:
    """The module `quack.name`. Call `unavailable` first."""
    return importlib.import_module(f"quack.{name}")
