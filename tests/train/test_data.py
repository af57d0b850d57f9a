"""Training on damaged data: noticed at the start, or at the step that would read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.errors import DataError
from cllm.train.run import train

Tiny = Callable[..., Config]


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared folder that may be damaged."""
    return shutil.copytree(prepared, tmp_path / "data")


def _set_tokens(folder: Path, value: int) -> str:
    """Make all of the first training shard but its EOS tokens `value`; returns its name."""
    manifest = Manifest.load(folder)
    name = manifest.splits["train"].shards[0].file
    tokens = np.fromfile(folder / name, dtype=manifest.token_dtype)
    tokens[tokens != manifest.eos_id] = value
    tokens.tofile(folder / name)
    return name


def test_damage_is_refused_before_a_folder_appears(tiny: Tiny, copy: Path, tmp_path: Path) -> None:
    name = _set_tokens(copy, 9)
    with pytest.raises(DataError, match=rf"{name}: damaged: bytes 0 to \d+ are not those that were written"):
        train(tiny("--data.path", str(copy)))
    assert not (tmp_path / "runs").exists()


def test_tokens_out_of_range_stop_a_run_by_the_name_of_the_shard(tiny: Tiny, copy: Path) -> None:
    vocab_size = Manifest.load(copy).vocab_size
    name = _set_tokens(copy, vocab_size)
    said = rf"{name}: holds token {vocab_size}, but the tokenizer of this data has tokens 0 to {vocab_size - 1}"
    with pytest.raises(DataError, match=said):
        train(tiny("--data.path", str(copy), "--data.verify", "none", "--train.validate_every", "null"))


def test_how_much_is_verified_may_change_on_resuming(tiny: Tiny, copy: Path) -> None:
    train(tiny("--data.path", str(copy), "--train.steps", "4"))
    folder = train(tiny("--data.path", str(copy), "--train.steps", "4", "--data.verify", "full"), resume="auto")
    assert folder.checkpoints()[-1][0] == 4


def test_a_folder_without_checksums_is_trained_on(tiny: Tiny, copy: Path) -> None:
    """As they were before there were any."""
    record = json.loads((copy / "manifest.json").read_text())
    assert record.pop("checksums")
    (copy / "manifest.json").write_text(json.dumps(record))
    assert train(tiny("--data.path", str(copy), "--train.steps", "2")).checkpoints()
