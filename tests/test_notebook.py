"""The notebook runs from its first cell to its last, shortened, in an empty folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "notebooks" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_notebook_has_no_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_the_notebook_ends_with_a_picture(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "CLLM_NOTEBOOK_STEPS": "4",
        "CLLM_NOTEBOOK_FILES": "12",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.id: cell.outputs for cell in code_cells(notebook)}
    for cell in ("plan", "curves", "picture"):
        assert any("image/png" in output.get("data", {}) for output in shown[cell]), cell
    (table,) = (output["data"]["text/plain"] for output in shown["compare"] if "data" in output)
    assert [row.split()[1] for row in table.splitlines()[2:4]] == ["mha", "fusedkv_lite"]
    tables = "".join(output["text"] for output in shown["posthoc"] if output.get("name") == "stdout")
    assert tables.count("xkv:group=4,ratio=4") == 2
    assert sorted(os.listdir(tmp_path / "runs")) == ["fusedkv_lite", "mha"]
