"""What training may delete, and who may write to a run: nothing of anybody else's, and one process at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cllm.config import Config
from cllm.errors import UserError
from cllm.files import DELETING, MARK, marked_as
from cllm.lock import lock_file, locked
from cllm.runs import RUN, RunFolder
from cllm.train import run as run_module
from cllm.train.metrics import MetricsLog
from cllm.train.module import TrainingModule
from cllm.train.run import train

Tiny = Callable[..., Config]
SHORT = ("--train.steps", "4", "--train.checkpoint_every", "2")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder with its content, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def rows(folder: RunFolder) -> list[tuple[int, Any, Any]]:
    """Step, training loss and validation loss of every row."""
    return [(row["step"], row.get("train/loss"), row.get("val/loss")) for row in folder.metrics()]


# ---- what may be deleted --------------------------------------------------------------------------------------------


def thesis(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")


def strangers_config(folder: Path, config: Config) -> None:
    thesis(folder, config)
    (folder / "config.yaml").write_text("title: My site\nplugins: [search]\n")
    (folder / "summary.json").write_text("{}")


def config_alone(folder: Path, config: Config) -> None:
    thesis(folder, config)
    RunFolder(folder).write_config(run_module.with_vocabulary(config))


def without_config(folder: Path, config: Config) -> None:
    train(config)
    (folder / "config.yaml").unlink()


def without_config_and_checkpoints(folder: Path, config: Config) -> None:
    without_config(folder, config)
    shutil.rmtree(folder / "checkpoints")


def of_another_kind(folder: Path, config: Config) -> None:
    thesis(folder, config)
    (folder / MARK).write_text('{"kind": "export"}')


def a_file(folder: Path, config: Config) -> None:
    folder.parent.mkdir(parents=True)
    folder.touch()


def a_link(folder: Path, config: Config) -> None:
    thesis(folder.with_name("far"), config)
    folder.symlink_to("far")


FOREIGN = {
    thesis: "exists and is not a run: it has neither the mark of one",
    strangers_config: "exists and is not a run of cllm .*config.yaml: title: unknown key",
    config_alone: "exists, but is not a run of cllm: it has a config.yaml and no other file of a run",
    without_config: "holds checkpoints but no config.yaml",
    without_config_and_checkpoints: "holds metrics but no config.yaml",
    of_another_kind: "exists and is not a run",
    a_file: "it is a file, not a folder",
    a_link: "exists and is not a run",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{}, {"resume": "auto"}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(
    tiny: Tiny, make: Callable[[Path, Config], None], options: dict[str, Any]
) -> None:
    config = tiny("--train.steps", "1", "--train.validate_every", "null", "--train.checkpoint_every", "1")
    folder = Path(config.runs_dir) / config.name
    make(folder, config)
    before = snapshot(folder.parent)
    with pytest.raises(UserError, match=f"^{folder}: .*{FOREIGN[make]}"):
        train(config, **options)
    assert snapshot(folder.parent) == before


def test_the_command_line_refuses_such_a_folder_in_one_line(
    tiny: Tiny, tmp_path: Path, load_file: Callable[[Path], ModuleType], capsys: Any
) -> None:
    command, config = load_file(Path(__file__).resolve().parents[2] / "train.py"), tiny()
    thesis(Path(config.runs_dir) / "Documents", config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_yaml_data()))
    for word in ("--overwrite", "--resume=auto"):
        assert command.main(["--config", str(tmp_path / "config.yaml"), "--name", "Documents", word]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "Documents: exists and is not a run" in error


def test_a_run_is_marked_first_and_an_empty_folder_may_become_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(*SHORT)
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True)
    write_start = run_module.write_start

    def killed(*_: object) -> None:
        assert marked_as(folder) == RUN
        assert os.listdir(folder) == [MARK], "before anything else is written"
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_start", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(run_module, "write_start", write_start)
    assert train(config).checkpoints()[-1][0] == 4, "and what was begun only so far may begin again"


def test_a_run_from_before_there_were_marks_goes_on_and_is_not_deleted(tiny: Tiny) -> None:
    folder = train(tiny(*SHORT))
    folder.checkpoint_path(4).unlink()
    (folder.path / MARK).unlink()
    before = snapshot(folder.path)
    with pytest.raises(UserError, match=rf"is left alone: it has no file {re.escape(MARK)}"):
        train(tiny(*SHORT), overwrite=True)
    assert snapshot(folder.path) == before
    train(tiny(*SHORT), resume="auto")
    assert folder.checkpoints()[-1][0] == 4
    assert marked_as(folder.path) == RUN
    train(tiny(*SHORT), overwrite=True)

    (folder.path / MARK).unlink()
    shutil.rmtree(folder.checkpoint_folder)  # it would have to start afresh
    lines = folder.metrics_file.read_text().splitlines(keepends=True)
    folder.metrics_file.write_text("".join(line for line in lines if '"step": 4' not in line))
    before = snapshot(folder.path)
    with pytest.raises(UserError, match="is left alone"):
        train(tiny(*SHORT), resume="auto")
    assert snapshot(folder.path) == before


def test_a_run_whose_deletion_was_interrupted_is_deleted_to_the_end(tiny: Tiny) -> None:
    folder = train(tiny(*SHORT))
    (folder.path / MARK).rename(folder.path / DELETING)
    folder.config_file.unlink()
    shutil.rmtree(folder.tensorboard_folder)
    assert train(tiny(*SHORT)).checkpoints()[-1][0] == 4
    assert not (folder.path / DELETING).exists()


# ---- who may write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resume": "auto"}, {}, {"overwrite": True}], ids=["resume", "new", "overwrite"])
def test_a_second_process_of_a_run_is_refused_and_no_row_is_lost(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The second start comes between two steps of the first, before and after its first checkpoint."""
    undisturbed = rows(train(tiny("--name", "undisturbed", *SHORT)))
    config, refused, steps = tiny(*SHORT), [], iter(range(99))
    after_backward = TrainingModule.on_after_backward

    def start_another(self: TrainingModule) -> None:
        after_backward(self)
        if next(steps) in (2, 7):
            with pytest.raises(UserError) as error:
                train(config, **options)
            refused.append(str(error.value))

    monkeypatch.setattr(TrainingModule, "on_after_backward", start_another)
    folder = train(config)
    assert rows(folder) == undisturbed
    assert [step for step, _ in folder.checkpoints()] == [2, 4]
    assert len(refused) == 2
    assert all(f"{folder.path}: is in use by process {os.getpid()} on " in line for line in refused)
    assert not lock_file(folder.path).exists()


