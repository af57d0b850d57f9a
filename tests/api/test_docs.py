"""The code on docs/python.md, in the order of the page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cllm

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_all_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [
        (PAGE[: found.start()].count("\n") + 1, found[1]) for found in re.finditer(r"```python\n(.*?)```", PAGE, re.S)
    ]
    names: dict[str, Any] = {}
    for line, block in blocks:
        exec(compile("\n" * line + block, "docs/python.md", "exec"), names)
    assert names["table"].comparison.rows[0].design == "mha"
    assert {path.name for path in tmp_path.iterdir()} >= {
        "yoco.png",
        "trained",
        "runs",
        "exported",
        "comparison",
        "logs",
    }


def test_the_page_names_every_function() -> None:
    listed = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE, re.M))
    assert {name for pair in listed for name in pair if name} == set(cllm.__all__) - {"UserError"}
