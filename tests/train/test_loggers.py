"""`train.loggers`: every logger gets every metric under its tag with its step, and the hyperparameters."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.train.loggers import ending_wandb
from cllm.train.run import train

Tiny = Callable[..., Config]
SHORT: tuple[str, ...] = ("--model.n_layers", "2", "--data.validation_sequences", "2", "--train.steps", "4")
SHORT += ("--train.validate_every", "2", "--train.checkpoint_every", "2", "--train.log_every", "2")
Points = dict[tuple[str, int], float]
"""Values by tag and step."""
MODULE = """
from lightning.pytorch.loggers import CSVLogger

class Shouting(CSVLogger):
    def log_metrics(self, metrics, step):
        super().log_metrics({tag.upper(): value for tag, value in metrics.items()}, step)
"""


def points(folder: RunFolder) -> Points:
    """All metrics of a run's record, with `tokens`."""
    return {
        (tag, row["step"]): value for row in folder.metrics() for tag, value in row.items() if tag not in _NOT_LOGGED
    }


_NOT_LOGGED = ("step", "time")


def timeless(values: Points) -> Points:
    timed = ("time", "throughput/", "memory/")
    return {key: value for key, value in values.items() if not key[0].startswith(timed)}


def read_csv(file: Path) -> Points:
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {
        (tag, int(row["step"])): float(value)
        for row in rows
        for tag, value in row.items()
        if value and tag not in _NOT_LOGGED
    }


def read_events(folder: Path) -> Points:
    board = EventAccumulator(str(folder))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag not in ("hp_metric", "hp/val_ppl")]
    return {(tag, event.step): event.value for tag in tags for event in board.Scalars(tag)}


def logged(tiny: Tiny, loggers: str, *settings: str) -> RunFolder:
    return train(tiny(*SHORT, "--train.loggers", loggers, *settings))


def test_loggers_write_into_the_runs_folder_and_leave_the_record_as_it_is(tiny: Tiny) -> None:
    plain = train(tiny("--name", "plain", *SHORT))
    folder = logged(tiny, "[csv, tensorboard]", "--name", "logged")
    assert timeless(points(folder)) == timeless(points(plain))
    assert timeless(read_events(folder.tensorboard_folder)) == timeless(read_events(plain.tensorboard_folder))
    assert len(list(folder.tensorboard_folder.iterdir())) == 1
    saved = [torch.load(run.checkpoints()[-1][1], weights_only=True) for run in (plain, folder)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0]["state_dict"].items():
        assert torch.equal(tensor, saved[1]["state_dict"][name]), name
    csv_folder, board_folder = (folder.path / "loggers" / name / "version_0" for name in ("csv", "tensorboard"))
    assert read_csv(csv_folder / "metrics.csv") == points(folder)
    assert read_events(board_folder) == pytest.approx(points(folder), rel=1e-6)
    for place in (csv_folder, board_folder):
        settings = yaml.safe_load((place / "hparams.yaml").read_text())
        assert (settings["optim.lr"], settings["design"]) == (1e-2, "mha"), place


def test_a_resumed_run_logs_its_own_steps_beside_the_earlier_ones(tiny: Tiny) -> None:
    logged(tiny, "[csv]")
    folder = train(tiny(*SHORT, "--train.loggers", "[csv]", "--train.steps", "6"), resume="auto")
    versions = [read_csv(folder.path / "loggers" / "csv" / f"version_{n}" / "metrics.csv") for n in (0, 1)]
    assert {step for _, step in versions[1]} == {6}
    assert versions[0] | versions[1] == points(folder)


def test_a_logger_by_its_import_path(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "outside_loggers.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    folder = logged(tiny, "[{class: outside_loggers.Shouting, name: mine, version: one}]")
    found = read_csv(folder.path / "loggers" / "mine" / "one" / "metrics.csv")
    assert found == {(tag.upper(), step): value for (tag, step), value in points(folder).items()}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: csv, folder: x}", r"train\.loggers\.1: CSVLogger has no argument 'folder'; "),
        ("{name: csv, flush_logs_every_n_steps: often}", r"flush_logs_every_n_steps is 'often': input should be a val"),
        ("lightning.pytorch.loggers.CometLoger", r'has no CometLoger; did you mean "CometLogger"\?'),
        ("lightning.pytorch.Trainer", r"lightning\.pytorch\.Trainer is not a subclass of lightning\.pytorch's Logger"),
        ("wandb", r"train\.loggers\.1: the logger wandb needs the package wandb: pip install wandb"),
        ("{name: mlflow}", r"train\.loggers\.1: the logger mlflow needs the package mlflow: pip install mlflow"),
    ],
)
def test_loggers_that_cannot_be_used_are_refused_before_a_folder_appears(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    find = importlib.util.find_spec
    missing = ("wandb", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in missing else find(name))
    config = tiny("--train.loggers", f"[csv, {entry}]")
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.runs_dir).exists()


def test_mlflow_with_a_local_store(tiny: Tiny) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    folder = logged(tiny, "[{name: mlflow, experiment_name: ours}]")
    client = MlflowClient(f"file:{(folder.path / 'loggers' / 'mlflow').resolve()}")
    experiment = client.get_experiment_by_name("ours")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert (run.data.params["optim.lr"], run.data.params["design"]) == ("0.01", "mha")
    tags = {tag for tag, _ in points(folder)}
    found = {(tag, m.step): m.value for tag in tags for m in client.get_metric_history(run.info.run_id, tag)}
    assert found == points(folder)


def read_wandb(file: Path) -> Iterator[bytes]:
    """The records of an offline run: a log in LevelDB's format, in blocks of 32 KiB, after a header of 7 bytes."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # an entire record, or its last part
            yield parts
            parts = b""


class Run:
    """A run of Weights & Biases that records its exit code."""

    code: int | None = None

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.mark.parametrize(
    ("active", "named", "fails", "code"), [(0, 1, 0, 0), (0, 1, 1, 1), (0, 0, 0, None), (1, 1, 0, None)]
)
def test_a_wandb_run_ends_with_the_training_that_began_it(
    active: bool, named: bool, fails: bool, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run()
    wandb = SimpleNamespace(run=run if active else None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    loggers = [WandbLogger.__new__(WandbLogger)] if named else []
    with contextlib.suppress(KeyError), ending_wandb(loggers):
        wandb.run = run
        if fails:
            raise KeyError
    assert run.code == code


def test_wandb_offline(tiny: Tiny) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("first", "second"):  # the second would join the run of the first
        folder = logged(tiny, "[{name: wandb, mode: offline, project: ours}]", "--name", name)
        assert wandb.run is None
    (file,) = (folder.path / "loggers" / "wandb").glob("offline-run-*/run-*.wandb")
    found: Points = {}
    settings: dict[str, Any] = {}
    for data in read_wandb(file):
        record = Record.FromString(data)
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("ours", "second")
        for source in (record.config, record.run.config):
            settings |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in source.update}
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        step = items.pop("trainer/global_step", None)
        found |= {(tag, step): value for tag, value in items.items() if not tag.startswith("_")}
    assert found == points(folder)
    assert (settings["optim.lr"], settings["design"]) == (1e-2, "mha")
