"""Damage to a prepared folder is told before it is trained on."""

from __future__ import annotations

import json
import shutil

import pytest

from cllm.data.manifest import Manifest
from cllm.errors import DataError


@pytest.fixture
def copy(prepared, tmp_path):
    """A prepared folder that may be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def test_missing_folder_says_how_to_prepare(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder.*python data/prepare\.py --config"):
        Manifest.load(tmp_path / "nowhere")


def test_missing_manifest(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: missing"):
        Manifest.load(copy)


def test_another_format_version(copy):
    record = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(record | {"format_version": 9}))
    with pytest.raises(DataError, match=r"manifest\.json: format_version is 9, not 1"):
        Manifest.load(copy)
    (copy / "manifest.json").write_text(json.dumps(record | {"eos_id": "zero"}))
    with pytest.raises(DataError, match=r"manifest\.json: eos_id: "):
        Manifest.load(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        Manifest.load(copy)


@pytest.mark.parametrize("file", ["train-00001.bin", "validation-00000.idx"])
def test_truncated_file_names_both_sizes(copy, file):
    size = (copy / file).stat().st_size
    with (copy / file).open("r+b") as handle:
        handle.truncate(size - 2)
    with pytest.raises(DataError, match=rf"{file}: damaged: expected {size} bytes, found {size - 2}"):
        Manifest.load(copy)
    (copy / file).unlink()
    with pytest.raises(DataError, match=rf"{file}: missing"):
        Manifest.load(copy)


def test_changed_byte_is_found_by_verify_alone(copy):
    raw = bytearray((copy / "train-00001.bin").read_bytes())
    raw[100] ^= 1
    (copy / "train-00001.bin").write_bytes(raw)
    manifest = Manifest.load(copy)
    with pytest.raises(DataError, match=r"train-00001\.bin: damaged: expected sha256"):
        manifest.verify()


def test_changed_tokenizer(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole, indent=4) + "\n")
    assert Manifest.load(copy), "another layout of the same tokenizer is the same"
    whole["model"]["merges"].pop()
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the tokenizer that made these tokens"):
        Manifest.load(copy)
    path.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: damaged"):
        Manifest.load(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        Manifest.load(copy)
