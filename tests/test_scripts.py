"""The shell scripts: what they do with the status and the signals of what they start. Programs are stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
# Notes what it is asked to do. What $HALT names waits for a signal; $FAIL ends with $CODE.
words="$*"
echo "$words" >> "$LOG"
case "$words" in
    *"${HALT:-nothing}"*)
        trap 'echo "saves on TERM" >> "$LOG"; exit 3' TERM
        touch "$LOG.ready"
        while :; do sleep 0.02; done ;;
    *"${FAIL:-nothing}"*) exit "$CODE" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the scripts with a python that only takes notes, and the environment to start them in."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    sums = subprocess.run("cat pyproject.toml constraints.txt | cksum", shell=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "venv" / ".cllm-installed-base").write_bytes(sums.stdout)
    environment = {**os.environ, "CLLM_PYTHON": str(python), "CLLM_VENV": str(tmp_path / "venv")}
    environment |= {"LOG": str(tmp_path / "log"), "CLLM_DESIGNS": "mha cla"}
    return tmp_path, environment


def commands(folder: Path) -> list[str]:
    """The programs that were started, but for the check of the interpreter."""
    lines = (folder / "log").read_text().splitlines()
    return [line.split()[0] if ".py" in line else line for line in lines if not line.startswith("-c ")]


@pytest.mark.parametrize(
    ("fail", "code", "started"),
    [
        ("nothing", 0, ["data/prepare.py", "train.py", "train.py", "evaluate.py", "scripts/compare.py"]),
        ("--name mha", 3, ["data/prepare.py", "train.py"]),
        ("--name cla", 2, ["data/prepare.py", "train.py", "train.py"]),
        ("prepare", 3, ["data/prepare.py"]),
    ],
)
def test_quickstart_ends_with_the_status_of_what_did_not_end_well(
    project: tuple[Path, dict[str, str]], fail: str, code: int, started: list[str]
) -> None:
    folder, environment = project
    done = subprocess.run(
        ["bash", str(folder / "scripts" / "quickstart")],
        env={**environment, "FAIL": fail, "CODE": str(code)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert commands(folder) == started
    assert ("stopped: the same command goes on" in done.stderr) == (code == 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_quickstart_passes_a_signal_on_and_waits_for_the_run_to_save(
    project: tuple[Path, dict[str, str]], number: int
) -> None:
    folder, environment = project
    process = subprocess.Popen(
        ["bash", str(folder / "scripts" / "quickstart")],
        env={**environment, "HALT": "--name mha"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
    )
    deadline = time.monotonic() + 300
    while not (folder / "log.ready").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 3
    assert commands(folder) == ["data/prepare.py", "train.py", "saves on TERM"]
    assert "stopped: the same command goes on" in error
