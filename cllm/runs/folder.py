"""A run on disk: its folder, its metrics, its checkpoints, and the trained model in it.

runs/NAME/
  .cllm                marks the folder as a run: only such a folder is ever deleted
  config.yaml          the resolved config; reusable as --config
  env.txt              versions, git commit, hardware
  metrics.jsonl        one row a log step: step, tokens, time, and tag: value
  companions/          if the run starts from a checkpoint (init.from): its tokenizer, templates, generation config
  summary.json         design, parameters, KV bytes: the part of the config that comparisons need
  data.json            digests of the manifests of the training and validation data
  best.json            with train.keep_best: the checkpoints with the lowest validation losses, best first
  early_stop.json      if a callback has ended the run before its last step: that step, and why
  loggers/             files of train.loggers
  model_checkpoints/   files of a ModelCheckpoint of Lightning in train.callbacks
  evaluation/SET.json  results of evaluate.py
  tensorboard/         events with the same tags as metrics.jsonl
  checkpoints/         step-00000500.ckpt ...; a folder under ZeRO, with model.safetensors and checksums.json in it
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cllm.config import Config
from cllm.config.load import load_settings
from cllm.errors import UserError
from cllm.files import MARK, inside, is_being_deleted, is_empty, marked_as, write_atomic
from cllm.rows import Row, read_rows, rows_backwards, rows_of_step
from cllm.runs.names import is_named, step_of
from cllm.trust import read_object

if TYPE_CHECKING:
    import torch

    from cllm.model.decoder import Decoder

# torch and the model are imported only to read weights: comparing runs needs neither.

log = logging.getLogger(__name__)

RUN = "run"
"""The mark of a run's folder, see `cllm/files.py`."""
_ASIDE, _DELETED, _PARTIAL = ".ckpt.set-aside", ".ckpt.deleted", ".partial"


