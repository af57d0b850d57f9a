"""Commands that end by a signal with one line and an exit status instead of a traceback.

By default Python ends without cleaning up on every signal except SIGINT. Inside `stoppable` SIGTERM and SIGHUP raise an
exception as Ctrl-C does, so that temporary files are removed and locks released. During training steps `StopWhenDone`
handles signals instead.

Other code may swallow that exception or replace it by one of its own. A swallowed one is raised again. An error that
leaves a command after the exception was raised counts as the stop.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cllm.errors import EXIT_STOPPED, following

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end: from the terminal, from a scheduler, from a terminal that closes."""
STOPPING_RUNS = (*STOPPING, signal.SIGUSR1)
"""Those that end training after the current step. srun forwards SIGUSR1 to its tasks without ending itself."""
AGAIN = 1.0
"""Seconds after which an exception that was swallowed is raised again."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end. `__cause__` is the error by which other code replaced this one, if it did."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Raiser:
    """A signal handler that raises `Interrupted` until the command ends.

    Python runs handlers between any two instructions, so their exceptions are sometimes swallowed: in destructors,
    and in C code that clears errors. torch does so while it imports NumPy, and would then go on without NumPy.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The newest signal for which it raised an exception. None if another handler has taken over since."""
        self._repeats = False
        self._ended = False
        self._lock = _thread.allocate_lock()

    def __call__(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        repeats, self._repeats = self._repeats, False
        if repeats and (self._ended or _is_being_handled()):
            return
        first, self.number = self.number is None, number
        if first:
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
                handler = signal.getsignal(number)
                self._repeats = is_handler = handler is self
                if not is_handler and callable(handler):
                    self.number = None
                _thread.interrupt_main(signal.Signals(number))  # another handler, which raises nothing, gets it once

    def end(self) -> None:
        """Raise no more exceptions for signals that came before."""
        self._ended = True
        with self._lock:  # until a repetition that has begun has reached the main thread
            pass

    def stop_behind(self, error: BaseException) -> int | None:
        """The signal that an error stands for, which leaves the command; None if it stands for itself."""
        if isinstance(error, Interrupted | SystemExit | GeneratorExit):
            return None
        if self.number is not None:  # compiled code drops the context of its errors
            return self.number
        found = _interrupt_behind(error)
        return None if found is None or found is error else _number_of(found)


def _is_being_handled() -> bool:
    """Whether an `except`, `finally` or `with` block runs because of an interrupt."""
    return _interrupt_behind(sys.exception()) is not None


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or that led to it; None without one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _number_of(error: KeyboardInterrupt) -> int:
    return error.number if isinstance(error, Interrupted) else signal.SIGINT


@contextlib.contextmanager
def raising(*numbers: signal.Signals) -> Iterator[None]:
    """Turn signals into `Interrupted`, except those that have a handler or are ignored, as under nohup.

    Code that swallows the exception gets it again after `AGAIN` seconds. An error that leaves the block after the
    exception was raised becomes the `__cause__` of a new `Interrupted`. It remains what it is if another handler has
    got the signal since, for code that ends orderly. A `SystemExit` remains one.

    Outside of the main thread nothing is raised, because Python allows no handlers there.

    Raises:
        Interrupted: if a signal came, or an interrupt led to the error that left the block.
    """
    main = threading.current_thread() is threading.main_thread()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in numbers if main and (handler := signal.getsignal(number)) in defaults}
    raiser = _Raiser()
    for number in before:
        signal.signal(number, raiser)
    try:
        try:
            yield
        finally:
            raiser.end()
            for number, handler in before.items():
                signal.signal(number, handler)
    except BaseException as error:
        if (stop := raiser.stop_behind(error)) is None:
            raise
        raise Interrupted(stop) from error


def raise_if_stopped(error: BaseException | None = None) -> None:
    """Call this where a command records an error and goes on: it may have replaced the exception of a signal.

    Raises:
        Interrupted: from `error`, if `raising` raised one before that did not end the command.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for handler in map(signal.getsignal, STOPPING_RUNS):
        if isinstance(handler, _Raiser) and handler.number is not None:
            raise Interrupted(handler.number) from error


def interrupting(handler: Any) -> Any:
    """A handler that raises: `handler` if it is one of `raising`, else Python's for Ctrl-C."""
    return handler if isinstance(handler, _Raiser) else signal.default_int_handler


def stoppable(
    resume_hint: str | None = None, *more: signal.Signals, kept: str | None = None
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Decorate a command's main function to end on Ctrl-C, SIGTERM, SIGHUP and `more` with one line on stderr.

    Args:
        resume_hint: how to resume, for commands that lose nothing when interrupted; the status is then `EXIT_STOPPED`.
            Without it the status is 128 plus the signal's number, as in a shell.
        more: signals besides these three.
        kept: without `resume_hint`, which results remain; the end of the line.
    """

    def decorate(command: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(*args, **kwargs) -> int:
            try:
                with raising(*STOPPING, *more):
                    return command(*args, **kwargs) or 0
            except KeyboardInterrupt as error:
                number = _number_of(error)
                name = signal.Signals(number).name
                if resume_hint:
                    line = f"stopped by {name}; {resume_hint}"
                else:
                    line = f"interrupted by {name}" + (f"; {kept}" if kept else "")
                log.debug("%s", line, exc_info=error)
                print(line + following(error), file=sys.stderr)
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
