"""The README: its links, its scripts, and the help that it points to. `test_doc_commands.py` runs its commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.plan.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[str]:
    """Every line of the README's bash blocks, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_readme_names_every_preset_and_every_file_it_links_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Published designs have names: (.*?)\n\n", text, re.M | re.S)
    (heads, tails) = re.findall(r"\{([a-z,]+)\}", listed)
    names = {f"{head}_{tail}" for head in heads.split(",") for tail in tails.split(",")}
    names |= set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([a-z_\s]+)`", listed))))
    assert names == {name for name, cls in PRESETS.items() if cls.__module__.startswith("cllm.")}
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_other_commands_in_the_readme_are_scripts_that_can_run() -> None:
    for command in commands():
        words = shlex.split(command)
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK), words[0]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "data/prepare.py", "scripts/compare.py"])
def test_every_command_has_help_worth_reading(script: str) -> None:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10
