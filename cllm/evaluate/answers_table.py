"""The table of `answers.py` as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm import tables
from cllm.errors import UserError
from cllm.evaluate.answers import Answer, Answers, Cell
from cllm.evaluate.score_choice import ScoreChoice
from cllm.files import write_atomic
from cllm.tables import Column

_DASH = "–"
_NOTE = (
    "Bytes: of cache for each token of context, keys and values in bf16; own / x and mha / x: the model's uncompressed "
    "cache, and that of full attention, relative to it. ±: standard error, over seeds where there are several, else "
    "over questions. Change: to the same model's uncompressed cache, and in rows without compression to {baseline}. "
    "**Bold**: the perplexity rose by at most 1 %, and the score is worse by more than two standard errors; of several "
    "seeds, by more than the 95 % interval reaches."
)


def _columns(found: Answers) -> list[Column[Answer]]:
    columns = [Column[Answer]("trained", lambda row: row.label, left=True)]
    if any(row.seeds > 1 for row in found.rows):
        columns.append(Column("seeds", lambda row: str(row.seeds)))
    columns.append(Column("compressed", lambda row: f"`{row.spec}`" if row.spec else "", left=True))
    if any(row.kv_bytes is not None for row in found.rows):
        columns.append(Column("bytes/token", lambda row: _text(row.kv_bytes, "{:,.0f}".format)))
    columns.append(Column("own / x", lambda row: _text(row.ratio_to_own, "{:.2f}".format)))
    if any(row.ratio_to_mha is not None for row in found.rows):
        columns.append(Column("mha / x", lambda row: _text(row.ratio_to_mha, "{:.2f}".format)))
    if any(row.perplexity is not None for row in found.rows):
        columns.append(Column("perplexity", lambda row: _number(row.perplexity, _perplexity_text)))
        columns.append(Column("change", lambda row: _change(row.perplexity, lambda x: f"{x:.1f} %")))
    for n, score in enumerate(found.scores):
        columns += _score_columns(n, score)
    return columns


def _score_columns(n: int, score: ScoreChoice) -> list[Column[Answer]]:
    form = score.number.form
    return [
        Column(score.head, lambda row: _number(row.scores[n], form)),
        Column("change", lambda row: _change(row.scores[n], form)),
    ]


def _text(value: float | None, form: Callable[[Any], str]) -> str:
    return _DASH if value is None else form(value)


def _perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _number(cell: Cell | None, form: Callable[[Any], str]) -> str:
    if cell is None:
        return _DASH
    return form(cell.value) + ("" if cell.error is None else f" ± {form(cell.error)}")


def _change(cell: Cell | None, form: Callable[[Any], str]) -> str:
    if cell is None or cell.change is None:
        return ""
    text = form(abs(cell.change))
    if float(text.split()[0]):
        text = ("+" if cell.change > 0 else "-") + text
    return f"**{text}**" if cell.hidden_loss else text


def markdown(found: Answers) -> str:
    """The table, its warnings and the meaning of its columns."""
    lines = [f"- **Warning**: {line}" for line in found.warnings]
    note = _NOTE.format(baseline=found.baseline)
    parts = [tables.markdown(_columns(found), found.rows), *(["\n".join(lines)] if lines else []), note]
    return "\n\n".join(parts) + "\n"


def csv_text(found: Answers) -> str:
    """The rows with full precision; an empty cell was not measured."""
    rows = []
    for row in found.rows:
        values: dict[str, Any] = {"trained": row.label, "compressed": row.spec or "none", "seeds": row.seeds}
        values |= {key: getattr(row, key) for key in ("kv_bytes", "ratio_to_own", "ratio_to_mha")}
        named = [("perplexity", row.perplexity), *((s.name, c) for s, c in zip(found.scores, row.scores, strict=True))]
        for name, cell in named:
            value, error, change, hidden = (None, None, None, None) if cell is None else cell
            values |= {name: value, f"{name}_stderr": error, f"{name}_change": change}
            if name != "perplexity":
                values[f"{name}_hidden_loss"] = hidden
        rows.append(values)
    return tables.csv_text(list(rows[0]), rows)


def write(found: Answers, folder: Path) -> list[Path]:
    """Write `answers.md` and `answers.csv` into `folder`. Returns their paths. Raises `UserError`."""
    files = {folder / "answers.md": markdown(found), folder / "answers.csv": csv_text(found)}
    try:
        for file, text in files.items():
            write_atomic(file, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    return list(files)
