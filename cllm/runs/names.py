"""Names of checkpoints and of what is in them."""

from __future__ import annotations

import re
from pathlib import Path

from cllm.errors import UserError

WEIGHTS_FILE = "model.safetensors"
"""In a checkpoint folder: all weights of the decoder in fp32."""
TIED = "tied"
"""Metadata of that file: JSON, the further names of tensors that have several, {name: name in the file}."""
_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")


def is_named(path: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name. Raises `UserError` for another name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: not the name of a checkpoint, step-NNNNNNNN.ckpt")
    return int(match[1])
