"""A command of several processes that does not end shows where, and leaves no process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.watched import end_with_stacks, run_watched, start_group

STUCK = """
import subprocess, sys, time
def waits_for_the_child(child):
    child.wait()
def sleeps():
    print("asleep", flush=True)
    time.sleep(6000)
if sys.argv[1:] == ["child"]:
    sleeps()
else:
    waits_for_the_child(subprocess.Popen([sys.executable, __file__, "child"]))
"""


def test_all_processes_of_a_group_print_their_stacks_and_end(tmp_path: Path) -> None:
    script, output = tmp_path / "stuck.py", tmp_path / "output"
    script.write_text(STUCK)
    process = start_group([sys.executable, str(script)], output, cwd=tmp_path, environment=os.environ)
    deadline = time.monotonic() + 300
    while "asleep" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end_with_stacks(process.pid)
    assert process.wait(300) == -6
    for function in ("in sleeps", "in waits_for_the_child"):
        assert output.read_text().count(function) == 1


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    messages: list[str] = []
    line = ["bash", "-c", "trap '' ABRT; echo one; sleep 6000 & wait; wait"]
    ended = run_watched(line, seconds=0.5, every=0.2, tell=messages.append, cwd=tmp_path, environment=os.environ)
    assert ended.returncode == 124
    assert all(text.split(": ")[0].endswith(" s") for text in messages[:-1])
    assert messages[-1].startswith("not ended after 0 s. Output and stacks:\n")


def test_a_command_that_ends_returns_its_status_and_output(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; print(1, flush=True); print(2, file=sys.stderr); sys.exit(3)"]
    ended = run_watched(line, seconds=300, tell=lambda _: None, cwd=tmp_path, environment=os.environ)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "1\n2\n", "1\n2\n")
