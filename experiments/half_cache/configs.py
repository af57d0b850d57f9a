"""The configs of students for train.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config import Config, ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.uptrain.teacher import student_model
from cllm.yaml_text import read_yaml
from experiments.half_cache.students import KINDS, RECIPES, ROOT, STARTS, Shape, Student

CONFIGS = ROOT / "configs" / "uptrain"
_RATE = {"half_rate": 0.5, "twice_rate": 2.0, "four_rate": 4.0}
_BATCH = {"half_batch": 0.5, "twice_batch": 2.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings that are equal in the configs of all students."""

    teacher: Path
    data: Path
    out: Path
    shape: Shape
    tokens: int
    gpu: bool
    validations: int
    """Validations of a run after its first."""
    overrides: dict[str, dict[str, Any]]
    """Values by section, such as `{"optim": {"lr": 1e-4}}`; None is left out."""


def student_data(student: Student, start: str, setting: Setting) -> dict[str, Any]:
    """A config of train.py as plain data: configs/uptrain/smollm2_to_KIND.yaml, or that of cla2 with another plan."""
    file = CONFIGS / f"smollm2_to_{student.kind}.yaml"
    file = file if file.exists() else CONFIGS / "smollm2_to_cla2.yaml"
    kind, config = KINDS[student.kind], read_yaml(file)
    config |= {"name": student.name, "runs_dir": str(setting.out / "runs")}
    config["model"] = {"kv": kind.plan(setting.shape)}
    kept = config["init"]
    config["init"] = {**STARTS[start], "from": str(setting.teacher)}
    if kind.fewer_heads:
        config["init"]["heads"] = "merge"
    reads_text = STARTS[start]["method"] != "copy" or kind.fewer_heads
    if reads_text:
        config["init"]["calibration_sequences"] = kept["calibration_sequences"]
    config["data"] |= {"path": str(setting.data), "num_workers": 1 if setting.gpu else 0}
    config["train"] |= {"accelerator": "gpu" if setting.gpu else "cpu", "devices": 1, "seed": student.seed}
    for section, values in setting.overrides.items():
        config[section] |= {key: value for key, value in values.items() if value is not None}
    if not reads_text:
        config["init"].pop("calibration_sequences", None)
    recipes = [name for name in student.recipes if student.kind != "control" or not RECIPES[name].curriculum]
    _apply(config, recipes)
    steps = max(setting.tokens // (config["train"]["global_batch"] * config["data"]["seq_len"]), 1)
    config["train"] |= {
        "steps": steps,
        "validate_every": max(steps // setting.validations, 1),
        "checkpoint_every": max(steps // setting.validations, 1),
        "keep_checkpoints": 1,
        "log_every": 10,
    }
    if curriculum := max((RECIPES[name].curriculum for name in recipes), default=0.0):
        config["uptrain"]["curriculum_steps"] = max(round(curriculum * steps), 1)
    config["optim"]["min_lr"] = config["optim"]["lr"] / 10
    longest = max((RECIPES[name].warmup for name in recipes), default=0.0)
    warmup = min(config["optim"]["warmup_steps"], max(steps // 10, 1))
    config["optim"]["warmup_steps"] = max(warmup, round(longest * steps))
    return config


def _apply(config: dict[str, Any], recipes: Sequence[str]) -> None:
    for name in recipes:
        for section, values in RECIPES[name].settings.items():
            merged = {**config[section], **values}
            if "loss" in values:
                merged["loss"] = {**config[section].get("loss", {}), **values["loss"]}
            config[section] = merged
        config["optim"]["lr"] *= _RATE.get(name, 1.0)
        for key in ("global_batch", "micro_batch"):
            config["train"][key] = max(round(config["train"][key] * _BATCH.get(name, 1.0)), 1)


def check_config(student: Student, data: Mapping[str, Any], teacher: ModelConfig) -> None:
    """Raise `UserError` if settings in the config of a student contradict each other."""
    try:
        model = student_model(teacher, data["model"]["kv"], rope_pairs="uniform")
        validate(Config, {**data, "model": model})
    except UserError as error:
        raise UserError(f"--students {student.name}: {error}") from None
