"""A run's folder at the start of training: which checkpoint to resume from, and the first files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config import Config
from cllm.environment import environment
from cllm.errors import UserError
from cllm.files import check_replaceable, write_atomic
from cllm.hub.companions import keep_companions
from cllm.model.decoder import Decoder
from cllm.plan.describe import plan_table
from cllm.plan.picture import plan_png
from cllm.runs import RUN, RunFolder, check_run_folder
from cllm.train.launch import is_first_process
from cllm.train.resume import check_intact, check_resumable, ended_early, lacks_validation, newest_intact
from cllm.train.schedule import check_warmup
from cllm.uptrain.student import with_saved_sources


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts."""

    config: Config
    """The run's config; a resumed run has the sources that it has chosen."""
    folder: RunFolder
    checkpoint: Path | None
    """To resume from; None for a new start."""
    step: int
    """The checkpoint's step; 0 without one."""
    validate: bool
    """Whether to validate before the first step, because a validation of the checkpoint's step was missed."""
    sources_chosen: bool
    """Whether `init.sources: best` has been applied to the config."""
    ended_early: bool = False
    """Whether a callback has ended the run after `step`."""

    @property
    def advice(self) -> str:
        """The end of the message about a finished run: how to go on with one that was ended early."""
        if not self.ended_early:
            return ""
        return "; a callback has ended it; to go on, change train.callbacks or train.steps, or --resume that checkpoint"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        steps = self.config.train.steps
        return self.ended_early or self.step > steps or (self.step == steps and not self.validate)


def find_start(config: Config, resume: str | None, overwrite: bool) -> Start:
    """Where a run of `config` starts, see `train` for the arguments. Nothing is written here.

    Raises:
        UserError: as `open_folder`, and for a new run that would end during its warm-up.
    """
    saved = None if resume is None else with_saved_sources(config, RunFolder(Path(config.runs_dir) / config.name))
    config = saved or config
    folder, checkpoint = open_folder(config, resume, overwrite)
    if checkpoint is None:
        check_warmup(config)
        return Start(config, folder, None, step=0, validate=False, sources_chosen=saved is not None)
    step = folder.step_of(checkpoint)
    validate = lacks_validation(config, folder, step)
    early = resume == "auto" and ended_early(config, folder, checkpoint)
    return Start(config, folder, checkpoint, step, validate, sources_chosen=saved is not None, ended_early=early)


def open_folder(config: Config, resume: str | None, overwrite: bool) -> tuple[RunFolder, Path | None]:
    """The run's folder, and the checkpoint to resume from or None for a new start. Nothing is written here.

    Raises:
        UserError: if the folder holds a run and neither `resume` nor `overwrite` is given, or both are; if it holds
            something else; if no checkpoint is intact; if the saved run is another one, or has finished without a
            checkpoint.
    """
    folder = RunFolder(Path(config.runs_dir) / config.name)
    folder.check_links()
    if resume is not None and overwrite:
        raise UserError(f"--resume {resume} goes on with a run and --overwrite replaces it; give one of them")
    # The first process may already have written to the folder when the others come here.
    if not is_first_process():
        return folder, _checkpoint_to_resume(config, folder, resume)
    has_run = check_run_folder(folder)
    if resume is None:
        if has_run and not overwrite:
            raise UserError(
                f"{folder.path} holds a run already; go on with --resume auto, replace it with --overwrite, or choose "
                "another --name"
            )
        check_replaceable(folder.path, RUN)
        return folder, None
    checkpoint = _checkpoint_to_resume(config, folder, resume)
    if checkpoint is not None:
        return folder, checkpoint
    if has_run:  # it ended before its first checkpoint and starts from the beginning
        check_resumable(config, folder)
        saved = folder.config().train
        ended = saved.checkpoint_every is None and folder.early_stop() is not None
        if ended or folder.last_step() >= saved.steps:
            raise UserError(
                f"{folder.path} holds a finished run without checkpoints, so that --resume auto would train it "
                "again; replace it with --overwrite, or choose another --name"
            )
    check_replaceable(folder.path, RUN)
    return folder, None


def _checkpoint_to_resume(config: Config, folder: RunFolder, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return newest_intact(config, folder)
    checkpoint = Path(resume)
    if not checkpoint.exists():
        raise UserError(f"--resume {resume}: no such checkpoint")
    if checkpoint.resolve().parent != folder.checkpoint_folder.resolve():
        raise UserError(f"--resume {resume}: not a checkpoint of {folder.path}")
    check_resumable(config, folder)
    check_intact(config, folder, checkpoint)
    return checkpoint


def write_start(config: Config, folder: RunFolder, model: Decoder, summary: dict[str, Any]) -> None:
    """Write the files of a run that do not depend on training: config, summary, environment, plan, tokenizer."""
    folder.checkpoint_folder.mkdir(parents=True, exist_ok=True)
    folder.write_config(config)
    write_atomic(folder.summary_file, json.dumps(summary, indent=2) + "\n")
    write_atomic(folder.environment_file, "".join(f"{k}: {v}\n" for k, v in environment().items()))
    write_atomic(folder.path / "plan.txt", plan_table(model.plan) + "\n")
    if config.init.path is not None:
        keep_companions(Path(config.init.path), folder.path, config.model.vocab_size or 0)
    write_atomic(folder.picture_file, plan_png(model.plan, f"{config.name}: {summary['design']}"))
