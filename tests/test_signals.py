"""Commands that end by a signal, also if the code that it interrupts swallows the exception."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import SchemaValidator, core_schema

from cllm import signals
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.processes import received_signals
from cllm.signals import STOPPING, Interrupted, raise_if_stopped, raising, stoppable

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN", 0.05)


@pytest.fixture
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised again."""
    monkeypatch.setattr(signals, "AGAIN", 600.0)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def send(number: int) -> None:
    """Send this process a signal and wait for its exception."""
    os.kill(os.getpid(), number)
    wait(lambda: False)


def swallow(number: int) -> None:
    """A signal whose exception is lost, as in a destructor or in C code that clears errors."""
    with contextlib.suppress(KeyboardInterrupt):
        send(number)


@pytest.mark.parametrize("number", STOPPING)
def test_an_exception_that_is_swallowed_comes_again(number: signal.Signals) -> None:
    times = 0

    def swallow_three() -> None:
        nonlocal times
        with raising(*STOPPING):
            swallow(number)
            for times in (2, 3, 4):
                try:
                    wait(lambda: False)
                except KeyboardInterrupt:
                    if times == 4:
                        raise

    with pytest.raises(Interrupted) as error:
        swallow_three()
    assert times == 4
    assert error.value.number == number


def test_cleaning_up_is_not_interrupted_by_the_same_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = [0], []
    is_being_handled = signals._is_being_handled

    def counted() -> bool:
        asked[0] += 1
        return is_being_handled()

    def clean_up(name: str) -> None:
        """Takes so long that the signal is repeated three times."""
        before = asked[0]
        try:
            raise ValueError  # within another exception
        except ValueError:
            wait(lambda: asked[0] >= before + 3)
        done.append(name)

    def be_interrupted() -> None:
        with raising(signal.SIGTERM):
            try:
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    wait(lambda: False)
                finally:
                    clean_up("finally")
            except KeyboardInterrupt:
                clean_up("except")
                raise

    monkeypatch.setattr(signals, "_is_being_handled", counted)
    with pytest.raises(Interrupted):
        be_interrupted()
    assert done == ["finally", "except"]


def test_another_handler_gets_a_swallowed_signal_once() -> None:
    """A study, or a run that saves, would take a second one for a demand to end at once."""
    with raising(signal.SIGTERM):
        swallow(signal.SIGTERM)
        with received_signals() as received:
            wait(lambda: bool(received))
            time.sleep(0.5)  # ten times as long as it takes to repeat it
            assert received == [signal.SIGTERM]


def test_nothing_comes_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    for number in STOPPING:
        before = signal.getsignal(number)
        with raising(*STOPPING):
            swallow(number)
        time.sleep(0.2)  # four times as long as it takes to repeat it
        assert signal.getsignal(number) == before
    assert not unraisable


def test_a_signal_while_torch_imports_numpy_is_not_lost() -> None:
    """torch takes any error of that import for a missing NumPy, and goes on."""
    program = """
import os, signal, sys, time
from cllm.signals import stoppable

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())

@stoppable()
def main():
    import torch
    for _ in range(30000):
        time.sleep(0.01)

sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.stderr.splitlines()[-1] == "interrupted by SIGTERM"
    assert done.returncode == 128 + signal.SIGTERM


# ---- errors in place of the exception


class Panic(BaseException):
    """As Rust code raises it, for example."""


class Slow:
    """A value in whose description a signal comes."""

    def __init__(self, number: int):
        self.number = number

    def __repr__(self) -> str:
        send(self.number)
        return "slow"


def compiled(number: int) -> None:
    """pydantic's compiled code drops what led to its error."""
    SchemaValidator(core_schema.literal_schema([Slow(number)]))


def converted(number: int) -> None:
    try:
        send(number)
    except BaseException as error:
        raise UserError("cannot be imported") from error


def hidden(number: int) -> None:
    swallow(number)
    raise ImportError("no module")


def panicking(number: int) -> None:
    swallow(number)
    raise Panic("called `unwrap` on an error")


def plain(number: int) -> None:
    swallow(number)
    raise KeyboardInterrupt


def quoted_in_a_mistake(number: int) -> None:
    try:
        compiled(number)
    except Exception as error:
        raise UserError(f"--suite x: cannot be loaded: {error}") from None


def cleaning_up(number: int) -> None:
    try:
        send(number)
    finally:
        raise OSError(28, "No space left on device", "a/b")


REPLACED: list[tuple[Callable[[int], None], str]] = [
    (compiled, ""),
    (quoted_in_a_mistake, ""),
    (plain, ""),
    (converted, "; error that followed: cannot be imported"),
    (hidden, "; error that followed: ImportError: no module"),
    (panicking, "; error that followed: Panic: called `unwrap` on an error"),
    (cleaning_up, "; error that followed: a/b: cannot be written: No space left on device"),
]


@pytest.mark.usefixtures("_once")
@pytest.mark.parametrize(("replace", "end"), REPLACED, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_error_in_place_of_the_exception_is_the_stop(
    capsys: pytest.CaptureFixture[str], replace: Callable[[int], None], end: str, number: signal.Signals
) -> None:
    assert one_line(stoppable()(lambda: replace(number)))() == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}{end}\n"
    assert one_line(stoppable("run it again")(lambda: replace(number)))() == EXIT_STOPPED
    assert capsys.readouterr().err == f"stopped by {number.name}; run it again{end}\n"
    assert one_line(stoppable(kept="a.json has all rows")(lambda: replace(number)))() == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}; a.json has all rows{end}\n"


