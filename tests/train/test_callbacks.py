"""`train.callbacks`: import paths and arguments, monitored metrics, early stops, and ModelCheckpoint."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from cllm.config import Config
from cllm.errors import UserError
from cllm.evaluate.comparison import compare
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train import checkpoints
from cllm.train.callbacks import TRAINING_TAGS
from cllm.train.measure import Metrics
from cllm.train.metrics import MetricsLog
from cllm.train.module import TrainingModule
from cllm.train.run import train

Tiny = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]
STOPPING = "{class: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, min_delta: 100, patience: %d}"
"""Stops after the first validation, which counts as an improvement, and `patience` more."""
CHECKPOINT = "{class: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/loss, save_top_k: 2}"
SHORT: tuple[str, ...] = ("--model.n_layers", "2", "--data.validation_sequences", "2", "--train.log_every", "2")
SHORT += ("--train.validate_every", "2", "--train.checkpoint_every", "3", "--train.keep_checkpoints", "9")
PACKAGE = """
from lightning.pytorch import Callback

class Seen(Callback):
    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, module):
        with open(self.file, "w") as file:
            file.write(str(trainer.global_step))

def function():
    pass
"""


def timeless(folder: RunFolder) -> list[dict[str, Any]]:
    timed = ("time", "throughput/", "memory/")
    return [{tag: v for tag, v in row.items() if not tag.startswith(timed)} for row in folder.metrics()]


def stopping(patience: int) -> tuple[str, str]:
    return "--train.callbacks", f"[{STOPPING % patience}]"


class Recorder(Callback):
    """Records what callbacks can monitor at each validation and each complete step."""

    monitor = "val/loss"

    def __init__(self) -> None:
        self.validations: list[tuple[int, dict[str, float]]] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            values = {tag: value.item() for tag, value in trainer.callback_metrics.items()}
            self.validations.append((trainer.global_step, values))


# ---- values ----------------------------------------------------------------------------------------------------------


def test_monitored_values_are_those_of_the_rows_and_change_nothing(tiny: Tiny) -> None:
    plain = train(tiny("--name", "plain", *SHORT))
    recorder = Recorder()
    folder = train(tiny("--name", "watched", *SHORT), callbacks=[recorder])
    rows = list(folder.metrics())
    wanted: dict[str, float] = {}
    expected = []
    for row in rows:
        wanted |= {tag: value for tag, value in row.items() if tag not in ("step", "tokens", "time")}
        if "val/loss" in row and row["step"]:
            expected.append((row["step"], dict(wanted)))
        elif "val/loss" in row:
            wanted.clear()  # Lightning forgets the values of the check before training
    assert recorder.validations == expected
    assert timeless(folder) == timeless(plain)
    found = read_weights(folder.checkpoints()[-1][1])
    for name, tensor in read_weights(plain.checkpoints()[-1][1]).items():
        assert torch.equal(tensor, found[name]), name


def test_training_rows_have_the_tags_that_can_be_monitored(tiny: Tiny) -> None:
    rows = [row for row in train(tiny("--train.steps", "1")).metrics() if "train/loss" in row]
    assert set(rows[-1]) - {"step", "tokens", "time"} == set(TRAINING_TAGS) - {"throughput/mfu"}


@pytest.mark.parametrize("kill", ["before the row", "after the row", "never"])
def test_a_resumed_run_shows_callbacks_the_validation_of_its_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    """A checkpoint is saved before its step is validated, so its callbacks' states lack that validation."""
    settings = (*SHORT, "--train.checkpoint_every", "2", "--train.log_every", "4", "--train.steps", "8")
    whole = Recorder()
    train(tiny("--name", "whole", *settings), callbacks=[whole])
    config = tiny("--name", "killed", *settings)
    original = MetricsLog.write

    class Killed(BaseException):
        pass

    def write(self: MetricsLog, step: int, values: dict[str, float]) -> None:
        if step == 6 and kill == "before the row":
            raise Killed
        original(self, step, values)
        if step == 6 and kill == "after the row":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", write)
        patched.setattr(Metrics, "close", lambda self: None)
        if kill == "never":
            train(tiny("--name", "killed", *settings, "--train.steps", "6", "--optim.schedule", "constant"))
            config = tiny("--name", "killed", *settings, "--optim.schedule", "constant")
        else:
            with pytest.raises(Killed):
                train(config)
    second = Recorder()
    train(config, resume="auto", callbacks=[second])
    assert [step for step, _ in second.validations] == [6, 8]
    if kill != "never":
        assert second.validations[0][1]["val/loss"] == whole.validations[2][1]["val/loss"]
        assert second.validations[0][1]["train/loss"] == whole.validations[2][1]["train/loss"]


