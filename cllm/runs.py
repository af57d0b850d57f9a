"""A run on disk: its folder, its metrics, its checkpoints, and the trained model in it.

runs/NAME/
  config.yaml          the resolved config; reusable as --config
  env.txt              versions, git commit, hardware
  metrics.jsonl        one row a log step: step, tokens, time, and tag: value
  summary.json         design, parameters, KV bytes: what the comparison needs of the config
  data.json            digests of the manifests of the training and validation data
  evaluation/SET.json  what evaluate.py measured
  tensorboard/         events with the same tags as metrics.jsonl
  checkpoints/         step-00000500.ckpt ...; a folder under ZeRO, with model.safetensors in it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from cllm import cli
from cllm.config import Config
from cllm.errors import UserError
from cllm.files import write_atomic
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder

_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")
_PREFIX = "model."
WEIGHTS_FILE = "model.safetensors"
"""In a checkpoint folder: the decoder's whole weights in fp32."""
TIED = "tied"
"""Metadata of that file: JSON, the further names of tensors that have several, {name: name in the file}."""


@dataclass(frozen=True, slots=True)
class DataDigests:
    """`Manifest.digest()` of the data that a run uses."""

    train: str
    """Of the training folder."""
    validation: dict[str, str]
    """Of each validation set's folder by the set's name, the main set first."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder, and reading what is there."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

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
    def evaluation_folder(self) -> Path:
        return self.path / "evaluation"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first."""
        found = [(m, p) for p in self.checkpoint_folder.glob("step-*.ckpt") if (m := _CHECKPOINT.fullmatch(p.name))]
        return sorted((int(match[1]), path) for match, path in found)

    def newest_checkpoint(self) -> Path | None:
        """The path of the newest checkpoint, or None where there is none."""
        return self.checkpoints()[-1][1] if self.checkpoints() else None

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """The step in a checkpoint's name. Raises `UserError` for another name."""
        match = _CHECKPOINT.fullmatch(checkpoint.name)
        if match is None:
            raise UserError(f"{checkpoint}: not the name of a checkpoint, step-NNNNNNNN.ckpt")
        return int(match[1])

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoint_folder / f"step-{step:08d}.ckpt"

    def config(self) -> Config:
        """The run's config. Raises `UserError` where the folder is no run."""
        if not self.config_file.exists():
            raise UserError(f"{self.path}: not a run folder: it has no config.yaml")
        return cli.load(Config, [self.config_file])

    def write_config(self, config: Config) -> None:
        write_atomic(self.config_file, yaml.safe_dump(config.as_yaml_data(), sort_keys=False))

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        try:
            return json.loads(self.summary_file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{self.summary_file}: cannot be read: {error}") from None

    def data_digests(self) -> DataDigests | None:
        """Digests of the data that the run was trained and validated on; None for runs that did not record them.

        Raises:
            UserError: when `data.json` cannot be read.
        """
        try:
            record = json.loads(self.data_file.read_bytes())
            return DataDigests(train=str(record["train"]), validation=dict(record["validation"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.data_file}: cannot be read: {error!r}") from None

    def write_data_digests(self, digests: DataDigests) -> None:
        """Write `data.json`."""
        write_atomic(self.data_file, json.dumps(asdict(digests), indent=2) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Rows of `metrics.jsonl`; a last line cut off by a crash is left out."""
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise UserError(f"{self.metrics_file} line {number}: not valid JSON") from None


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The decoder's tensors in a training checkpoint, a file or ZeRO's folder, on the CPU.

    Nothing is unpickled but tensors and plain data; of a folder only the safetensors are read.

    Raises:
        UserError: for what is missing or not readable.
    """
    if checkpoint.is_dir():
        return _read_whole_weights(checkpoint / WEIGHTS_FILE)
    try:
        data = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        state = data["state_dict"]
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no such checkpoint") from None
    except Exception as error:
        raise UserError(f"{checkpoint}: not a readable checkpoint: {error}") from None
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}


def _read_whole_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            tied = json.loads((stored.metadata() or {}).get(TIED, "{}"))
        return weights | {name: weights[other] for name, other in tied.items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not readable: {error}") from None


def load_run(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Decoder, Config, int]:
    """The trained decoder of a run, its config and the step it was saved at.

    Args:
        path: a run folder (its newest checkpoint) or one of its checkpoints.
        device: where the weights go.

    Raises:
        UserError: for a folder that is no run, has no checkpoint, or whose weights do not fit its config.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        folder, step, checkpoint = RunFolder(path.parent.parent), RunFolder.step_of(path), path
    else:
        folder = RunFolder(path)
        folder.config()
        if not folder.checkpoints():
            raise UserError(f"{folder.checkpoint_folder}: holds no checkpoint yet")
        step, checkpoint = folder.checkpoints()[-1]
    config = folder.config()
    with torch.device("meta"):
        model = build_decoder(config.model, backend=config.attention.backend)
    try:
        model.load_state_dict(read_weights(checkpoint), assign=True)
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: does not fit {folder.config_file}: {error}") from None
    return model.to(device).eval(), config, step
