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


@pytest.mark.parametrize("key", ["file", "index"])
@pytest.mark.parametrize(
    "name", ["../small/train-00000.bin", "/etc/passwd", "sub/train-00000.bin", "..", "", "a\\b", "a\0"]
)
def test_shards_lie_in_the_folder(copy, key, name):
    record = json.loads((copy / "manifest.json").read_text())
    record["splits"]["train"]["shards"][1][key] = name
    (copy / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(
        DataError, match=rf"manifest\.json: splits\.train\.shards\.1\.{key}: .* is not the plain name of a file"
    ):
        Manifest.read(copy)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx", "tokenizer", "tokenizer/tokenizer.json"])
def test_symbolic_links_that_leave_the_folder_are_refused(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name}: .* is a symbolic link that leaves the folder, to .*elsewhere"):
        Manifest.load(copy)
    (copy / name).unlink()
    (tmp_path / "elsewhere").rename(copy / "inside")
    (copy / name).symlink_to(copy / "inside")
    assert Manifest.load(copy)
    (copy / name).unlink()
    (copy / name).symlink_to(copy / name)
    with pytest.raises(DataError, match=rf"{name}: "):
        Manifest.load(copy)


def _set(record: dict, path: str, value) -> str:
    *sections, leaf = path.split(".")
    for section in sections:
        record = record[int(section) if section.isdecimal() else section]
    record[leaf] = value
    return path


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("splits", [], "splits: "),
        ("splits.train", 3, "splits.train: "),
        ("splits.train.shards", {"file": "x"}, "splits.train.shards: "),
        ("splits.train.shards.0.file", ["x"], "splits.train.shards.0.file: "),
        ("splits.train.shards.0.tokens", -1, "splits.train.shards.0.tokens: "),
        ("splits.train.shards.0.bytes", 1, "splits.train: bytes is "),
        ("splits.train.documents", 10**30, "splits.train: documents is 10"),
        ("vocab_size", 0, "vocab_size: "),
        ("eos_id", 320, "the record: eos_id is 320, but the ids of vocab_size 320 are smaller"),
        ("vocab_size", 2**17, "the record: dtype is uint16, which is too small for the ids of vocab_size 131072"),
        ("checksums", "crc32", "checksums: "),
        ("checksums.file", "../x", "checksums.file: "),
        ("format_version", [1], "format_version is [1], not 1"),
    ],
)
def test_manifests_of_another_shape_are_one_line(copy, path, value, said):
    record = json.loads((copy / "manifest.json").read_text())
    _set(record, path, value)
    (copy / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        Manifest.load(copy)
    assert str(caught.value).startswith(f"{copy / 'manifest.json'}: {said}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "[" * 100_000, "\xff", "NaN", '{"format_version": 1}'])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json"])
def test_json_of_any_other_kind_is_one_line(copy, name, text):
    (copy / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        Manifest.load(copy)
    assert str(caught.value).startswith(f"{copy / name}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_digest_is_of_tokens_and_tokenizer_alone(copy, prepared):
    digest = Manifest.load(prepared).digest()
    record = json.loads((copy / "manifest.json").read_text())
    for path, value in (("name", "x"), ("versions", {}), ("recipe", {}), ("checksums", None), ("source_sha256", "")):
        _set(record, path, value)
    (copy / "manifest.json").write_text(json.dumps(record))
    assert Manifest.load(copy).digest() == digest
    for path, changed in (
        ("tokenizer_sha256", "0"),
        ("eos_id", 1),
        ("vocab_size", 321),
        ("dtype", "uint32"),
        ("splits.train.shards.0.sha256", "0"),
        ("splits.validation.shards.0.index_sha256", "0"),
    ):
        other = json.loads(json.dumps(record))
        _set(other, path, changed)
        (copy / "manifest.json").write_text(json.dumps(other))
        assert Manifest.read(copy).digest() != digest, path


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
