"""Cases of the scaling benchmark: a model under a strategy on a number of this machine's GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cllm.config import Config
from cllm.errors import UserError
from cllm.section import Section
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[2]


class Group(Section):
    """Runs to compare: one model and number of steps, several strategies and numbers of GPUs."""

    name: str = Field(pattern=r"[a-z0-9-]+")
    config: list[str] = Field(min_length=1)
    """YAML files, relative to the project's root."""
    settings: list[str] = Field(default_factory=list)
    """Settings as on the command line of train.py."""
    runs: list[str] = Field(min_length=1)
    """STRATEGY:DEVICES, or STRATEGY:DEVICES:MICRO_BATCH to replace the config's micro-batch."""
    steps: int = Field(40, ge=1)
    log_every: int = Field(5, ge=1)
    skip_rows: int = Field(2, ge=0)
    """First rows of metrics to leave out, in which blocks compile."""
    micro_batches: int | None = Field(None, ge=1)
    """Micro-batches of a step on each device. None: `train.global_batch` is as configured, so that all runs take the
    same steps and their losses can be compared."""
    data: Literal["random", "text"] = "random"


class Cases(Section):
    """The content of a file such as node.yaml."""

    groups: list[Group] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a group."""

    group: Group
    number: int
    """From 1, in the group's order. It is part of the name because a group may have the same case two times."""
    strategy: str
    devices: int
    micro_batch: int | None = None

    @property
    def name(self) -> str:
        return f"{self.group.name}-{self.number}-{self.strategy}-x{self.devices}"


def parse_case(group: Group, number: int, word: str) -> Case:
    """`zero1:2` as a `Case`. Raises `UserError` for another form; the config checks whether the strategy exists."""
    match = re.fullmatch(r"([a-z0-9]+):([1-9][0-9]*)(?::([1-9][0-9]*))?", word)
    if match is None:
        raise UserError(f"runs: {word}: not of the form STRATEGY:DEVICES[:MICRO_BATCH], as in zero1:2")
    return Case(group, number, match[1], int(match[2]), int(match[3]) if match[3] else None)


def cases_of(groups: Iterable[Group], devices: int) -> list[Case]:
    """The cases that fit on `devices` GPUs, in their order."""
    cases = [parse_case(group, n, word) for group in groups for n, word in enumerate(group.runs, start=1)]
    return [case for case in cases if case.devices <= devices]


def load_case(case: Case, overrides: list[str], *, runs_dir: Path, data: Path, profiled: int) -> Config:
    """The config of a case's run. `profiled` steps are added to those that are timed.

    Raises:
        UserError: for invalid settings.
    """
    group = case.group
    files = [ROOT / file for file in group.config]
    base = load_config(files, [*group.settings, *overrides])
    micro_batch = case.micro_batch or base.train.micro_batch
    values: dict[str, Any] = {
        "name": case.name,
        "runs_dir": runs_dir,
        "data.path": data,
        "train.strategy": case.strategy,
        "train.devices": case.devices,
        "train.micro_batch": micro_batch,
        "train.steps": group.steps + profiled,
        "optim.warmup_steps": min(base.optim.warmup(group.steps), group.steps),
        "train.log_every": group.log_every,
        "train.validate_every": "null",
        "train.checkpoint_every": "null",
    }
    if group.micro_batches is not None:
        values["train.global_batch"] = micro_batch * case.devices * group.micro_batches
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return load_config(files, [*group.settings, *overrides, *words])
