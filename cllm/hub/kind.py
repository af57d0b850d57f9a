"""The kind of a path that a command is given: a run, a checkpoint, an exported folder, a foreign one, or nothing.

Every command that takes a model asks `identify`. torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.trust import read_object

MODEL_TYPE = "cllm"
"""The `model_type` that config.json has in folders that cllm writes."""


class Kind(StrEnum):
    """Kinds of paths."""

    RUN = "run"
    """The folder of a run: it has a config.yaml."""
    CHECKPOINT = "checkpoint"
    """A checkpoint of a run: `*.ckpt`, a file, or a folder under ZeRO."""
    EXPORT = "export"
    """A Hugging Face folder that cllm wrote."""
    FOREIGN = "foreign"
    """A Hugging Face folder of another `model_type`, such as `llama`."""
    NOTHING = "nothing"
    """The path does not exist, or holds no model."""

    @property
    def is_run(self) -> bool:
        """Whether the model is that of a run, at one of its checkpoints or the newest."""
        return self in (Kind.RUN, Kind.CHECKPOINT)


def identify(path: str | Path) -> Kind:
    """The kind of a path, from names and `model_type` alone.

    Raises:
        UserError: for a config.json that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return Kind.NOTHING
    if path.suffix == ".ckpt":
        return Kind.CHECKPOINT
    if (path / "config.yaml").exists():
        return Kind.RUN
    file = path / "config.json"
    config = read_object(file) if file.exists() else {}
    if config.get("model_type") is None:
        return Kind.NOTHING
    return Kind.EXPORT if is_export(config) else Kind.FOREIGN


def is_export(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a folder that cllm wrote."""
    return config.get("model_type") == MODEL_TYPE


def identify_model(path: str | Path, *, label: str = "") -> Kind:
    """As `identify`, for a path that has to hold a model; `label` precedes the path in messages, as `init.from ` does.

    Raises:
        UserError: if the path does not exist or holds no model.
    """
    kind = identify(path)
    if kind is not Kind.NOTHING:
        return kind
    if not Path(path).exists():
        raise UserError(f"{label}{path}: no such run, checkpoint or Hugging Face folder")
    raise UserError(
        f"{label}{path}: neither a run (it has no config.yaml), nor a checkpoint (.ckpt), nor a Hugging Face folder "
        "(it has no config.json with a model_type)"
    )
