"""Commands of several processes that a test starts: where each one is, and stacks of those that do not end. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

DUMP_SECONDS = 5.0
"""Time that a process gets to print its stacks."""


def run_watched(
    line: Sequence[str],
    *,
    seconds: float,
    tell: Callable[[str], None],
    cwd: Path,
    environment: Mapping[str, str],
    every: float = 20.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command. Its stdout and stderr are captured together, as `stdout`; `stderr` is the same text.

    `tell` gets the last line of its output every `every` seconds. After `seconds`, its processes print their stacks and
    are killed. `tell` then gets the entire output, and the status is 124.
    """
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = start_group(line, Path(output.name), cwd=cwd, environment=environment)

        def text() -> str:
            output.seek(0)
            return output.read()

        start = time.monotonic()
        status: int | None = None
        try:
            while status is None and (passed := time.monotonic() - start) < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(every, seconds - passed))
                if status is None:
                    tell(f"{time.monotonic() - start:.0f} s: {_last_line(text())}")
            if status is None:
                end_with_stacks(process.pid)
                lines = (line for line in text().splitlines(True) if not line.startswith("Extension modules:"))
                tell(f"not ended after {seconds:.0f} s. Output and stacks:\n{''.join(lines)}")
                status = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(list(line), status, text(), text())


def start_group(
    line: Sequence[str], output: Path, *, cwd: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command in a process group with its id. Its Python processes print their stacks at SIGABRT."""
    variables = {**environment, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    with output.open("ab") as file:
        return subprocess.Popen(
            list(line),
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_with_stacks(group: int) -> None:
    """End a group of `start_group`. All processes stop first; then they print their stacks one after the other."""
    members = [pid for pid in _processes() if _group(pid) == group]
    for number in (signal.SIGSTOP, signal.SIGABRT):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + DUMP_SECONDS
        while _group(pid) == group and time.monotonic() < deadline:
            time.sleep(0.05)


def _processes() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _group(pid: int) -> int | None:
    """The group of a process; None if it has ended."""
    try:
        state, _, group, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output yet"