# ---- early stops -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(load_file: Callable[[Path], ModuleType], tmp_path: Path) -> Callable[..., int]:
    script = load_file(ROOT / "train.py")

    def run(config: Config, *words: str) -> int:
        file = tmp_path / "command.yaml"
        file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
        return script.main(["--config", str(file), *words])

    return run


def test_an_early_stop_ends_like_a_finished_run(
    tiny: Tiny, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(*SHORT, *stopping(1))
    assert command(config) == 0
    assert "run finished early, after step 4 of 8: " in capsys.readouterr().out
    folder = RunFolder(Path(config.runs_dir) / config.name)
    assert [step for step, _ in folder.checkpoints()] == [3, 4], "the last step is saved"
    assert [row["step"] for row in folder.metrics() if "val/loss" in row] == [0, 2, 4]
    record = json.loads((folder.path / "early_stop.json").read_text())
    assert record["step"] == 4
    assert "EarlyStopping: Monitored metric val/loss did not improve in the last 1 records" in record["reason"]
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert command(config, "--resume", "auto") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before, "nothing is left to do"
    assert load_run(folder.path)[2] == 4
    assert "tiny: was ended early by a callback: its last row is of step 4 of 8" in compare([folder]).warnings


@pytest.mark.parametrize("every", ["2", "3"])
def test_after_an_early_stop_other_callbacks_go_on_as_if_they_had_always_been_there(tiny: Tiny, every: str) -> None:
    """Whether the last checkpoint was saved before (2) or after (3) the validation that stopped the run."""
    settings = (*SHORT, "--train.checkpoint_every", every)
    whole = train(tiny("--name", "whole", *settings, *stopping(2)))
    assert whole.early_stop() == 6
    assert train(tiny("--name", "parts", *settings, *stopping(1))).early_stop() == 4
    folder = train(tiny("--name", "parts", *settings, *stopping(2)), resume="auto")
    assert folder.early_stop() == 6
    assert timeless(folder) == timeless(whole)
    saved = [torch.load(run.checkpoint_path(6), weights_only=True) for run in (folder, whole)]
    for name, tensor in saved[0]["state_dict"].items():
        assert torch.equal(tensor, saved[1]["state_dict"][name]), name
    assert saved[0]["callbacks"] == saved[1]["callbacks"]
    assert saved[0]["lr_schedulers"] == saved[1]["lr_schedulers"]


def test_without_callbacks_a_stopped_run_goes_on_to_its_end(tiny: Tiny) -> None:
    plain = train(tiny("--name", "plain", *SHORT))
    train(tiny(*SHORT, *stopping(1)))
    folder = train(tiny(*SHORT), resume="auto")
    assert not folder.early_stop_file.exists()
    assert timeless(folder) == timeless(plain)


def test_a_stopped_run_goes_on_from_a_checkpoint_that_is_named(tiny: Tiny) -> None:
    config = tiny(*SHORT, *stopping(1))
    folder = train(config)
    train(config, resume=str(folder.checkpoint_path(4)))
    assert folder.early_stop() == 6, "until the next validation without an improvement"
    train(config, resume=str(folder.checkpoint_path(3)))
    assert folder.early_stop() == 4


@pytest.mark.parametrize("point", ["before it is saved", "after it is saved"])
def test_a_kill_in_an_early_stop_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    class Killed(BaseException):
        pass

    original = checkpoints.save_file

    def save(state: Any, file: Path) -> None:
        if "00000004" in file.name:
            if point == "after it is saved":
                original(state, file)
                file.rename(file.with_suffix(".ckpt"))
            raise Killed
        original(state, file)

    wanted = train(tiny("--name", "whole", *SHORT, *stopping(1)))
    config = tiny("--name", "killed", *SHORT, *stopping(1))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", save)
        patched.setattr(Metrics, "close", lambda self: None)
        with pytest.raises(Killed):
            train(config)
    folder = train(config, resume="auto")
    assert folder.early_stop() == 4
    assert timeless(folder) == timeless(wanted)
    assert [step for step, _ in folder.checkpoints()] == [3, 4]


def test_an_early_stop_without_checkpoints_saves_none(tiny: Tiny) -> None:
    config = tiny(*SHORT, *stopping(1), "--train.checkpoint_every", "null")
    folder = train(config)
    assert (folder.early_stop(), folder.checkpoints()) == (4, [])
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        train(config, resume="auto")


# ---- ModelCheckpoint -------------------------------------------------------------------------------------------------


def test_model_checkpoint_keeps_its_files_apart(tiny: Tiny) -> None:
    plain = train(tiny("--name", "plain", *SHORT))
    folder = train(tiny("--name", "watched", *SHORT, "--train.callbacks", f"[{CHECKPOINT}]"))
    names = [{file.name for file in run.checkpoint_folder.iterdir()} for run in (folder, plain)]
    assert names[0] == names[1]
    losses = {row["step"]: row["val/loss"] for row in folder.metrics() if "val/loss" in row and row["step"]}
    best = sorted(losses, key=losses.__getitem__)[:2]
    files = sorted((folder.path / "model_checkpoints").iterdir())
    assert [file.name for file in files] == sorted(f"epoch=0-step={step}.ckpt" for step in best)
    state = torch.load(folder.checkpoints()[-1][1], weights_only=True)["callbacks"]
    (scores,) = [value["best_k_models"] for key, value in state.items() if key.startswith("ModelCheckpoint")]
    assert all(score.item() in losses.values() for score in scores.values())


def test_model_checkpoint_of_a_resumed_run_has_the_same_files(tiny: Tiny) -> None:
    settings = (*SHORT, "--train.checkpoint_every", "2", "--train.callbacks", f"[{CHECKPOINT}]")
    whole = train(tiny("--name", "whole", *settings))
    config = tiny("--name", "parts", *settings)
    folder = train(config)
    train(config, resume=str(folder.checkpoint_path(4)))
    names = [sorted(f.name for f in (run.path / "model_checkpoints").iterdir()) for run in (whole, folder)]
    assert names[0] == names[1]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a callback on the import path; its import leaves a mark."""
    (tmp_path / "lib").mkdir()
    mark = tmp_path / "imported"
    source = f"open({str(mark)!r}, 'w').close()\n{PACKAGE}"
    (tmp_path / "lib" / "outside_callbacks.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "outside_callbacks", raising=False)
    return "outside_callbacks"


EARLY = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{class: no_such_package.Callback}",
            r"train\.callbacks\.0: no_such_package\.Callback cannot be imported: Mod",
        ),
        ("{class: lightning.pytorch.callbacks.EarlyStoping}", r'has no EarlyStoping; did you mean "EarlyStopping"\?'),
        ("outside_callbacks.function", r"outside_callbacks\.function is not a subclass of lightning\.pytorch's Callb"),
        (f"{{class: {EARLY}, monitor: val/loss, patient: 3}}", r"no argument 'patient'; did you mean \"patience\"\?"),
        (f"{{class: {EARLY}}}", r"EarlyStopping: missing a required argument: 'monitor'; its arguments: monitor, min"),
        (f"{{class: {EARLY}, monitor: val/loss, patience: '3'}}", r"patience is '3': input should be a valid integer"),
        (f"{{class: {EARLY}, monitor: val/loss, mode: least}}", r"EarlyStopping: Misconf.*`mode` can be min, max"),
        (f"{{class: {EARLY}, monitor: val_loss}}", r"EarlyStopping monitors 'val_loss'; allowed: val/loss, val/ppl"),
        (f"{{class: {EARLY}, monitor: train/loss}}", r"validate_every 4 is less than train\.log_every 5"),
        ("{class: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: RUN/checkpoints/best}", "belongs to the run"),
        (f"{STOPPING % 1}, {STOPPING % 2}", r"two callbacks EarlyStopping have the same state key"),
    ],
)
def test_callbacks_that_cannot_be_used_are_refused_before_a_folder_appears(
    tiny: Tiny, package: str, entry: str, message: str
) -> None:
    config = tiny()
    run = Path(config.runs_dir) / config.name
    config = tiny("--train.log_every", "5", "--train.callbacks", f"[{entry.replace('RUN', str(run))}]")
    with pytest.raises(UserError, match=message) as refused:
        train(config)
    assert "\n" not in str(refused.value)
    assert not run.exists()


def test_a_metric_of_validation_needs_validations(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"EarlyStopping monitors val/loss, but train\.validate_every is null"):
        train(tiny("--train.validate_every", "null", *stopping(1)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("callbacks", "early", r"train\.callbacks: is 'early'; allowed: a list of \{class: my_package"),
        ("callbacks", "[EarlyStopping]", r"entry 0 is 'EarlyStopping'; allowed: \{class: "),
        ("callbacks", "[{monitor: val/loss}]", r"entry 0 is \{'monitor': 'val/loss'\}; allowed: \{class"),
        ("callbacks", "[{class: 'os.system(1)'}]", r"entry 0 is .*; allowed: \{class"),
        ("loggers", "[csv, tensorbord]", r"entry 1 is 'tensorbord'; allowed: csv, mlflow, tensorboard, wandb, \{name"),
        ("loggers", "[{name: tensorbord}]", r"entry 0 is \{'name': 'tensorbord'\}; allowed: csv"),
    ],
)
def test_entries_of_another_form_are_refused_with_the_config(tiny: Tiny, key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(f"--train.{key}", value)


def test_only_training_imports_the_classes_of_a_config(tiny: Tiny, package: str, tmp_path: Path) -> None:
    """A run of somebody else may name any class; reading, loading, comparing and converting it must not import it."""
    folder = train(tiny("--train.steps", "1"))
    file = tmp_path / "seen"
    config = yaml.safe_load(folder.config_file.read_text())
    config["train"]["callbacks"] = [{"class": f"{package}.Seen", "file": str(file)}]
    config["train"]["loggers"] = [{"class": f"{package}.Logger"}]
    folder.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    read = load_run(folder.path)[1]
    assert read.train.callbacks == config["train"]["callbacks"]
    assert compare([folder])
    assert package not in sys.modules
    assert not (tmp_path / "imported").exists()
    train(tiny("--train.steps", "2", "--train.callbacks", f"[{{class: {package}.Seen, file: {file}}}]"), resume="auto")
    assert (tmp_path / "imported").exists()
    assert file.read_text() == "2"


def test_a_callback_that_needs_a_logger_is_one_line(tiny: Tiny) -> None:
    entry = "[{class: lightning.pytorch.callbacks.LearningRateMonitor}]"
    with pytest.raises(UserError, match="Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger"):
        train(tiny("--name", "alone", "--train.callbacks", entry))
    folder = train(tiny("--train.callbacks", entry, "--train.loggers", "[csv]"))
    assert (folder.path / "loggers" / "csv" / "version_0" / "metrics.csv").exists()


def test_values_that_are_not_finite_stop_a_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(self: TrainingModule) -> dict[str, tuple[float, int]]:
        return dict.fromkeys(self.validation_names, (math.nan, 1))

    monkeypatch.setattr(TrainingModule, "validation_scores", scores)
    assert train(tiny(*SHORT, *stopping(9))).early_stop() == 2
