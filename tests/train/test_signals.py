"""Training under signals: saved, stopped, status 3; and started again from there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cllm.config import Config
from cllm.errors import EXIT_MISTAKE, EXIT_STOPPED
from cllm.runs import RunFolder
from cllm.train import run as run_module
from cllm.train.module import TrainingModule

Tiny = Callable[..., Config]
STEPS = ("--train.steps", "6", "--train.checkpoint_every", "null", "--train.validate_every", "null")


@pytest.fixture
def command(load_file: Callable[[Path], ModuleType], tmp_path: Path) -> Callable[..., int]:
    """`command(config, "--resume", "auto")`: train.py's exit status."""
    script = load_file(Path(__file__).resolve().parents[2] / "train.py")

    def run(config: Config, *words: str) -> int:
        file = tmp_path / "command.yaml"
        file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
        return script.main(["--config", str(file), *words])

    return run


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Call `do` in the midst of a step (from 1), after the backward of its first micro-batch of two."""
    backwards, after_backward = iter(range(99)), TrainingModule.on_after_backward

    def then(self: TrainingModule) -> None:
        after_backward(self)
        if next(backwards) == 2 * (step - 1):
            do()

    monkeypatch.setattr(TrainingModule, "on_after_backward", then)


def send(number: int, *, workers: bool = False) -> None:
    """A signal to this process, or to all of its group."""
    for process in multiprocessing.active_children() if workers else ():
        os.kill(process.pid or 0, number)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_the_status_is_3(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    config = tiny(*STEPS, "--data.num_workers", "1")
    at_step(monkeypatch, 3, lambda: send(number, workers=True))
    assert command(config) == EXIT_STOPPED
    folder = RunFolder(Path(config.runs_dir) / config.name)
    assert [step for step, _ in folder.checkpoints()] == [3]
    out, err = capsys.readouterr()
    assert out == f"run stopped at step 3 of 6: {folder.path}  (--resume auto goes on)\n"
    assert f"{signal.Signals(number).name}: saving after this step, then stopping" in err
    assert "Traceback" not in err
    assert command(config, "--resume", "auto") == 0
    assert folder.checkpoints()[-1][0] == 3, "checkpoint_every is null"
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_hangup_that_was_ignored_stays_ignored(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nohup python train.py ..."""
    monkeypatch.setattr(signal, "signal", signal.signal)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda: send(signal.SIGHUP))
        assert command(tiny(*STEPS)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_does_not_keep_a_run_from_saving(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to it is an error from then on, and the step under way still has a row to show."""
    master, slave = os.openpty()
    terminal = os.fdopen(slave, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)

    def close() -> None:
        os.close(master)
        with pytest.raises(OSError, match="Input/output"):
            os.write(slave, b"x")
        send(signal.SIGHUP)
        os.write(slave, b"goes nowhere")

    config = tiny(*STEPS)
    at_step(monkeypatch, 3, close)
    try:
        assert command(config) == EXIT_STOPPED
    finally:
        monkeypatch.undo()
        terminal.close()
    assert [step for step, _ in RunFolder(Path(config.runs_dir) / config.name).checkpoints()] == [3]


def check_interrupted_in_one_line(capsys: Any) -> None:
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("stopped by SIGINT; --resume auto goes on from the newest checkpoint")
    assert not any("Traceback" in line for line in lines)


def test_a_second_interrupt_ends_at_once_and_in_one_line(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = tiny(*STEPS)

    def interrupt_twice() -> None:
        for _ in range(2):
            send(signal.SIGINT)

    at_step(monkeypatch, 3, interrupt_twice)
    assert command(config) == EXIT_STOPPED
    assert RunFolder(Path(config.runs_dir) / config.name).checkpoints() == []
    check_interrupted_in_one_line(capsys)


def test_a_second_interrupt_that_a_library_replaces_by_an_error_ends_as_it_does(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As compiled code does, which drops what led to its error."""
    config = tiny(*STEPS)

    def interrupt_twice() -> None:
        send(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        raise ValueError("cannot be built: Interrupted: SIGINT")

    at_step(monkeypatch, 3, interrupt_twice)
    assert command(config) == EXIT_STOPPED
    check_interrupted_in_one_line(capsys)


def test_an_error_of_saving_after_a_signal_is_reported_as_such(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(trainer: Any, path: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    at_step(monkeypatch, 3, lambda: send(signal.SIGTERM))
    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", full)
    assert command(tiny(*STEPS)) == EXIT_MISTAKE
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert line.endswith("No space left on device; no checkpoint yet")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_the_first_step_loses_nothing(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    """A job that is requeued may get its signal while it still loads."""
    make = run_module.make_module

    def interrupted(*arguments: Any, **options: Any) -> Any:
        send(number)
        return make(*arguments, **options)

    config = tiny(*STEPS)
    monkeypatch.setattr(run_module, "make_module", interrupted)
    assert command(config) == EXIT_STOPPED
    assert capsys.readouterr().err.startswith(f"stopped by {signal.Signals(number).name}; --resume auto goes on")
    assert not Path(config.runs_dir).exists(), "its lock is given back"


def test_a_finished_run_that_lost_its_rows_is_finished(tiny: Tiny, command: Callable[..., int]) -> None:
    """A job that is requeued on status 3 would be requeued for ever."""
    config = tiny(*STEPS, "--train.checkpoint_every", "6")
    assert command(config) == 0
    (Path(config.runs_dir) / config.name / "metrics.jsonl").unlink()
    assert command(config, "--resume", "auto") == 0


def test_only_the_first_process_of_a_run_has_the_status(
    tiny: Tiny, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers kill the other processes as soon as one has a status that is not 0."""
    config = tiny(*STEPS)
    folder = RunFolder(Path(config.runs_dir) / config.name)
    monkeypatch.setattr(run_module, "train", lambda *_, **__: folder)
    monkeypatch.setattr(RunFolder, "checkpoints", lambda self: [(3, Path("step-00000003.ckpt"))])
    assert command(config) == EXIT_STOPPED
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert command(config) == 0
