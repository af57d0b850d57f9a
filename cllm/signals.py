"""Commands that end by a signal with one line and an exit status instead of a traceback.

By default Python ends without cleaning up on every signal except SIGINT. Inside `stoppable` SIGTERM and SIGHUP raise an
exception as Ctrl-C does, so that temporary files are removed and locks released. During training steps `StopWhenDone`
handles signals instead.
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
    """Turn signals into `Interrupted`, except those that have a handler or are ignored, as under nohup.

    Outside of the main thread nothing changes, because Python allows no handlers there.
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
    resume_hint: str | None = None, *more: signal.Signals
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Decorate a command's main function to end on Ctrl-C, SIGTERM, SIGHUP and `more` with one line on stderr.

    Args:
        resume_hint: how to resume, for commands that lose nothing when interrupted; the status is then `EXIT_STOPPED`.
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
                print(f"stopped by {name}; {resume_hint}" if resume_hint else f"interrupted by {name}", file=sys.stderr)
                return EXIT_STOPPED if resume_hint else 128 + number

        return run

    return decorate


def leave_terminal() -> None:
    """Redirect stdout and stderr from a terminal to /dev/null, since writing to a closed terminal is an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
            terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)  # `isatty` is false for a closed terminal
        except (OSError, ValueError, AttributeError):
            continue  # it has no file descriptor
        if terminal:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
