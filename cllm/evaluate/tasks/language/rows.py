"""Rows of local data files: JSON lines, JSON, CSV, TSV and Parquet, plain or compressed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.data.prepare import formats
from cllm.data.prepare.formats import COMPRESSIONS
from cllm.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_TABLES = (".json", ".parquet")
"""Formats in which a row has a position and no line."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape in JSON for half of a character. Two of them are a character."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Methods take one or more paths of a field, such as `question` or `question.stem`, and read the first that the row
    has. A step of a path into a list reads the field of every element.
    """

    values: Mapping[str, Any]
    file: Path
    number: int
    """The row's line, or its position in a JSON list or a Parquet table, from 1."""

    @property
    def where(self) -> str:
        """File and line, for errors."""
        return f"{self.file} {'row' if _format(self.file) in _TABLES else 'line'} {self.number}"

    def error(self, message: str) -> UserError:
        """An error that names the file and the line."""
        return UserError(f"{self.where}: {message}")

    def value(self, *paths: str) -> Any:
        """The field's value. Raises `UserError` if the row has none of the fields."""
        for path in paths:
            try:
                return _at(self.values, path.split("."))
            except KeyError:
                continue
        names = " or ".join(f"`{path}`" for path in paths)
        raise self.error(f"has no field {names}; it has {', '.join(map(str, self.values)) or 'none'}")

    def has(self, path: str) -> bool:
        """Whether the row has the field."""
        try:
            _at(self.values, path.split("."))
        except KeyError:
            return False
        return True

    def text(self, *paths: str) -> str:
        """The text of a field. Raises `UserError` if the field is missing or something else."""
        value = self.value(*paths)
        if not isinstance(value, str):
            raise self.error(f"field `{paths[0]}` is {_shown(value)}; it must be text")
        return value

    def texts(self, *paths: str) -> tuple[str, ...]:
        """The texts of a list in a field. Raises `UserError` if the field is missing, something else, or empty."""
        value = self.value(*paths)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(f"field `{paths[0]}` is {_shown(value)}; it must be a list of texts")
        return tuple(value)

    def index(self, path: str, count: int) -> int:
        """A field with the number of an option, from 0. Raises `UserError` unless it is one of `count`."""
        value = self.value(path)
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if type(number) is not int or not 0 <= number < count:
            raise self.error(f"field `{path}` is {_shown(value)}; it must be 0 to {count - 1}, the right option")
        return number

    def label(self, path: str, labels: Sequence[str]) -> int:
        """The position in `labels` of a field's label. Raises `UserError` if it is not one of them."""
        value = self.value(path)
        if value not in labels:
            raise self.error(f"field `{path}` is {_shown(value)}; it must be one of {', '.join(labels)}")
        return list(labels).index(value)


def _at(value: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path. Raises `KeyError`."""
    for n, step in enumerate(path):
        if isinstance(value, list):
            return [_at(item, path[n:]) for item in value]
        if not isinstance(value, Mapping):
            raise KeyError(step)
        value = value[step]
    return value


def _shown(value: Any) -> str:
    """A value in an error, at most 40 characters long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a file, or of every data file of a folder, by name.

    Args:
        columns: names of the columns of a CSV or TSV file without a header. A first line with these names is read as a
            header all the same.

    Raises:
        UserError: naming the file, and the line if one is wrong; also if there is no row.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _format(file) is not None)
        if not files:
            raise UserError(f"{path}: has no data files; read are {', '.join(FORMATS)}")
    else:
        files = [path]
    rows = [row for file in files for row in _read_file(file, columns)]
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _format(path: Path) -> str | None:
    """One of `FORMATS`; None: not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[-1] in COMPRESSIONS and suffixes[0] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _read_file(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    kind = _format(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if kind is None:
        allowed = f"{', '.join(FORMATS)}, the texts among them also with {', '.join(COMPRESSIONS)}"
        raise UserError(f"{path}: unknown file type; allowed: {allowed}")
    if kind == ".parquet":
        values: Iterator[tuple[int, Any]] = enumerate(_table(path), start=1)
    elif kind == ".jsonl":
        values = _lines(path)
    elif kind == ".json":
        values = _list(path)
    else:
        values = _csv(path, columns, "\t" if kind == ".tsv" else ",")
    for number, value in values:
        row = Row(value, path, number)
        if not isinstance(value, dict):
            raise Row({}, path, number).error(f"is {_shown(value)}; it must be an object with named fields")
        yield row


def read_text(path: Path) -> str:
    """A text file's content, decompressed. Raises `UserError` if it cannot be read or is not UTF-8."""
    text, replaced = formats.read_text(path)
    if replaced:
        raise UserError(f"{path}: is not UTF-8: {replaced} byte sequences are invalid")
    return text


def _json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: has half of a character, {error.object[error.start]!a}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    return value


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, _json(line, f"{path} line {number}")


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    values = _json(read_text(path), str(path))
    if not isinstance(values, list):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}; it must be a list of objects")
    yield from enumerate(values, start=1)


def _csv(path: Path, columns: Sequence[str] | None, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    names, number = columns, 1
    try:
        for fields in reader:
            if names is None or (number == 1 and tuple(fields) == tuple(names)):
                names = fields
            elif fields:
                if len(fields) != len(names):
                    raise UserError(f"{path} line {number}: has {len(fields)} columns; it must have {len(names)}")
                yield number, dict(zip(names, fields, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {number}: not CSV: {error}") from None


def _table(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
