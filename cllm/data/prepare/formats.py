"""Documents of one local file in any supported format.

Text is UTF-8. Bytes that are not are replaced by U+FFFD and counted, never dropped.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from cllm.errors import DataError

TEXT = (".txt", ".md", ".py")
LINES = (".jsonl",)
TABLES = (".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED = (
    f"supported: {' '.join(TEXT + LINES)} (plain or with {' '.join(COMPRESSIONS)}), "
    f"{' '.join(TABLES)}, and folders written by datasets.save_to_disk"
)
_TABLE_ROWS = 1024  # rows of a table in memory at a time
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """One document of a file."""

    text: str
    replaced: int
    """Byte sequences that were not UTF-8 and became U+FFFD."""
    progress: float
    """The share of its file that has been read, 0 to 1."""


def decode(raw: bytes) -> tuple[str, int]:
    """UTF-8 bytes as text without a byte order mark, and the number of invalid sequences replaced by U+FFFD."""
    raw = raw.removeprefix(_BOM)
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def replace_surrogates(text: str) -> tuple[str, int]:
    """A string that can be encoded, and the number of lone surrogates (JSON's "\\ud800") replaced by U+FFFD."""
    return (text, 0) if text.isascii() else _SURROGATE.subn("\ufffd", text)


def text_of(value: Any, where: str, field: str) -> tuple[str, int]:
    """A field's value as text; null is an empty document. Raises `DataError` for any other type."""
    if value is None:
        return "", 0
    if not isinstance(value, str):
        raise DataError(f"{where}: field `{field}` holds a {type(value).__name__}, not text")
    return replace_surrogates(value)


def missing_field(where: str, field: str, names: Any) -> DataError:
    """The error for a record without its text field; it names the record's fields."""
    fields = ", ".join(map(str, names)) or "none"
    return DataError(f"{where}: has no field `{field}` (source.text_field); it has {fields}")


def kind_of(path: Path) -> str | None:
    """A file's format: its suffix, one of `TEXT`, `LINES`, `TABLES`, below that of a compression. None: unsupported."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in TABLES:
        return suffixes[-1]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT + LINES else None


def read_file(path: Path, text_field: str) -> Iterator[Text]:
    """The documents of one file, in order. Raises `DataError` naming the file, and the line or row."""
    kind = kind_of(path)
    if kind in TABLES:
        yield from _read_table(path, text_field)
    elif kind in LINES:
        yield from _read_lines(path, text_field)
    elif kind in TEXT:
        yield Text(*read_text(path), 1.0)
    else:
        raise DataError(f"{path}: unsupported file type; {SUPPORTED}")


def _open(path: Path, raw: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """`raw`, decompressed by the suffix of `path`. Reading a truncated file raises for every compression."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".zst":
        # Arrow's reader, because zstandard's does not notice that a file is truncated.
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return raw


def read_text(path: Path) -> tuple[str, int]:
    """A file's text, decompressed, and the number of byte sequences that were replaced, since they are not UTF-8.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with path.open("rb") as raw, _open(path, raw) as file:
            return decode(file.read())
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _read_lines(path: Path, text_field: str) -> Iterator[Text]:
    number = 0
    try:
        size = path.stat().st_size or 1
        with path.open("rb") as raw, _open(path, raw) as file:
            for number, line in enumerate(file, start=1):
                if not line.removeprefix(_BOM).strip():
                    continue
                text, replaced = _parse_line(line, f"{path}:{number}", text_field)
                yield Text(text, replaced, min(raw.tell() / size, 1.0))
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from None


def _parse_line(line: bytes, where: str, text_field: str) -> tuple[str, int]:
    decoded, replaced = decode(line)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, not an object with a `{text_field}` field")
    if text_field not in record:
        raise missing_field(where, text_field, record)
    text, surrogates = text_of(record[text_field], where, text_field)
    return text, replaced + surrogates


def _read_table(path: Path, text_field: str) -> Iterator[Text]:
    import pyarrow as pa

    row = 0
    try:
        names, column_type, n_rows, columns = _open_table(path, text_field)
        if column_type is None:
            raise missing_field(str(path), text_field, names)
        if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
            raise DataError(f"{path}: field `{text_field}` holds {column_type}, not text")
        as_bytes = pa.large_binary() if pa.types.is_large_string(column_type) else pa.binary()
        for column in columns:
            # Arrow does not guarantee that its strings are UTF-8, so the bytes are decoded here.
            for value in column.cast(as_bytes):
                row += 1
                text, replaced = decode(value.as_py() or b"")
                yield Text(text, replaced, row / n_rows if n_rows else 0.0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read after row {row}: {error}") from None


def _open_table(path: Path, text_field: str) -> tuple[list[str], Any, int, Iterator[Any]]:
    """(column names, the text column's Arrow type or None, rows or 0 if unknown, the text column in pieces)."""
    import pyarrow as pa

    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path)
        schema, n_rows = table.schema_arrow, table.metadata.num_rows
        batches = table.iter_batches(batch_size=_TABLE_ROWS, columns=[text_field])
    else:
        source = pa.memory_map(str(path))
        is_file = source.read(6) == b"ARROW1"  # the file format; `datasets` writes the stream format
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        schema, n_rows = reader.schema, 0
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    column_type = schema.field(text_field).type if text_field in schema.names else None
    return schema.names, column_type, n_rows, (batch.column(text_field) for batch in batches)