@pytest.mark.usefixtures("_once")
def test_the_error_in_its_place_is_chained_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted, match="SIGTERM") as error, raising(signal.SIGTERM):
        hidden(signal.SIGTERM)
    assert isinstance(error.value.__cause__, ImportError)
    with caplog.at_level("DEBUG", "cllm.signals"):
        assert stoppable()(lambda: hidden(signal.SIGTERM))() == 128 + signal.SIGTERM
    assert "ImportError: no module" in caplog.text
    assert "in hidden" in caplog.text, "the traceback"


def test_an_interrupt_that_the_command_itself_raised_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    """As that of a command that has waited for its processes to end."""

    def command() -> None:
        try:
            raise Interrupted(signal.SIGHUP)
        finally:
            raise UserError("a file is in the way")

    assert one_line(stoppable()(command))() == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "interrupted by SIGHUP; error that followed: a file is in the way\n"


def test_the_second_signal_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            compiled(signal.SIGINT)

    assert one_line(stoppable()(command))() == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted by SIGINT\n"


def test_an_error_after_another_handler_took_the_signal_is_that_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that saves after a signal, and finds the disk full."""
    monkeypatch.setattr(signals, "AGAIN", 0.5)

    def command() -> None:
        swallow(signal.SIGTERM)
        with received_signals() as received:
            wait(lambda: bool(received))
            raise UserError("the disk is full")

    assert one_line(stoppable("run it again")(command))() == 2
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_a_swallowed_signal_is_repeated_also_after_another_handler_took_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN", 0.5)

    def swallow_two() -> None:
        swallow(signal.SIGTERM)
        with received_signals() as received:
            wait(lambda: bool(received))
        swallow(signal.SIGTERM)
        wait(lambda: False)

    with pytest.raises(Interrupted, match="SIGTERM") as error, raising(signal.SIGTERM):
        swallow_two()
    assert error.value.__cause__ is None, "it came by itself"


@pytest.mark.parametrize("error", [UserError("a mistake"), ValueError("a bug"), Panic(), SystemExit(0)])
def test_errors_without_a_signal_remain_as_they_are(error: BaseException) -> None:
    def fail() -> None:
        try:
            raise KeyError
        except KeyError:
            raise error from None

    with pytest.raises(type(error)) as found, raising(*STOPPING):
        fail()
    assert found.value is error


@pytest.mark.usefixtures("_once")
def test_a_result_and_an_orderly_exit_remain_after_a_swallowed_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def returning() -> int:
        swallow(signal.SIGTERM)
        return 4

    def leaving() -> None:
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise SystemExit(0) from None

    assert stoppable()(returning)() == 4
    with pytest.raises(SystemExit):
        stoppable()(leaving)()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_once")
def test_a_thread_has_no_stop() -> None:
    """The main thread handles signals; an error of another thread stands for itself."""
    found: list[Any] = []

    def work() -> None:
        try:
            raise_if_stopped()
            stoppable()(lambda: int("x"))()
        except BaseException as error:
            found.append(error)

    with raising(signal.SIGTERM):
        swallow(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [type(error) for error in found] == [ValueError]


def test_code_that_goes_on_after_errors_can_ask_for_the_stop() -> None:
    def measure() -> None:
        try:
            compiled(signal.SIGHUP)
        except Exception as failure:
            raise_if_stopped(failure)

    with raising(*STOPPING):
        raise_if_stopped(ValueError("a failed measurement"))
    with pytest.raises(Interrupted, match="SIGHUP") as error, raising(*STOPPING):
        measure()
    assert error.value.__cause__ is not None
    raise_if_stopped()  # the signal ended with the block


def test_a_stop_whose_output_nobody_reads_keeps_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the reader of `command | less` as well."""

    def command() -> None:
        try:
            send(signal.SIGINT)
        finally:
            print("a table", flush=True)

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert one_line(stoppable()(command))() == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted by SIGINT\n"


REPLACES = """
import os, signal
from pydantic_core import SchemaValidator, core_schema

class Value:
    def __repr__(self):
        os.kill(os.getpid(), signal.{name})
        return "x"

SchemaValidator(core_schema.literal_schema([Value()]))
"""
SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
except KeyboardInterrupt:
    pass
"""
COMMAND = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            import stopping

sys.meta_path.insert(0, Finder())
from cllm.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("program", "name", "module", "words", "status", "line"),
    [
        (REPLACES, "SIGTERM", "cllm.environment", "evaluate --run nowhere", 143, "interrupted by SIGTERM"),
        (REPLACES, "SIGINT", "cllm.commands.evaluate", "evaluate --run nowhere", 130, "interrupted by SIGINT"),
        (SWALLOWS, "SIGINT", "cllm.commands.configs", "configs", 130, "interrupted by SIGINT"),
        (REPLACES, "SIGTERM", "cllm.serve.launch", "serve nowhere", 143, "interrupted by SIGTERM"),
        (
            REPLACES,
            "SIGTERM",
            "cllm.train.launch",
            "train --config quickstart",
            EXIT_STOPPED,
            "stopped by SIGTERM; --resume auto goes on from the newest checkpoint; without one it begins at step 0",
        ),
    ],
    ids=lambda value: "" if "\n" in str(value) else None,
)
def test_a_module_that_loses_the_exception_while_a_command_starts(
    tmp_path: Path, program: str, name: str, module: str, words: str, status: int, line: str
) -> None:
    (tmp_path / "stopping.py").write_text(program.format(name=name))
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", COMMAND, module, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr == line + "\n"
    assert done.returncode == status
