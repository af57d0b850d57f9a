"""The measurements that come with `cllm plan`: those that `scripts/planner_tables.py` finds in all results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from cllm.planner.table import SHIPPED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    """scripts/planner_tables.py as a module."""
    spec = importlib.util.spec_from_file_location("planner_tables", ROOT / "scripts" / "planner_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_measurements(path):
    """Whether a result has losses of compressed caches, or decode steps of models."""
    if path.suffix == ".csv":
        return "perplexity" in path.read_text(encoding="utf-8").partition("\n")[0].split(",")
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in record.get("rows", []) if isinstance(row, dict)] if isinstance(record, dict) else []
    return any(({"perplexity", "spec"} <= row.keys() and "suite" not in row) or row.get("step_ms") for row in rows)


def test_the_shipped_table_is_what_the_script_writes(tables, tmp_path, capsys):
    assert tables.main(["--out", str(tmp_path / "measured.json")]) == 0
    written = (tmp_path / "measured.json").read_bytes()
    assert written == SHIPPED.read_bytes(), "run scripts/planner_tables.py"


def test_every_result_with_losses_or_steps_is_shipped_or_left_out_with_a_reason(tables):
    named = [*(name for name, *_ in tables.SWEEPS), *tables.DECODE]
    read = set(named)
    assert len(named) == len(read), "a file is named twice"
    assert not read & tables.LEFT_OUT.keys()
    results = ROOT / "docs" / "results"
    found = {path.name for path in [*results.glob("*.csv"), *results.glob("*.json")] if has_measurements(path)}
    studies = {path.name for path in results.glob("*study*") if path.is_dir()}
    assert found | studies == read | {*tables.STUDIES, *tables.LEFT_OUT}, (
        "name it in SWEEPS, DECODE, STUDIES or LEFT_OUT of scripts/planner_tables.py"
    )
