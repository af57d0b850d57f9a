"""quack-kernels (CuTe DSL), from which `swiglu` and `cross_entropy` take theirs: whether it is here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from cllm.kernels.backends.base import distribution, load

KNOWN = "0.6"
"""The version whose functions are those that are called; they change from one to the next."""
NAME = "quack-kernels"


def missing(device: torch.device, module: str, names: list[str], trial: Callable[[], object]) -> str | None:
    """Why functions `names` of `quack.module` cannot be used on `device`, or None: then `trial` has run on it."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "needs sm_90, not sm_{}{}".format(*capability)
    found = distribution(NAME)
    if found is not None and not found.version.startswith(f"{KNOWN}."):
        return f"{NAME} {found.version} is installed; known is {KNOWN}"
    loaded = load([NAME], [f"quack.{module}"], names)
    if isinstance(loaded, str):
        return loaded
    try:
        trial()
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler that does not fit raises anything
        told = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        return f"{NAME} {found.version if found else ''} does not run: {type(error).__name__}: {told[:200]}"
    return None


def quack(module: str) -> Any:
    """`quack.module`, after `missing` has said None."""
    return importlib.import_module(f"quack.{module}")
