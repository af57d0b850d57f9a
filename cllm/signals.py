"""Commands that end by a signal with one line and an exit status instead of a traceback.

By default Python ends without cleaning up on every signal except SIGINT. Inside `stoppable` SIGTERM and SIGHUP raise an
exception as Ctrl-C does, so that temporary files are removed and locks released. During training steps `StopWhenDone`
handles signals instead.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cllm.errors import EXIT_STOPPED

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end: from the terminal, from a scheduler, from a terminal that closes."""
STOPPING_RUNS = (*STOPPING, signal.SIGUSR1)
"""Those that end training after the current step. srun forwards SIGUSR1 to its tasks without ending itself."""
AGAIN = 1.0
"""Seconds after which an exception that was swallowed is raised again."""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the command to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Raiser:
    """A signal handler that raises `Interrupted` until the command ends.

    Python runs handlers between any two instructions, so their exceptions are sometimes swallowed: in destructors,
    and in C code that clears errors. torch does so while it imports NumPy, and would then go on without NumPy.
    """

    def __init__(self) -> None:
        self._raised = False
        self._repeats = False
        self._ended = False
        self._lock = _thread.allocate_lock()

    def __call__(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        repeats, self._repeats = self._repeats, False
        if repeats and (self._ended or _is_being_handled()):
            return
        if not self._raised:
            self._raised = True
            # Not by `threading`, whose locks the interrupted code may have.
            _thread.start_new_thread(self._repeat, (number,))
        raise Interrupted(number)

    def _repeat(self, number: int) -> None:
        is_handler = True
        while is_handler:
            time.sleep(AGAIN)
            with self._lock:
                if self._ended:
                    return
                self._repeats = is_handler = signal.getsignal(number) is self
                _thread.interrupt_main(signal.Signals(number))  # another handler, which raises nothing, gets it once

    def end(self) -> None:
        """Raise no more exceptions for signals that came before."""
        self._ended = True
        with self._lock:  # until a repetition that has begun has reached the main thread
            pass


def _is_being_handled() -> bool:
    """Whether an `except`, `finally` or `with` block runs because of an interrupt."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def raising(*numbers: signal.Signals) -> Iterator[None]:
    """Turn signals into `Interrupted`, except those that have a handler or are ignored, as under nohup.

    Code that swallows the exception gets it again after `AGAIN` seconds.

    Outside of the main thread nothing changes, because Python allows no handlers there.
    """
    main = threading.current_thread() is threading.main_thread()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in numbers if main and (handler := signal.getsignal(number)) in defaults}
    raiser = _Raiser()
    for number in before:
        signal.signal(number, raiser)
    try:
        yield
    finally:
        raiser.end()
        for number, handler in before.items():
            signal.signal(number, handler)


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
                with raising(*STOPPING, *more):
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
