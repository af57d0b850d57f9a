"""Default folders of results: in a run, next to runs, or in runs/; never in another folder of the user's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cllm.runs import RunFolder

RUNS = Path("runs")
"""The default folder of runs, in the working directory."""
RESULTS = ("comparison", "evaluation", "posthoc")
"""Names of folders that commands write next to runs."""


def run_of(path: str | Path) -> Path | None:
    """The run's folder of a run or one of its checkpoints; None for a Hugging Face folder."""
    run = RunFolder.of(path)
    return run.path if run.config_file.exists() else None


def without_results(paths: Sequence[str]) -> list[str]:
    """`paths` without the folders of results among them, which `runs/*` matches too."""
    return [path for path in paths if Path(path).name not in RESULTS or not Path(path).is_dir() or run_of(path)]


def beside(runs: Sequence[Path | None], name: str) -> Path:
    """The folder for results of several runs: `name` next to them.

    It is `runs/name` if they lie in different folders, or one of them is not a run (None).
    """
    parents = {None if run is None else run.resolve().parent for run in runs}
    parent = parents.pop() if len(parents) == 1 else None
    return (RUNS if parent is None else Path(os.path.relpath(parent))) / name


def results_of_checkpoint(folder: Path) -> Path:
    """The folder for results of a Hugging Face folder: `runs/evaluation/NAME-HASH`.

    The hash is that of the folder's path, since many such folders have the same name.
    """
    path = folder.resolve()
    return RUNS / "evaluation" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
