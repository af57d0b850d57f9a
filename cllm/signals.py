"""Commands that a signal ends: one line and an exit status instead of a traceback.

Python ends at once, without cleaning up, on every signal but SIGINT. Inside `stoppable` SIGTERM and SIGHUP raise an
exception like Ctrl-C does, so that temporary files go and locks are given back. Training has handlers of its own while
it takes steps (`StopWhenDone`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cllm.errors import EXIT_STOPPED

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end: from the terminal, from a scheduler, from a terminal that closes."""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the command to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise(number: int, frame: Any) -> None:
    if number == signal.SIGHUP:
        leave_terminal()
    raise Interrupted(number)


@contextlib.contextmanager
def raising(*numbers: signal.Signals) -> Iterator[None]:
    """Turn signals into `Interrupted`; those that have a handler, or are ignored as under nohup, stay as they are.

    Nothing changes outside of the main thread, where Python allows no handlers.
    """
    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in numbers if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def stoppable(
    goes_on: str | None = None, *more: signal.Signals
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Make a command's main function answer Ctrl-C, SIGTERM, SIGHUP and `more` with one line on stderr.

    Args:
        goes_on: how to go on after an interruption, where nothing is lost by one: the status is then `EXIT_STOPPED`.
            Without it the status is 128 plus the signal's number, as in a shell.
    """

    def decorate(command: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(*args, **kwargs) -> int:
            try:
                with raising(signal.SIGTERM, signal.SIGHUP, *more):
                    return command(*args, **kwargs) or 0
            except KeyboardInterrupt as error:
                number = error.number if isinstance(error, Interrupted) else signal.SIGINT
                name = signal.Signals(number).name
                print(f"stopped by {name}; {goes_on}" if goes_on else f"interrupted by {name}", file=sys.stderr)
                return EXIT_STOPPED if goes_on else 128 + number

        return run

    return decorate


def leave_terminal() -> None:
    """Send standard output and errors that go to a terminal to /dev/null: writing to a closed one is an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
            terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)  # one that has closed is no `isatty` any more
        except (OSError, ValueError, AttributeError):
            continue  # no file is behind it
        if terminal:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
