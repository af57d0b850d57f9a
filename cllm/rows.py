"""The rows of `metrics.jsonl`: one JSON object per line, in the order of their steps.

The file may have millions of rows. It is read as a stream, from the start or from the end, and truncated in place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cllm.errors import UserError

Row = dict[str, Any]
"""`step`, `tokens`, `time`, and values by tag."""
BLOCK = 1 << 16
"""Bytes that are read at a time from the end."""


def read_rows(file: Path) -> Iterator[Row]:
    """The rows from the first to the last; none if there is no file. A last line that a crash truncated is left out.

    Raises:
        UserError: naming any other line that is not a row.
    """
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return
    with stream:
        broken: int | None = None
        for number, line in enumerate(stream, start=1):
            if broken is not None:
                raise _not_a_row(file, f"line {broken}")
            if (row := _parse(line)) is None:
                if not _may_be_cut(line):
                    raise _not_a_row(file, f"line {number}")
                broken = number
            else:
                yield row


def rows_backwards(file: Path) -> Iterator[tuple[int, Row]]:
    """(offset in bytes of the line's end, row), from the last row to the first; otherwise as `read_rows`."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return
    with stream:
        for n, (end, line) in enumerate(_lines_backwards(stream)):
            if (row := _parse(line)) is not None:
                yield end, row
            elif n > 0 or not _may_be_cut(line):
                raise _not_a_row(file, f"the line that ends at byte {end}")


def rows_of_step(file: Path, step: int) -> list[Row]:
    """The rows of one step, in order. Only the end of the file is read, back to that step."""
    found = []
    for _, row in rows_backwards(file):
        if row["step"] < step:
            break
        if row["step"] == step:
            found.append(row)
    return found[::-1]


def drop_rows_after(file: Path, step: int) -> None:
    """Truncate the file after the last row of `step` or earlier, and sync it."""
    kept = next((end for end, row in rows_backwards(file) if row["step"] <= step), 0)
    with file.open("ab") as stream:
        stream.truncate(kept)
        os.fsync(stream.fileno())


def _lines_backwards(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset of the line's end, line), from the last line to the first. The last one may lack its newline."""
    start = end = stream.seek(0, os.SEEK_END)
    rest = b""  # the file's bytes from `start` to `end`
    while start:
        size = min(BLOCK, start)
        start -= size
        stream.seek(start)
        lines = (stream.read(size) + rest).splitlines(keepends=True)
        rest = b"" if start == 0 else lines[0]
        for line in reversed(lines if start == 0 else lines[1:]):
            yield end, line
            end -= len(line)


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row


def _may_be_cut(line: bytes) -> bool:
    """Whether a line that is not a row may be the beginning of one, left by a crash."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not line.endswith(b"\n")


def _not_a_row(file: Path, where: str) -> UserError:
    return UserError(f"{file} {where}: not a row of metrics: it must be a JSON object with a whole number as `step`")
