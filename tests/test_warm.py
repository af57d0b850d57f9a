"""The Python whose processes are forked: what a usual process does, it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(program: Path, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=300, **options)  # type: ignore


def test_output_folder_environment_and_status_are_those_of_the_usual_python(
    warm_executable: Path, tmp_path: Path
) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['X'], sys.argv); print('e', file=sys.stderr); sys.exit(5)"
    (tmp_path / "module.py").write_text(code)
    environment = os.environ | {"X": "y"}
    for words in (["-c", code, "a"], ["module.py", "a b"], ["-m", "module", "c"]):
        found, wanted = (run(p, *words, cwd=tmp_path, env=environment) for p in (warm_executable, Path(sys.executable)))
        shown = found.stdout.replace(str(tmp_path / "module.py"), "-m"), found.stderr, found.returncode
        assert shown == (wanted.stdout.replace(str(tmp_path / "module.py"), "-m"), wanted.stderr, wanted.returncode)
    assert run(warm_executable, "-c", "import sys; assert 'torch' in sys.modules").returncode == 0
    failed = run(warm_executable, "-c", "raise ValueError(3)")
    assert failed.returncode == 1
    assert failed.stderr.endswith("ValueError: 3\n")
    assert run(warm_executable, "-c", "import os; os.kill(os.getpid(), 9)").returncode == -9


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_signals_are_passed_on_and_the_fork_of_a_killed_program_is_killed(
    warm_executable: Path, tmp_path: Path, number: int
) -> None:
    code = f"""
import os, pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
def note(number, _):
    (folder / "seen").write_text(str(number))
    sys.exit(4)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
(folder / "ready.new").write_text(str(os.getpid()))
(folder / "ready.new").rename(folder / "ready")
time.sleep(600)
"""
    with subprocess.Popen([warm_executable, "-c", code]) as program:
        deadline = time.monotonic() + 300
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.send_signal(number)
    assert program.returncode == (4 if number == signal.SIGUSR1 else -number)
    while Path("/proc", (tmp_path / "ready").read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    seen = [file.read_text() for file in tmp_path.glob("seen")]
    assert seen == ([str(int(number))] if number == signal.SIGUSR1 else [])
