"""Damage to prepared data is noticed on opening, and never gives other tokens or documents than were prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cllm.data import integrity
from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.data.prepare import build
from cllm.data.store import TokenStore
from cllm.errors import EXIT_STOPPED, DataError

FILES = ("train-00000.bin", "train-00001.idx", "train-00002.bin", "validation-00000.bin", "validation-00000.idx")


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A prepared folder that may be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def flip(path: Path, byte: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def without_checksums(folder: Path) -> Path:
    """As folders were before they had checksums."""
    record = json.loads((folder / "manifest.json").read_text())
    del record["checksums"]
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "checksums.crc32").unlink()
    return folder


def open_all(folder: Path) -> None:
    for split in ("train", "validation"):
        TokenStore(folder, split)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_on_opening(copy, name, seed):
    open_all(copy)
    draw = np.random.default_rng(seed)
    flip(copy / name, int(draw.integers((copy / name).stat().st_size)), int(draw.integers(8)))
    with pytest.raises(DataError, match=rf"{name}: damaged: bytes 0 to \d+ are not those that were written"):
        open_all(copy)


def test_large_data_is_sampled(copy, monkeypatch):
    manifest = Manifest.load(copy)
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 64)
    manifest.checksums = integrity.write_checksums(manifest, copy)
    manifest.save(copy)
    reads = []
    crc32 = integrity.zlib.crc32

    def counted(block):
        reads.append(len(block))
        return crc32(block)

    monkeypatch.setattr(integrity.zlib, "crc32", counted)
    monkeypatch.setattr(integrity, "SAMPLE_BYTES", 64 * 40)
    monkeypatch.setattr(integrity, "SAMPLE_BLOCKS", 30)
    n_blocks = sum(-(-file.n_bytes // 64) for file in manifest.files("train"))
    assert n_blocks > 300
    TokenStore(copy, "train")
    assert 15 < len(reads) <= 30
    assert max(reads) <= 64
    # The sample is random: one block in three is damaged, so thirty blocks meet some.
    path = copy / "train-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[::64] = [byte ^ 1 for byte in raw[::64]]
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00000\.bin: "):  # one sample misses all in one of a thousand times
        [TokenStore(copy, "train") for _ in range(20)]
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged: expected sha256"):
        TokenStore(copy, "train", verify="full")


def test_damaged_checksums_are_named(copy):
    flip(copy / "checksums.crc32", 5)
    with pytest.raises(DataError, match=r"checksums\.crc32: damaged"):
        open_all(copy)


@pytest.mark.parametrize("verify", ["none", "sample"])
def test_a_damaged_index_never_gives_wrong_documents(copy, verify):
    """Also in folders without checksums: what is read is right, or refused."""
    without_checksums(copy)
    whole = TokenStore(copy, "train")
    expected = whole.documents(0, len(whole))
    index = copy / "train-00001.idx"
    intact = index.read_bytes()
    first, last = (sum(shard.tokens for shard in whole.manifest.splits["train"].shards[:n]) for n in (1, 2))
    draw, refused = np.random.default_rng(0), 0
    for _ in range(60):
        row = int(draw.integers(len(intact) // 16))
        flip(index, 16 * row + int(draw.integers(8)), int(draw.integers(8)))  # where the document's tokens end
        try:
            store = TokenStore(copy, "train", verify=verify)
            for start in range(first - 7, last, 16):
                ids, positions = store.documents(start, start + 17)
                wanted = expected[0][start : start + 17]
                assert ids.tolist() == (wanted - wanted[0]).tolist()
                assert (positions[ids > 0] == expected[1][start : start + 17][ids > 0]).all()
        except DataError as error:
            refused += "train-00001" in str(error)
        index.write_bytes(intact)
    assert refused == 60


def test_an_eos_that_a_tokenizer_made_of_text_ends_no_document(copy):
    """The index says where documents end; tokens that differ from it are compared with their hash, and are right."""
    without_checksums(copy)
    manifest = Manifest.load(copy)
    shard = manifest.splits["train"].shards[0]
    tokens = np.fromfile(copy / shard.file, dtype="<u2")
    ends = np.fromfile(copy / shard.index, dtype="<i8")[::2]
    tokens[1] = manifest.eos_id
    tokens.tofile(copy / shard.file)
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged: documents in train-00000\.idx do not end where"):
        TokenStore(copy, "train").documents(0, 100)
    record = json.loads((copy / "manifest.json").read_text())
    record["splits"]["train"]["shards"][0]["sha256"] = integrity.hashlib.sha256(tokens.tobytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(record))
    ids, _ = TokenStore(copy, "train").documents(0, int(ends[2]))
    assert (np.flatnonzero(np.diff(ids)) + 1).tolist() == ends[:2].tolist()


def test_tokens_out_of_range_name_the_shard(copy):
    without_checksums(copy)
    path = copy / "train-00001.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[3] = 320
    tokens.tofile(path)
    store = TokenStore(copy, "train", verify="none")
    start = store.manifest.splits["train"].shards[0].tokens
    assert len(store.read(0, start + 3)) == start + 3
    said = r"train-00001\.bin: holds token 320, but the tokenizer of this data has tokens 0 to 319"
    with pytest.raises(DataError, match=said):
        store.read(0, start + 4)
    small = TokenStore(copy, "train", verify="none", vocab_size=200, whose="the model")
    with pytest.raises(DataError, match=r"\.bin: holds token \d+, but the model has tokens 0 to 199"):
        small.read(0, start)


def test_full_and_no_verification_are_settings_of_the_data(copy):
    without_checksums(copy)
    settings = {"seq_len": 16, "micro_batch": 2, "global_batch": 2}
    tokens = np.fromfile(copy / "train-00001.bin", dtype="<u2")
    tokens[5] = 7 if tokens[5] != 7 else 8
    tokens.tofile(copy / "train-00001.bin")
    for verify in ("none", "sample"):
        assert DataModule(str(copy), verify=verify, **settings)
    with pytest.raises(DataError, match=r"train-00001\.bin: damaged: expected sha256"):
        DataModule(str(copy), verify="full", **settings)


def test_verify_command(copy, command, capsys):
    assert command("--verify", copy) == 0
    n = len(list(copy.glob("*.bin"))) + len(list(copy.glob("*.idx")))
    assert capsys.readouterr().out.splitlines()[-1] == f"verified: {n} files as they were written"
    assert command("--verify", copy, "--force") == 2
    assert "--verify reads what is there" in capsys.readouterr().err
    flip(copy / "train-00002.bin", 7)
    assert command("--verify", copy) == 2
    error = capsys.readouterr().err
    assert "train-00002.bin: damaged: expected sha256" in error
    assert error.count("\n") == 1


def test_a_preparation_reads_back_what_it_wrote(tmp_path, run, recipe, documents, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(200)), encoding="utf-8")
    spec = recipe([tmp_path / "a.jsonl"], shard_tokens=1000)
    write = build.write_checksums

    def on_a_bad_disk(manifest, folder):
        flip(folder / "train-00001.bin", 9)
        return write(manifest, folder)

    monkeypatch.setattr(build, "write_checksums", on_a_bad_disk)
    status, out = run(spec)
    assert status == 2
    assert "train-00001.bin: damaged on the disk: written with sha256" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    assert run(spec)[0] == 0
    Manifest.load(out).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(
    ("when", "damage"),
    [("open", "flip"), ("open", "cut"), ("open", "link"), ("finished", "flip"), ("finished", "link")],
)
def test_damage_to_a_stopped_preparation_is_found(
    tmp_path, run, recipe, documents, monkeypatch, capsys, suffix, when, damage
):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(400)), encoding="utf-8")
    spec = recipe([tmp_path / "a.jsonl"], shard_tokens=2500, validation={"fraction": 0.1})
    monkeypatch.setattr("cllm.data.prepare.encode._BATCH_DOCUMENTS", 40)
    write_batch, seen = build._write_batch, []

    def stop(batch, writers):
        write_batch(batch, writers)
        seen.append(batch)
        if len(seen) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "_write_batch", stop)
    assert run(spec)[0] == EXIT_STOPPED
    monkeypatch.setattr(build, "_write_batch", write_batch)
    state = json.loads((tmp_path / "out.partial" / "progress.json").read_text())
    split = state["splits"]["validation"]
    assert split["documents"] > 0
    number = len(split["shards"]) - (when == "finished")
    part = tmp_path / "out.partial" / f"validation-{number:05d}{suffix}"
    if damage == "flip":
        flip(part, 3)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:8])
    else:
        thesis = tmp_path / "thesis"
        part.rename(thesis)
        part.symlink_to(thesis)
        before = thesis.read_bytes()
    status, out = run(spec)
    if damage == "link":
        assert thesis.read_bytes() == before
    else:
        assert status == 2
        how = "since the preparation was stopped" if when == "open" else "on the disk: written with"
        assert f"{part.name}: damaged {how}" in capsys.readouterr().err
        status, out = run(spec)
    assert status == 0
    run(spec, "--out", tmp_path / "undisturbed")
    assert Manifest.load(out).digest() == Manifest.load(tmp_path / "undisturbed").digest()
    Manifest.load(out).verify()
