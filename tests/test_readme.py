"""The README's commands, run as written on a copy of the project; settings at their end only shorten them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = [
    "cllm",
    "configs",
    "data",
    "scripts",
    "benchmarks",
    "experiments",
    "train.py",
    "evaluate.py",
    "README.md",
    "LICENSE",
    "pyproject.toml",
]

SHORTER = {
    "data/prepare.py": ["--max_bytes", "2000000", "--validation.fraction", "0.1", "--workers", "1"],
    "train.py": [
        *("--train.steps", "2", "--train.global_batch", "2", "--train.micro_batch", "2", "--train.log_every", "1"),
        *("--data.validation_sequences", "2", "--data.num_workers", "0", "--optim.warmup_steps", "1"),
    ],
    "evaluate.py": ["--max-tokens", "600"],
}


def commands() -> list[str]:
    """Every line of the README's bash blocks, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


def test_readme_commands_run_in_order(tmp_path: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("prepared", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = []
    for command in commands():
        words = shlex.split(command, comments=True)
        if words[0] == "cllm":
            words[:1] = ["python", "-m", "cllm"]
        if words[0] != "python":
            continue
        done = subprocess.run(
            [sys.executable, *words[1:], *SHORTER.get(words[1], [])],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran.append(words[1])
    for block in python_blocks():
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        assert "KVCache(growing" in done.stdout
        ran.append("python")
    assert (ran.count("train.py"), ran.count("-m")) == (5, 3)
    assert {"data/prepare.py", "evaluate.py", "scripts/compare.py", "scripts/convert.py", "python"} <= set(ran)
    assert (tmp_path / "runs" / "comparison" / "comparison.png").exists()


def test_readme_names_every_preset_and_every_file_it_links_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_other_commands_in_the_readme_are_scripts_that_can_run() -> None:
    for command in commands():
        words = shlex.split(command)
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK), words[0]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "data/prepare.py", "scripts/compare.py"])
def test_every_command_has_help_worth_reading(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10
