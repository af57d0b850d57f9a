"""The script of a SLURM array whose tasks share a study's points."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cllm.errors import EXIT_ELSEWHERE, EXIT_STOPPED
from cllm.study.schema import Study

_GRACE = 120
"""Seconds before the time limit at which a task gets SIGTERM, so that its run saves."""


def array_script(study: Study, command: Sequence[str], logs: Path) -> str:
    """The script for `sbatch`. A task that is stopped by its time limit, or by `--stop-after`, is queued again.

    A task that ends because others work on the rest is not, or it would start and end again until they are done.

    Args:
        study: its `slurm` section sets tasks, time and further lines.
        command: the words of `cllm study` that every task runs.
        logs: the folder of the tasks' output.
    """
    settings = study.slurm
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=study-{study.name}",
        f"#SBATCH --array=0-{settings.tasks - 1}",
        "#SBATCH --ntasks=1",
        "#SBATCH --gpus-per-task=1",
        f"#SBATCH --cpus-per-task={settings.cpus}",
        f"#SBATCH --time={settings.time}",
        f"#SBATCH --signal=B:TERM@{_GRACE}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={_quoted(f'{logs}/slurm-%A-%a.log')}",
        *(f"#SBATCH {option}" for option in settings.options),
        "# Every task takes points from the same queue; their files must be on storage that all tasks see.",
        *settings.setup,
        "study=",
        'trap \'if [ -n "$study" ]; then kill -TERM "$study"; fi\' TERM',
        f"{shlex.join(command)} &",
        "study=$!",
        'wait "$study"',
        "status=$?",
        'if [ "$status" -gt 128 ]; then wait "$study"; status=$?; fi  # a signal ends the first wait',
        f"# {EXIT_STOPPED}: time was up, and the same command goes on. "
        f"{EXIT_ELSEWHERE}: other tasks work on all that is left.",
        f'if [ "$status" -eq {EXIT_STOPPED} ]; then',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    """A path as sbatch reads it: in double quotes if it has spaces."""
    return f'"{path}"' if " " in path else path
