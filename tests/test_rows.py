"""metrics.jsonl from either end: a stream, a tail of a few blocks, a cut in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import isgenerator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cllm import rows
from cllm.errors import UserError
from cllm.runs import RunFolder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """4,000 rows, two for every fifth step, of several blocks."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as stream:
        for step in range(1, 3334):
            stream.write(json.dumps({"step": step, "tokens": 10 * step, "train/loss": 1 / step}) + "\n")
            if step % 5 == 0:
                stream.write(json.dumps({"step": step, "tokens": 10 * step, "val/loss": 2 / step}) + "\n")
    assert path.stat().st_size > 2 * rows.BLOCK
    return path


def test_rows_are_the_same_from_both_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [json.loads(line) for line in file.read_text().splitlines()]
    stream = rows.read_rows(file)
    assert isgenerator(stream)
    assert list(stream) == wanted
    for block in (rows.BLOCK, 1000, 37, 1):
        monkeypatch.setattr(rows, "BLOCK", block)
        if block < 1000:
            file.write_text("".join(json.dumps(row) + "\n" for row in wanted[:20]))
            wanted = wanted[:20]
        found = list(rows.rows_backwards(file))
        assert [row for _, row in reversed(found)] == wanted
        content = file.read_bytes()
        assert all(json.loads(content[:end].splitlines()[-1]) == row for end, row in found[:30])


class Counting:
    """A file that counts the bytes read of it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.bytes = stream, 0

    def read(self, size: int) -> bytes:
        self.bytes += size
        return self.stream.read(size)

    def seek(self, *place: int) -> int:
        return self.stream.seek(*place)


def test_the_last_rows_cost_one_block(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Counting] = []
    lines = rows._lines_backwards

    def counted(stream: BinaryIO) -> Any:
        opened.append(Counting(stream))
        return lines(opened[-1])

    monkeypatch.setattr(rows, "_lines_backwards", counted)
    run = RunFolder(file.parent)
    reads: list[Callable[[], Any]] = [run.last_step, lambda: run.is_validated_at(3330)]
    reads.append(lambda: rows.drop_rows_after(file, 3300))
    assert [read() for read in reads] == [3333, True, None]
    assert [stream.bytes for stream in opened] == [rows.BLOCK] * 3
    assert run.last_step() == 3300
    assert not run.is_validated_at(3299)


@pytest.mark.parametrize("tail", ["", '{"step": 10', '{"step": 10}', "\0\0\0\0", "{\n"])
def test_a_last_line_that_a_crash_cut_off_is_left_out_and_cut(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3))
    file.write_text(kept + tail)
    steps = [1, 2, 2, 3]
    assert [row["step"] for row in rows.read_rows(file)] == steps
    assert [row["step"] for _, row in rows.rows_backwards(file)] == steps[::-1]
    assert rows.rows_of_step(file, 2) == [{"step": 2}] * 2
    for step, left in ((9, kept), (2, kept.removesuffix('{"step": 3}\n')), (0, "")):
        rows.drop_rows_after(file, step)
        assert file.read_text() == left
    assert list(rows.read_rows(tmp_path / "missing")) == list(rows.rows_backwards(tmp_path / "missing")) == []


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"tokens": 1}', '{"step": "3"}', '{"step": 1.5}', ""])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: not a row of metrics"):
        list(rows.read_rows(file))
    with pytest.raises(UserError, match=rf"metrics\.jsonl the line that ends at byte {13 + len(line)}: not a row"):
        list(rows.rows_backwards(file))
