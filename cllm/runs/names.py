"""Names of checkpoints and of their files."""

from __future__ import annotations

import re
from pathlib import Path

from cllm.errors import UserError

WEIGHTS_FILE = "model.safetensors"
"""In a checkpoint folder: all weights of the decoder in fp32."""
TIED = "tied"
"""A metadata key of that file: JSON, the other names of tied tensors, {name: name in the file}."""
_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")


def is_named(path: Path) -> bool:
    """Whether the name of `path` is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name. Raises `UserError` for other names."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: not the name of a checkpoint, step-NNNNNNNN.ckpt")
    return int(match[1])
