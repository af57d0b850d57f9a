"""Progress: a bar in a terminal that messages do not break, lines now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from cllm import progress
from cllm.progress import ProgressMeter, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as a list of one number that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_about_every_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressMeter(36_000, "mha", "step") as meter:
        for second in range(1, 151):
            clock[0] = second
            meter.update(2)
            meter.note("loss 3.2")
        assert capsys.readouterr().err.splitlines() == [
            "mha: 20 of 36,000 steps, 0 %, 5 h 0 min left, loss 3.2",
            "mha: 140 of 36,000 steps, 0 %, 4 h 59 min left, loss 3.2",
            "mha: 260 of 36,000 steps, 1 %, 4 h 58 min left, loss 3.2",
        ]
    assert capsys.readouterr().err == "mha: 300 of 36,000 steps in 2 min, loss 3.2\n"


def test_the_time_left_follows_the_speed_of_the_last_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    meter = ProgressMeter(10_000, "mha", "step", done=3000)  # resumed: 4000 steps took no time here
    meter.skip(1000)
    for minute in range(1, 31):
        clock[0] = 60 * minute
        meter.update(100 if minute <= 10 else 10)
    assert capsys.readouterr().err.splitlines()[-1] == "mha: 5,200 of 10,000 steps, 52 %, 8 h 0 min left"


def test_short_work_and_other_processes_print_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressMeter(10, "short", "step") as short, ProgressMeter(10, "other", "step", shown=False) as other:
        clock[0] = 9
        short.update(10)
        clock[0] = 1000
        other.update(10)
    assert capsys.readouterr().err == ""


def test_bytes_and_unknown_totals(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for total, text in ((4_700_000_000, "1.20G of 4.70GB, 26 %, 58 s left"), (None, "1.20GB")):
        clock[0] = 0
        meter = ProgressMeter(total, "web", "B", scaled=True)
        clock[0] = 20
        meter.update(1_200_000_000)
        assert capsys.readouterr().err == f"web: {text}\n"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 180_061)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "1 h 0 min", "50 h 1 min",
    ]  # fmt: skip


@contextlib.contextmanager
def terminal() -> Iterator[bytearray]:
    """stderr is a terminal of 80 columns. After the block the array has all that was written to it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                written.extend(os.read(ours, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8", buffering=1) as stream, contextlib.redirect_stderr(stream):
        yield written
    reader.join()
    os.close(ours)


def test_messages_do_not_break_bars_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("cllm.tests.progress")
    with terminal() as written:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        monkeypatch.setattr(logging.root, "handlers", [handler])
        with ProgressMeter(2, "outer", "set") as outer:
            for number in range(2):
                with ProgressMeter(2, f"inner {number}", "step") as inner:
                    for _ in range(2):
                        time.sleep(0.11)  # bars are drawn ten times a second
                        logger.warning("a message")
                        inner.note("loss 1")
                        inner.update()
                outer.update()
        assert logging.root.handlers == [handler]
    text = written.decode()
    assert "inner 1: 100%" in text
    shown = screen(text)
    assert shown[:4] == ["a message"] * 4
    assert re.fullmatch(r"outer: 100%\|█+\| 2/2 \[.*\]", shown[4])
    assert not any(shown[5:]), "the inner bars are gone"


def screen(written: str) -> list[str]:
    """The lines on a terminal's screen after these characters."""
    lines, row, column = [""] * 24, 0, 0
    for token in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]", written):
        if token == "\x1b[A":
            row -= 1
        elif token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        else:
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
