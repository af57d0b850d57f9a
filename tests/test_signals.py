"""Commands that end by a signal, also if the code that it interrupts swallows the exception."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm import signals
from cllm.processes import received_signals
from cllm.signals import STOPPING, Interrupted, raising

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN", 0.05)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def swallow(number: int) -> None:
    """A signal whose exception is lost, as in a destructor or in C code that clears errors."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        wait(lambda: False)


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