def test_a_run_that_begins_while_another_start_loads_is_not_replaced(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fresh starts at once: the second one comes before the first has made the folder."""
    refused: list[pytest.ExceptionInfo[UserError]] = []
    write_start = run_module.write_start

    def start_another(*arguments: Any) -> None:
        if not refused:
            with pytest.raises(UserError, match="is in use by process") as error:
                train(tiny(*SHORT))
            refused.append(error)
        write_start(*arguments)

    monkeypatch.setattr(run_module, "write_start", start_another)
    assert train(tiny(*SHORT)).checkpoints()[-1][0] == 4
    assert refused


def test_reading_a_live_run_is_allowed_and_others_of_its_launch_are_not_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tiny(*SHORT))
    with locked(folder.path):
        assert folder.config().name == "tiny"
        assert rows(folder)
        with pytest.raises(UserError, match="is in use"):
            train(tiny(*SHORT), resume="auto")
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        assert train(tiny(*SHORT), resume="auto") == folder, "the second device's process sees a finished run"
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        monkeypatch.setenv("NODE_RANK", "1")
        assert train(tiny(*SHORT), resume="auto") == folder, "the second machine's first process does too"


def test_a_refusal_leaves_no_lock(tiny: Tiny) -> None:
    config = tiny("--train.micro_batch", "4", "--train.devices", "3")
    with pytest.raises(UserError, match="global_batch"):
        train(config)
    assert not Path(config.runs_dir).exists()


def test_a_resumed_run_reports_that_its_rows_are_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    for start_step in (0, 4):
        folder.metrics_file.unlink(missing_ok=True)
        MetricsLog(folder, start_step=start_step, tokens_per_step=1).close()
        assert ("metrics.jsonl: missing; it begins again without the rows up to step 4" in caplog.text) == bool(
            start_step
        )
    caplog.clear()
    MetricsLog(folder, start_step=4, tokens_per_step=1).close()
    assert not caplog.text
