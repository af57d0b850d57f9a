"""Every format yields the text that was put in, and says so when it cannot."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cllm.data.prepare.formats import read_file
from cllm.data.prepare.sources import open_files
from cllm.errors import DataError

TEXTS = ["first\r\nline", "naïve 日本 🙂", "", "last\n"]
COMPRESS = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
}


def texts_of(path: Path, field: str = "text") -> list[str]:
    return [found.text for found in read_file(path, field)]


def jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py"])
def test_text_file_is_one_document(tmp_path, kind, suffix):
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXTS[1].encode()))
    assert texts_of(path) == [TEXTS[1]]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(TEXTS) + b"\n"))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_byte_order_marks_are_no_text(tmp_path, suffix):
    bom = b"\xef\xbb\xbf"
    for name, raw, expected in (
        ("a.jsonl", bom + jsonl(TEXTS), TEXTS),
        ("b.jsonl", bom + b"\n" + jsonl(TEXTS), TEXTS),
        ("c.jsonl", jsonl(TEXTS) + bom + jsonl(TEXTS), TEXTS + TEXTS),  # files joined end to end
        ("d.txt", bom + TEXTS[1].encode(), [TEXTS[1]]),
        ("e.txt", bom, [""]),
        ("f.jsonl", jsonl(["\ufeffkept inside of JSON"]), ["\ufeffkept inside of JSON"]),
    ):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESS[suffix](raw))
        assert [(found.text, found.replaced) for found in read_file(path, "text")] == [(text, 0) for text in expected]


@pytest.mark.parametrize(
    "state",
    [
        '{"_data_files": [{"filename": "../secret.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/secret.arrow"}]}',
        '{"_data_files": [{"filename": 3}]}',
        '{"_data_files": ["a.arrow"]}',
        '{"_data_files": 3}',
        "[]",
        "{",
        "[" * 100_000,
    ],
)
def test_a_saved_data_set_lists_files_of_its_own(tmp_path, state):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.arrow").touch()
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(
        DataError, match=r"state\.json: not a list of files as datasets\.save_to_disk writes it: "
    ) as caught:
        open_files([str(tmp_path / "set")], "text", "source.paths")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_file_cut_short_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESS[suffix](jsonl([f"document {i * i}" for i in range(5000)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        texts_of(path)


@pytest.mark.parametrize("string", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, string):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3, 4, 5], "text": pa.array([*TEXTS, None], string)}), path, row_group_size=2)
    assert texts_of(path) == [*TEXTS, ""]


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_file(tmp_path, new):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": TEXTS})
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert texts_of(path) == TEXTS


def test_folder_saved_by_datasets(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(10)]})
    dataset.filter(lambda row: row["text"] != "document 3").save_to_disk(tmp_path / "saved", num_shards=3)
    found = [document.text for document in open_files([str(tmp_path / "saved")], "text", "source.paths").documents()]
    assert found == [f"document {i}" for i in range(10) if i != 3]
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        open_files([str(tmp_path / "both")], "text", "source.paths")


def test_folders_and_globs_in_order_each_file_once(tmp_path, caplog):
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with caplog.at_level("INFO"):
        files = open_files([str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "*.txt")], "text", "source.paths")
    assert [path.name for path in files.paths] == ["b.txt", "a.txt", "c.md"]
    assert "1 .png" in caplog.text
    with pytest.raises(DataError, match=r"picture\.png: unsupported file type; supported: \.txt"):
        open_files([str(tmp_path / "*.png")], "text", "source.paths")
    with pytest.raises(DataError, match=r"source\.paths: .*nothing.*no such file"):
        open_files([str(tmp_path / "nothing*")], "text", "source.paths")


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    # Two bad bytes, a cut-off character, and a U+FFFD that was there before and is nobody's fault.
    raw = b"a\xffb\xfe c\xe6\x97 \xef\xbf\xbd"
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + raw + b'"}\n{"text": "half \\ud83d pair"}\n')
    column = pa.array([raw], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    expected = ("a\ufffdb\ufffd c\ufffd \ufffd", 3)
    assert next(read_file(tmp_path / "a.txt", "text"))[:2] == expected
    assert next(read_file(tmp_path / "a.parquet", "text"))[:2] == expected
    lines = [found[:2] for found in read_file(tmp_path / "a.jsonl", "text")]
    assert lines == [expected, ("half \ufffd pair", 1)]


def test_faults_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, said in [
        (b"{broken", r"a\.jsonl:3: not a line of JSON"),
        (b'{"body": "x", "url": "y"}', r"a\.jsonl:3: has no field `text`.*; it has body, url"),
        (b'["x"]', r"a\.jsonl:3: holds a list"),
        (b'{"text": 5}', r"a\.jsonl:3: field `text` holds a int"),
    ]:
        path.write_bytes(jsonl(["one", "two"]) + line + b"\n")
        with pytest.raises(DataError, match=said):
            texts_of(path)
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has no field `text`.*; it has body, n"):
        texts_of(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field `n` holds int64, not text"):
        texts_of(tmp_path / "a.parquet", "n")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        texts_of(tmp_path / "b.parquet")
