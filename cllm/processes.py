"""Commands that start other commands, and forward signals to them; processes that end with the one that started them.

A child runs in a new session, so that a Ctrl-C at the terminal reaches it once, through its parent. It gets SIGTERM
when its parent is killed. Signals are sent only to children that have not been reaped: no other process can have their
id.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

from cllm.signals import STOPPING, Interrupted, leave_terminal

GRACE = 300.0
"""Seconds for a run to save its state after its time is up."""
END_GRACE = 10.0
"""Seconds for a process to end by itself whose parent has ended."""
_POLL = 0.05
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_ends_with_parent: list[bool] = []
"""Has an element after a call of `end_with_parent`, in forked processes too."""


def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen:
    """Start a child in a new session. It gets SIGTERM when the thread that started it ends.

    Args:
        options: as for `subprocess.Popen`.
    """
    parent = os.getpid()

    def end_with_parent() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    return subprocess.Popen(
        [str(word) for word in command], start_new_session=True, preexec_fn=end_with_parent, **options
    )


def has_ended(process: subprocess.Popen) -> bool:
    """Whether a child of `start` has ended. It is not reaped, so that its id is not reused."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a child of `start`, if it has not been reaped."""
    if process.returncode is None:
        os.kill(process.pid, number)


def reap(process: subprocess.Popen, grace: float = 0.0) -> int:
    """Wait `grace` seconds for a child of `start`, kill the rest of its process group, and return its status."""
    if process.returncode is None:
        deadline = time.monotonic() + grace
        while not has_ended(process) and time.monotonic() < deadline:
            time.sleep(_POLL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run(command: Sequence[str | Path], *, seconds: float | None = None, grace: float = GRACE, **options: Any) -> int:
    """Run a child to its end and return its exit status, -N if signal N killed it. Leaves no process behind.

    SIGINT, SIGTERM and SIGHUP to this process are forwarded meanwhile. The child is not killed then, so that a run can
    save its state.

    Args:
        seconds: time after which the child gets SIGTERM; None: never.
        grace: seconds from then until it is killed.
        options: as for `subprocess.Popen`.

    Raises:
        Interrupted: after the child has ended, if there was such a signal.
    """
    with received_signals() as received:
        late = None if seconds is None else time.monotonic() + seconds
        process = start(command, **options)
        killed, passed_on = None, 0
        try:
            while not has_ended(process):
                while passed_on < len(received):
                    send(process, received[passed_on])
                    passed_on += 1
                if late is not None and time.monotonic() > late:
                    send(process, signal.SIGTERM)
                    late, killed = None, time.monotonic() + grace
                if killed is not None and time.monotonic() > killed:
                    break
                time.sleep(_POLL)
        finally:
            status = reap(process)
    if received:
        raise Interrupted(received[0])
    return status


def end_with_parent() -> None:
    """End this process when the one that started it by multiprocessing ends, even if that one was killed.

    It gets SIGTERM, and SIGKILL after `END_GRACE` seconds. The same holds for processes that it forks by
    multiprocessing. A process with another kind of parent goes on.

    A thread waits for the parent. The kernel's signal that `start` uses would not do: it also comes when the parent
    goes on, but the thread of it that started this process has ended.
    """
    if not _ends_with_parent:
        _ends_with_parent.append(True)
        util.register_after_fork(_watch_parent, lambda watch: watch())
        _watch_parent()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect the signals to this process in a list while the block runs; ignored ones, as under nohup, stay ignored.

    Outside of the main thread, which alone may handle signals, the list stays empty.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        received.append(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in STOPPING if main and signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
