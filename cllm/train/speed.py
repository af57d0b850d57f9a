"""The speed of an earlier run like a planned one, from which the dry run computes hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config import Config
from cllm.environment import environment
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.runs.speed import median_speed

_MOST_RUNS = 200
"""Runs that are looked at, newest first."""
_ANY = {"steps", "seed", "max_skipped_steps", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"}
_ANY |= {"keep_best", "loggers", "callbacks"}
"""Settings of `train` that the speed does not depend on."""
_HARDWARE = ("gpus", "cpus")
"""Lines of env.txt, the first that there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Training tokens a second on all devices together."""

    tokens_per_second: float
    source: str = ""
    """The run that it was measured in; empty for a given one."""


def earlier_speed(config: Config) -> Speed | None:
    """The median speed of the newest run in `runs_dir` with the same model and step on the same hardware, if any."""
    wanted, here = _decisive(config), _hardware(environment())
    files = sorted(Path(config.runs_dir).glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[:_MOST_RUNS]:
        run = RunFolder(file.parent)
        try:
            if _hardware(run.environment()) != here or _decisive(run.config()) != wanted:
                continue
            speed = median_speed(row.get("throughput/tokens_per_s") for row in run.metrics())
        except (OSError, UserError):
            continue  # not a run that can be read
        if speed is not None:
            return Speed(tokens_per_second=speed, source=str(run.path))
    return None


def _decisive(config: Config) -> dict[str, Any]:
    """The settings that the speed depends on."""
    data = config.model_dump(mode="json")
    train = {key: value for key, value in data["train"].items() if key not in _ANY}
    parts = {key: data[key] for key in ("model", "attention")} | {"train": train}
    return parts | {"seq_len": config.data.seq_len, "optimizer": config.optim.name, "uptrain": data["uptrain"]}


def _hardware(facts: dict[str, str]) -> tuple[str, str] | None:
    return next(((name, facts[name]) for name in _HARDWARE if name in facts), None)
