"""The kind of a path: a run, a checkpoint, an exported folder, a foreign one, or nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cllm.errors import UserError
from cllm.hub.exchange import export_folder
from cllm.hub.export import export_run
from cllm.hub.kind import Kind, identify, identify_model


def test_every_kind_that_cllm_writes(make_run, tmp_path: Path) -> None:
    run, _ = make_run(kv={"preset": "mha"})
    export_run(run.path, tmp_path / "out")
    export_folder(tmp_path / "out", tmp_path / "llama")
    paths = {
        run.path: Kind.RUN,
        run.checkpoint_path(10): Kind.CHECKPOINT,
        run.checkpoint_path(15): Kind.NOTHING,
        tmp_path / "out": Kind.EXPORT,
        tmp_path / "llama": Kind.FOREIGN,
        tmp_path / "none": Kind.NOTHING,
        run.checkpoint_folder: Kind.NOTHING,
    }
    assert {path: identify(path) for path in paths} == paths
    assert {path for path in paths if identify(path).is_run} == {run.path, run.checkpoint_path(10)}


@pytest.mark.parametrize("zero", [False, True])
def test_a_checkpoint_is_a_file_or_a_folder(tmp_path: Path, zero: bool) -> None:
    path = tmp_path / "step-00000010.ckpt"
    path.mkdir() if zero else path.touch()
    assert identify(path) is Kind.CHECKPOINT


@pytest.mark.parametrize("model_type", ["{}", '{"model_type": null}'])
def test_a_folder_without_a_model_type_holds_no_model(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(model_type)
    assert identify(tmp_path) is Kind.NOTHING
    with pytest.raises(UserError, match=r"^init\.from .*: neither a run .* no config\.json with a model_type\)$"):
        identify_model(tmp_path, label="init.from ")


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        identify(tmp_path)


def test_no_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "cllm"}')
    code = f"import sys; from cllm.hub.kind import identify; print(identify({str(tmp_path)!r}), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "export False\n"
