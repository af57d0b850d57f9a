"""The model that `init.from` names, and what the student's config takes from it.

A path is a run folder of this project or one of its checkpoints, a Hugging Face folder that `cllm/hub` exported, or one
of the families that `cllm/hub/families` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.sizes import model_d_ff
from cllm.trust import check_model_folder, read_object
from cllm.uptrain.decoder import TracedDecoder, build_traced

_STUDENTS_OWN = {"kv", "max_seq_len", "init"}
"""Keys of `model` that a student may set as it likes."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A trained decoder."""

    path: Path
    decoder: TracedDecoder

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config


def _kind(path: Path) -> str:
    """`run`, `export` or `family`. Raises `UserError` where `path` is none of them."""
    if not path.exists():
        raise UserError(f"init.from {path}: no such run, checkpoint or Hugging Face folder")
    if path.suffix == ".ckpt" or (path / "config.yaml").exists():
        return "run"
    file = path / "config.json"
    model_type = read_object(file).get("model_type") if file.exists() else None
    if model_type is None:
        raise UserError(
            f"init.from {path}: neither a run (it has no config.yaml), nor a checkpoint (.ckpt), nor a Hugging Face "
            "folder (it has no config.json with a model_type)"
        )
    return "export" if model_type == "cllm" else "family"


def teacher_config(path: str | Path) -> ModelConfig:
    """The config of the model in `path`, no weights read: `match_params` replaced by the width it led to.

    Raises:
        UserError: for a path that holds no model, or one that the decoder cannot compute.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "run":
        from cllm.runs import RunFolder

        config = RunFolder(path.parent.parent if path.suffix == ".ckpt" else path).config().model
    elif kind == "export":
        from cllm.hub.config import CLLMConfig

        check_model_folder(path)
        try:
            config = CLLMConfig.from_dict(read_object(path / "config.json")).model_config
        except UserError as error:
            raise UserError(f"init.from {path}: {error}") from None
    else:
        from cllm.hub.families import read_family

        config = read_family(path).config
    if config.vocab_size is None:
        raise UserError(f"init.from {path}: its config does not say how many tokens the model has")
    return config.model_copy(update={"d_ff": model_d_ff(config), "match_params": False})


def load_teacher(path: str | Path, *, backend: str = "auto") -> Teacher:
    """The model in `path`, in fp32 on the CPU, in evaluation mode and frozen.

    Raises:
        UserError: as `teacher_config` does, and for weights that are missing, damaged or not the model's.
    """
    path = Path(path)
    config, kind = teacher_config(path), _kind(path)
    with torch.device("meta"):
        decoder = build_traced(config, backend=backend)
    if kind == "run":
        from cllm.runs import load_run

        state = load_run(path)[0].state_dict()
    elif kind == "export":
        from cllm.hub.loading import load_exported

        try:
            state = load_exported(path, dtype=torch.float32).model.state_dict()
        except UserError as error:
            raise UserError(f"init.from {path}: its weights cannot be read: {error}") from None
    else:
        from cllm.hub.families import load_family

        state = load_family(path, torch.float32)[1]
    decoder.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    return Teacher(path, decoder.eval().requires_grad_(False))


def student_model(teacher: ModelConfig, kv: Any, *, rope_pairs: str) -> dict[str, Any]:
    """The `model` section of a student: the teacher's with the plan `kv`, as plain data.

    RoPE keys of latents have R channels instead of D. Their frequencies are theta^(-2j/R): with the teacher's theta
    every (D/R)-th of the teacher's, evenly spaced. With theta^(R/D) they are the teacher's first, highest ones.

    Raises:
        UserError: where rope_pairs cannot be had: layers whose latents differ in R, or layers with and without latents.
    """
    data = {**teacher.model_dump(mode="json"), "kv": kv}
    plan = ModelConfig.model_validate(data).plan()
    dims = {plan.source(i).rope_dim(teacher.resolved_head_dim) for i in range(len(plan))}
    if rope_pairs == "high" and dims != {teacher.resolved_head_dim}:
        if len(dims) > 1:
            raise UserError(
                f"init.rope_pairs is high, but layers rotate {sorted(dims)} channels, and one rope.theta cannot give "
                "all of them the teacher's highest frequencies; allowed: uniform"
            )
        data["rope"]["theta"] = teacher.rope.theta ** (dims.pop() / teacher.resolved_head_dim)
    return data


def check_student(student: ModelConfig, teacher: ModelConfig, *, path: Path, rope_pairs: str) -> None:
    """Refuse a student whose shape is not the teacher's, or whose plan drops its windows unsaid.

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
            raise UserError(
                f"model.{key} is {value!r}, but the model that init.from names, {path}, needs {expected[key]!r}: leave "
                "it out; the student takes its shape from there"
            )
    if student.max_seq_len > teacher.max_seq_len:
        raise UserError(
            f"model.max_seq_len is {student.max_seq_len}; {path} was made for {teacher.max_seq_len} and no more"
        )
    _check_windows(student, teacher, path)


def _check_windows(student: ModelConfig, teacher: ModelConfig, path: Path) -> None:
    """Refuse a student whose plan says nothing of windows, where the teacher has some that its context exceeds."""
    if any(layer.window is not None for layer in student.plan().layers):
        return
    for i, layer in enumerate(teacher.plan().layers):
        if layer.window is not None and layer.window < student.max_seq_len:
            raise UserError(
                f"model.kv has no sliding window, but layer {i} of the model that init.from names, {path}, has one of "
                f"{layer.window} tokens; write the plan as model.kv.layers with `window: {layer.window}`, or set "
                f"model.max_seq_len to {layer.window} or less"
            )
