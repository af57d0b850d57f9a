"""Loggers of Lightning that a config names: `train.loggers`.

They are checked before anything is written, and built when the run's folder is there, because some of them write files
at once.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.train.imports import check_arguments, construct, import_class, split_entry
from cllm.train.launch import is_first_process

KNOWN: dict[str, type[Logger]] = {
    "csv": lightning_loggers.CSVLogger,
    "mlflow": lightning_loggers.MLFlowLogger,
    "tensorboard": lightning_loggers.TensorBoardLogger,
    "wandb": lightning_loggers.WandbLogger,
}
"""Loggers by the names that `train.loggers` takes."""
_PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}
"""Packages that cllm does not install."""


@dataclass(frozen=True, slots=True)
class LoggerPlan:
    """A logger whose class exists and takes the arguments."""

    cls: type[Logger]
    arguments: dict[str, Any]
    key: str
    """Where the config names it."""


def plan_loggers(config: Config, folder: RunFolder) -> list[LoggerPlan]:
    """The loggers of `train.loggers`, checked. Nothing is written.

    Files go to `loggers/` in the run's folder, unless the arguments say otherwise.

    Raises:
        UserError: for a package that is not installed, an import path without a logger, and arguments that do not fit.
    """
    plans = []
    for n, entry in enumerate(config.train.loggers):
        key = f"train.loggers.{n}"
        path, arguments = split_entry(entry)
        name = path or str(arguments.pop("name"))
        if name in KNOWN:
            package = _PACKAGES.get(name)
            if package is not None and importlib.util.find_spec(package) is None:
                raise UserError(f"{key}: the logger {name} needs the package {package}: pip install {package}")
            cls, arguments = KNOWN[name], _defaults(name, folder) | arguments
        else:
            cls = import_class(name, Logger, key)
            if "save_dir" in inspect.signature(cls).parameters:
                arguments = {"save_dir": str(folder.loggers_folder)} | arguments
        check_arguments(cls, arguments, key)
        plans.append(LoggerPlan(cls, arguments, key))
    return plans


def _defaults(name: str, folder: RunFolder) -> dict[str, Any]:
    """Arguments that put a logger's files into the run's folder and give its run the same name."""
    place = folder.loggers_folder.resolve()
    if name == "wandb":
        return {"save_dir": str(place), "name": folder.name}
    if name == "mlflow":
        return {"save_dir": str(place / name), "run_name": folder.name}
    return {"save_dir": str(place), "name": name}


def make_loggers(config: Config, folder: RunFolder) -> list[Logger]:
    """Build the loggers of `train.loggers`, on other processes than the first as ones that do nothing.

    Raises:
        UserError: as `plan_loggers`, and for whatever a constructor raises.
    """
    plans = plan_loggers(config, folder)
    if not is_first_process():
        return [DummyLogger() for _ in plans]
    if any(issubclass(plan.cls, lightning_loggers.MLFlowLogger) for plan in plans):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 refuses folders otherwise
    if plans:
        folder.loggers_folder.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if it is missing
    return [construct(plan.cls, plan.arguments, plan.key) for plan in plans]


@contextmanager
def ending_wandb(loggers: Sequence[Logger]) -> Iterator[None]:
    """If one of `loggers` is that of Weights & Biases, end the run that it begins inside of this context.

    A process has one active run, and Lightning's logger joins it: the metrics of the next training in this process, as
    in a notebook, would go to the same run. A run that was active before stays so.
    """
    before = _wandb_run()
    status = 1
    try:
        yield
        status = 0
    finally:
        run = _wandb_run()
        ours = any(isinstance(logger, lightning_loggers.WandbLogger) for logger in loggers)
        if ours and before is None and run is not None:
            run.finish(exit_code=status)


def _wandb_run() -> Any:
    """The active run of Weights & Biases in this process, or None."""
    return getattr(sys.modules.get("wandb"), "run", None)
