"""Tables as text, Markdown and CSV, beside the same tables written by hand."""

from __future__ import annotations

from cllm.tables import Column, aligned, csv_text, markdown

COLUMNS = (
    Column[tuple[str, float]]("", lambda item: item[0][:1]),
    Column[tuple[str, float]]("run", lambda item: item[0], left=True),
    Column[tuple[str, float]]("loss", lambda item: f"{item[1]:.1f}"),
)
ITEMS = [("mha", 2.0), ("fusedkv", 10.25)]


def test_aligned_text() -> None:
    assert aligned(COLUMNS, ITEMS) == "   run      loss\nm  mha       2.0\nf  fusedkv  10.2"
    assert aligned(COLUMNS[1:2], ITEMS) == "run\nmha\nfusedkv", "no blanks at the ends of lines"


def test_markdown() -> None:
    assert markdown(COLUMNS, ITEMS).splitlines() == [
        "|     | run     | loss |",
        "| --: | ------- | ---: |",
        "|   m | mha     |  2.0 |",
        "|   f | fusedkv | 10.2 |",
    ]


def test_a_table_without_rows_has_its_heads() -> None:
    assert aligned(COLUMNS, []) == "  run  loss"
    assert markdown(COLUMNS, []).splitlines() == ["|     | run | loss |", "| --: | --- | ---: |"]


def test_csv_has_full_precision_and_empty_cells() -> None:
    rows = [{"run": 'a,"b"', "loss": 1 / 3}, {"run": "c", "loss": None}]
    assert csv_text(["run", "loss"], rows) == 'run,loss\n"a,""b""",0.3333333333333333\nc,\n'
