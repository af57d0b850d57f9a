"""Tables: aligned text for a terminal, Markdown, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_NARROWEST = 3
"""Characters of a Markdown column: those of the shortest rule, `--:`."""


@dataclass(frozen=True)
class Column(Generic[Item]):
    """A column of a table with one row for each item."""

    head: str
    cell: Callable[[Item], str]
    left: bool = False
    """Align to the left; numbers are aligned to the right."""


def _cells(columns: Sequence[Column[Item]], items: Iterable[Item]) -> list[list[str]]:
    """The heads, then a row for each item."""
    return [[column.head for column in columns], *([column.cell(item) for column in columns] for item in items)]


def _pad(columns: Sequence[Column[Item]], cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    padded = zip(columns, cells, widths, strict=True)
    return [cell.ljust(width) if column.left else cell.rjust(width) for column, cell, width in padded]


def aligned(columns: Sequence[Column[Item]], items: Iterable[Item]) -> str:
    """The table as plain text, two spaces between columns."""
    rows = _cells(columns, items)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_pad(columns, row, widths)).rstrip() for row in rows)


def markdown(columns: Sequence[Column[Item]], items: Iterable[Item]) -> str:
    """The table in Markdown. Its columns are aligned, so it can also be read in a terminal."""
    heads, *rows = _cells(columns, items)
    widths = [max(_NARROWEST, *map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = [
        "-" * width if column.left else "-" * (width - 1) + ":" for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join("| " + " | ".join(_pad(columns, row, widths)) + " |" for row in (heads, rule, *rows))


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a head and full precision. None is an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
