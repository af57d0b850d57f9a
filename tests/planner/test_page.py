"""docs/planner.md shows what its command prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cllm.commands.plan import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner.md"


def test_the_shown_output_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    command, shown = (text.split(f"```{kind}\n")[1].split("\n```")[0] for kind in ("bash", "text"))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.rstrip("\n").splitlines() == shown.splitlines()
    assert (tmp_path / "plan.png").exists()