@dataclass(frozen=True, slots=True)
class DataDigests:
    """`Manifest.digest()` of the data that a run uses."""

    train: str
    """Digest of the training folder; with `data.mix`, of the first."""
    validation: dict[str, str]
    """Digests of the folders of validation sets, by the name of the set, the main set first."""
    mix: dict[str, str] = field(default_factory=dict)
    """Digests of the folders of `data.mix`, by path; empty for a run on one folder."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder: the paths in it, and access to its files."""

    path: Path

    @classmethod
    def of(cls, path: str | Path) -> RunFolder:
        """The folder of a run, from its own path or that of one of its checkpoints; it need not exist."""
        path = Path(path)
        return cls(path.parent.parent if path.suffix == ".ckpt" else path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "env.txt"

    @property
    def picture_file(self) -> Path:
        """The KV plan."""
        return self.path / "plan.png"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def data_file(self) -> Path:
        return self.path / "data.json"

    @property
    def best_file(self) -> Path:
        return self.path / "best.json"

    @property
    def early_stop_file(self) -> Path:
        return self.path / "early_stop.json"

    @property
    def loggers_folder(self) -> Path:
        return self.path / "loggers"

    @property
    def evaluation_folder(self) -> Path:
        return self.path / "evaluation"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / "checkpoints"

    def check_links(self) -> None:
        """Refuse a run whose folders are links that leave it, since files behind them are not the run's.

        Raises:
            UserError: naming the link.
        """
        for folder in (self.checkpoint_folder, self.tensorboard_folder, self.evaluation_folder):
            inside(self.path, folder.name, written_in=self.path, to_write=True)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first."""
        return sorted((step_of(path), path) for path in self.checkpoint_folder.glob("step-*.ckpt") if is_named(path))

    def newest_checkpoint(self) -> Path | None:
        """The path of the newest checkpoint; None if there is no checkpoint."""
        return self.checkpoints()[-1][1] if self.checkpoints() else None

    step_of = staticmethod(step_of)

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoint_folder / f"step-{step:08d}.ckpt"

    def read_checkpoint(self, checkpoint: Path, model: Decoder, *, to_resume: bool = False) -> dict[str, torch.Tensor]:
        """The decoder's weights in one checkpoint, verified.

        Args:
            checkpoint: one of `checkpoints`.
            model: that of the run's config; only names and shapes of its tensors are used.
            to_resume: also verify what only training reads, such as optimizer states.

        Raises:
            UserError: for a checkpoint that is damaged, or of another program or model.
        """
        from cllm.runs.checkpoint import check_fits, check_resumable_file, read_weights

        weights = check_resumable_file(checkpoint) if to_resume else read_weights(checkpoint)
        check_fits(weights, model.state_dict(), checkpoint, self.config_file)
        return weights

    def newest_intact(
        self, model: Decoder, *, to_resume: bool = False
    ) -> tuple[int, Path, dict[str, torch.Tensor], list[str]]:
        """The newest checkpoint that `read_checkpoint` accepts.

        Returns:
            Its step, path and weights, and for each newer checkpoint the message of its fault.

        Raises:
            UserError: if there is no intact checkpoint.
        """
        damaged: list[str] = []
        for step, checkpoint in reversed(self.checkpoints()):
            try:
                return step, checkpoint, self.read_checkpoint(checkpoint, model, to_resume=to_resume), damaged
            except UserError as error:
                damaged.append(str(error))
        if not damaged:
            raise UserError(f"{self.checkpoint_folder}: holds no checkpoint yet")
        others = ", ".join(path.name for _, path in self.checkpoints()[-2::-1][:3])
        more = f"; nor is {others}" if others else ""
        raise UserError(f"{self.checkpoint_folder}: no checkpoint is intact: {damaged[0]}{more}")

    def set_aside_checkpoints(self, after: int) -> list[Path]:
        """Rename the checkpoints of steps later than `after`; returns their new paths.

        A run that resumes from step `after` drops later rows, and must not resume from later checkpoints either. They
        are deleted when the run saves their step again.
        """
        aside = []
        for step, path in self.checkpoints():
            if step > after:
                aside.append(path.with_suffix(_ASIDE))
                _delete(aside[-1])
                path.rename(aside[-1])
        return aside

    def remove_unfinished_checkpoints(self) -> None:
        """Delete partial checkpoints, left by a process that was killed while it saved or deleted one."""
        for suffix in (_PARTIAL, _DELETED):
            for path in self.checkpoint_folder.glob(f"step-*{suffix}"):
                _delete(path)

    def keep_checkpoints(self, newest: int, step: int, others: Collection[int] = ()) -> None:
        """Delete all checkpoints but the `newest` newest and those of the steps `others`.

        Those that were set aside up to `step` are deleted too.
        """
        old = [path for saved, path in self.checkpoints()[:-newest] if saved not in others]
        for path in self.checkpoint_folder.glob(f"*{_ASIDE}"):
            if step_of(path.with_suffix("")) <= step:
                old.append(path)
        for path in old:
            renamed = path.with_name(path.name.split(".")[0] + _DELETED)  # a partly deleted folder is no checkpoint
            path.rename(renamed)
            _delete(renamed)

    def config(self) -> Config:
        """The run's config. Raises `UserError` if the folder is not a run."""
        if not self.config_file.exists():
            raise UserError(f"{self.path}: not a run folder: it has no config.yaml")
        return load_settings(Config, [self.config_file])

    def write_config(self, config: Config) -> None:
        write_atomic(self.config_file, yaml.safe_dump(config.as_yaml_data(), sort_keys=False))

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`. Raises `UserError` if that is not a JSON object."""
        return read_object(self.summary_file)

    def environment(self) -> dict[str, str]:
        """The lines of `env.txt` by name; empty if it is missing or not text."""
        try:
            lines = self.environment_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def early_stop(self) -> int | None:
        """The step after which a callback has ended the run; None for a run that was not ended early.

        Raises:
            UserError: if `early_stop.json` cannot be read.
        """
        if not self.early_stop_file.exists():
            return None
        step = read_object(self.early_stop_file).get("step")
        if type(step) is not int:
            raise UserError(f"{self.early_stop_file}: step is {step!r}; allowed: a whole number")
        return step

    def data_digests(self) -> DataDigests | None:
        """Digests of the data that the run was trained and validated on; None if they were not recorded.

        Raises:
            UserError: if `data.json` cannot be read.
        """
        try:
            record = json.loads(self.data_file.read_bytes())
            return DataDigests(str(record["train"]), dict(record["validation"]), dict(record.get("mix", {})))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.data_file}: cannot be read: {error!r}") from None

    def write_data_digests(self, digests: DataDigests) -> None:
        """Write `data.json`."""
        record = {key: value for key, value in asdict(digests).items() if key != "mix" or value}
        write_atomic(self.data_file, json.dumps(record, indent=2) + "\n")

    def metrics(self) -> Iterator[Row]:
        """Rows of `metrics.jsonl`, read as a stream; a truncated last line, as after a crash, is skipped."""
        return read_rows(self.metrics_file)

    def last_step(self) -> int:
        """The step of the last row of metrics; 0 for a run without rows."""
        return next((row["step"] for _, row in rows_backwards(self.metrics_file)), 0)

    def is_validated_at(self, step: int) -> bool:
        """Whether the validation loss after `step` was logged."""
        return any("val/loss" in row for row in rows_of_step(self.metrics_file, step))


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_run_folder(folder: RunFolder) -> bool:
    """Whether `folder` holds a run; False if it is missing or empty, or its run was not fully written or deleted.

    Unmarked folders, from an older version, are runs if they have a run's config and metrics.

    Raises:
        UserError: if the folder holds something else, or a run without config.yaml.
    """
    path = folder.path
    if not os.path.lexists(path) or is_empty(path):
        return False
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder; choose another --name")
    marked = marked_as(path.resolve()) == RUN
    if marked and is_being_deleted(path.resolve()):
        return False
    if folder.config_file.exists():
        if not marked:
            if not (folder.summary_file.exists() or folder.metrics_file.exists()):
                raise UserError(
                    f"{path}: exists, but is not a run of cllm: it has a config.yaml and no other file of a run; "
                    "choose another --name"
                )
            try:
                folder.config()
            except UserError as error:
                raise UserError(f"{path}: exists and is not a run of cllm ({error}); choose another --name") from None
        return True
    if folder.checkpoints() or folder.metrics_file.exists():
        raise UserError(
            f"{path}: holds {'checkpoints' if folder.checkpoints() else 'metrics'} but no config.yaml, without which "
            "the run cannot go on, and it is not deleted either; put config.yaml back, or choose another --name"
        )
    if not marked:
        raise UserError(
            f"{path}: exists and is not a run: {'it is a symbolic link, and ' if path.is_symlink() else ''}it has "
            f"neither the mark of one ({MARK}) nor a config.yaml; choose another --name"
        )
    return False


def load_run(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Decoder, Config, int]:
    """The trained decoder of a run, its config and the step it was saved at.

    Args:
        path: a run folder (its newest intact checkpoint; damaged newer ones are logged) or one of its checkpoints.
        device: of the weights.

    Raises:
        UserError: for a folder that is not a run or has no intact checkpoint, and for a checkpoint that is damaged or
            does not fit the run's config.
    """
    from cllm.model.sizes import meta_decoder

    path = Path(path)
    is_checkpoint = path.suffix == ".ckpt"
    folder = RunFolder.of(path)
    step = folder.step_of(path) if is_checkpoint else 0
    config = folder.config()
    model = meta_decoder(config.model, backend=config.attention.backend)
    if is_checkpoint:
        weights = folder.read_checkpoint(path, model)
    else:
        step, checkpoint, weights, damaged = folder.newest_intact(model)
        for line in damaged:
            log.warning("%s; falling back to %s", line, checkpoint.name)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval(), config, step
