"""The model that `init.from` names, and the student's config that follows from it.

It is a run, one of its checkpoints, a folder that cllm exported, or a checkpoint of a family that `cllm/hub/families`
reads; see `cllm/hub/kind.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.hub.open import open_config, open_weights
from cllm.model.sizes import model_d_ff
from cllm.plan.plan import KVPlan
from cllm.uptrain.decoder import TracedDecoder, build_traced

_LABEL = "init.from "
"""Precedes the path in messages."""
_STUDENTS_OWN = {"kv", "max_seq_len", "init"}
"""Keys of `model` in which a student may differ."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A trained decoder."""

    path: Path
    decoder: TracedDecoder

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config


def teacher_config(path: str | Path) -> ModelConfig:
    """The config of the model in `path`, with the width that `match_params` gave it. No weights are read.

    Raises:
        UserError: for a path that holds no model, or one that the decoder cannot compute.
    """
    config = open_config(path, label=_LABEL)
    if config.vocab_size is None:
        raise UserError(f"init.from {path}: its config does not say how many tokens the model has")
    return config.model_copy(update={"d_ff": model_d_ff(config), "match_params": False})


def load_teacher(path: str | Path, *, backend: str = "auto") -> Teacher:
    """The model in `path`, in fp32 on the CPU, in evaluation mode and frozen.

    Raises:
        UserError: as `teacher_config` does, and for weights that are missing, damaged or not the model's.
    """
    config = teacher_config(path)
    with torch.device("meta"):
        decoder = build_traced(config, backend=backend)
    decoder.load_state_dict(open_weights(path, label=_LABEL), assign=True)
    if config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    return Teacher(Path(path), decoder.eval().requires_grad_(False))


def student_model(teacher: ModelConfig, kv: Any, *, rope_pairs: str) -> dict[str, Any]:
    """The `model` section of a student as plain data: the teacher's, with the plan `kv`.

    RoPE keys of latents have R channels instead of D, with frequencies theta^(-2j/R). With the teacher's theta these
    are every (D/R)-th of the teacher's frequencies. With theta^(R/D) they are its R/2 highest. A student whose layers
    rotate as many channels as the teacher's, such as one with the teacher's own latents, keeps theta.

    Raises:
        UserError: if rope_pairs is high and layers that do not rotate what the teacher's do differ in R, or only some
            of them have latents.
    """
    data = {**teacher.model_dump(mode="json"), "kv": kv}
    size = teacher.resolved_head_dim
    rotated = _rotated(ModelConfig.model_validate(data).plan(), size)
    dims = set(rotated)
    if rope_pairs == "high" and rotated != _rotated(teacher.plan(), size) and dims != {size}:
        if len(dims) > 1:
            raise UserError(
                f"init.rope_pairs is high, but layers rotate {sorted(dims)} channels, and one rope.theta cannot give "
                "all of them the teacher's highest frequencies; allowed: uniform"
            )
        for key in ("theta", "windowed_theta"):
            if (theta := data["rope"][key]) is not None:
                data["rope"][key] = theta ** (rotated[0] / size)
    return data


def _rotated(plan: KVPlan, size: int) -> list[int]:
    """The channels that RoPE rotates in a head of each layer; `size` for heads of keys and values of any size."""
    sources = [plan.source(i) for i in range(len(plan))]
    return [size if source.is_plain else source.rope_dim(size) for source in sources]


def check_student(student: ModelConfig, teacher: ModelConfig, *, path: Path, rope_pairs: str) -> None:
    """Refuse a student whose shape is not the teacher's, or whose plan drops the teacher's windows.

    Raises:
        UserError: naming the key, both values and the teacher.
    """
    expected = student_model(teacher, student.model_dump(mode="json")["kv"], rope_pairs=rope_pairs)
    found = student.model_dump(mode="json")
    for key, value in found.items():
        same = value == expected[key]
        if key == "head_dim":
            same = student.resolved_head_dim == teacher.resolved_head_dim
        elif key == "d_ff":
            same = student.resolved_d_ff == teacher.resolved_d_ff
        if not same and key not in _STUDENTS_OWN:
            name, mine, needed = _difference(f"model.{key}", value, expected[key])
            keeps = key == "rope" and value == teacher.model_dump(mode="json")[key]
            uniform = ", or init.rope_pairs to uniform, which keeps the value" if keeps else ""
            raise UserError(
                f"{name} is {mine!r}, but the model that init.from names, {path}, needs {needed!r}: set it to that"
                f"{uniform}, or leave it out together with d_model, n_layers and n_heads, so that the student takes "
                "its shape from there"
            )
    if student.max_seq_len > teacher.max_seq_len:
        raise UserError(
            f"model.max_seq_len is {student.max_seq_len}; {path} was made for {teacher.max_seq_len} and no more"
        )
    _check_windows(student, teacher, path)


def _difference(name: str, mine: Any, needed: Any) -> tuple[str, Any, Any]:
    """The first key in which two values of `name` differ, with its value in each."""
    if isinstance(mine, dict) and isinstance(needed, dict):
        for key in mine:
            if mine[key] != needed.get(key):
                return _difference(f"{name}.{key}", mine[key], needed.get(key))
    return name, mine, needed


def _check_windows(student: ModelConfig, teacher: ModelConfig, path: Path) -> None:
    """Refuse a plan without windows if the teacher has windows shorter than the student's context."""
    if any(layer.window is not None for layer in student.plan().layers):
        return
    for i, layer in enumerate(teacher.plan().layers):
        if layer.window is not None and layer.window < student.max_seq_len:
            # A shorter context replaces a window, but not the RoPE base that goes with it.
            shorter = f", or set model.max_seq_len to {layer.window} or less"
            raise UserError(
                f"model.kv has no sliding window, but layer {i} of the model that init.from names, {path}, has one of "
                f"{layer.window} tokens; write the plan as model.kv.layers with `window: {layer.window}`"
                f"{shorter if teacher.rope.windowed_theta is None else ''}"
            )
