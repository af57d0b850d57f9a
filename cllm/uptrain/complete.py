"""The settings of a run that starts from another model: keys that `model` lacks are taken from that model.

This is a step of loading a config, not a part of its schema, because it reads another folder and imports torch. A
config with the model's shape, such as every config.yaml of a run, is used as it is, and neither happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cllm.config import Config
from cllm.config.load import Origin, load_settings
from cllm.errors import UserError

_REQUIRED = ("d_model", "n_layers", "n_heads")
"""Keys of `model` without defaults."""


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The config of YAML `files` and command-line `overrides`, `model` completed from `init.from`.

    Raises:
        UserError: as `load_settings` does, and for an `init.from` that holds no model.
    """
    return load_settings(Config, files, overrides, complete=complete)


def complete(data: dict[str, Any]) -> tuple[dict[str, Any], Origin]:
    """A config's plain data with `model` filled in from the model that `init.from` names, if `model` has no shape.

    Returns:
        The completed data, and the origin of keys of `model` that no file gives.

    Raises:
        UserError: if neither `model` nor `init.from` gives a shape, or `init.from` holds no model.
    """
    init, model = data.get("init") or {}, data.get("model") or {}
    path = init.get("from") if isinstance(init, dict) else None
    origin: Origin = (
        {("model", key): f"init.from {path}" for key in ("d_model", "n_layers", "n_heads", "head_dim")} if path else {}
    )
    if not isinstance(model, dict) or all(key in model for key in _REQUIRED):
        return data, origin
    if path is None and init:
        raise UserError(
            f"init.from is null, but init: is set and model.{next(key for key in _REQUIRED if key not in model)} is "
            "missing; name the model to start from (--init.from PATH)"
        )
    if not isinstance(path, str):
        return data, origin
    from cllm.uptrain.teacher import student_model, teacher_config  # torch, which other configs do not need

    teacher = teacher_config(path)
    student = teacher.model_dump(mode="json")
    kv = model.get("kv", student["kv"])
    # Validation of the settings refuses a plan that does not fit the model, and names key and file.
    with contextlib.suppress(ValidationError):
        student = student_model(teacher, kv, rope_pairs=init.get("rope_pairs", "high"))
    return {**data, "model": {**student, **model}}, origin
