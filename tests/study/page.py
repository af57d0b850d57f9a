"""Helpers of the tests of docs/study_results.md: read its tables and sentences, and numbers of a study's summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm.study.results import Result, read_results
from cllm.study.summary import Row, Summary

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "results"
FOLDER = RESULTS / "2026-11-27-study-490m-h200"
"""The results of the designs after 490 M tokens."""
EQUAL_BYTES = RESULTS / "2026-11-28-study-equal-bytes-h200"
"""Those of `studies/equal_bytes`."""
TEXT = (DOCS / "study_results.md").read_text(encoding="utf-8")
STUDY = (DOCS / "study.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


def table(heading: str, first: str) -> list[list[str]]:
    """The cells of the table below a heading whose head begins with `first`."""
    text = TEXT.split(f"\n{heading}\n")[1]
    return cells_of(text[text.index(f"| {first} |") :].split("\n\n")[0])


def cells_of(text: str) -> list[list[str]]:
    """The cells of the tables in a text, row by row, with those of the heads and the lines below them."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def flat(text: str) -> str:
    return " ".join(text.split())


def said(*phrases: str, text: str = TEXT) -> None:
    for phrase in phrases:
        assert phrase in flat(text), phrase


def at(result: Result, tokens: float, tag: str = "val/loss") -> float:
    """The value of the validation nearest to a number of tokens."""
    return min(result.curve(tag), key=lambda point: abs(point[0] - tokens))[1]


def row(summary: Summary, design: str) -> Row:
    return next(row for row in summary.rows if row.variant.design == design)


def at_common_rate() -> Result:
    """mla with seed 2 after 490 M tokens at the rate of the other designs."""
    runs = {(r.variant.design, r.content["seed"], r.rate): r for r in read_results(FOLDER)}
    return runs["mla", 2, 1.5e-3]


def text_loss(row: Row) -> dict[str, Any]:
    """The record of the losses on validation text."""
    return text_loss_of(row.first)


def text_loss_of(result: Result) -> dict[str, Any]:
    """That of one run."""
    return next(record for record in result.content["evaluations"] if "ar_loss" in record)


def copying(row: Row, spec: str = "none") -> list[dict[str, Any]]:
    """The records of copying at all distances, uncompressed; `spec` is what they call that."""
    return [record for result in row.results for record in copying_of(result, spec)]


def copying_of(result: Result, spec: str) -> list[dict[str, Any]]:
    """Those of one run."""
    return copying_in(result.content["evaluations"], spec)


def copying_in(records: Sequence[dict[str, Any]], spec: str, task: str = "all") -> list[dict[str, Any]]:
    """Those of any records, at all distances or at one, `distance=512`."""
    which = ("copying", task, spec)
    return [record for record in records if tuple(map(record.get, ("suite", "task", "spec"))) == which]


def repeats(text: Mapping[str, Any]) -> float:
    """Of a record of losses: the percentage of validation tokens that repeat a bigram."""
    return 100 * text["ar_tokens"] / text["tokens_scored"]


def gap_of_parts(worse: Mapping[str, Any], better: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of two records of losses: the gap in nats, the percentage of it on tokens that repeat a bigram, and the gap in
    nats of the others."""
    gap, on_bigrams, others = (worse[tag] - better[tag] for tag in ("loss", "ar_loss", "other_loss"))
    return gap, repeats(worse) * on_bigrams / gap, others


def crossing_of(row: Row) -> tuple[float, float]:
    """The 90 % interval of where a design is predicted to cross mha, in G tokens."""
    assert row.crossing is not None
    assert row.crossing.interval is not None
    low, high = row.crossing.interval
    return low / 1e9, high / 1e9


def sessions_of(folder: Path) -> list[dict[str, Any]]:
    """The sessions of a study by their start."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "sessions").glob("*.json"))]


def busy(sessions: Sequence[Mapping[str, Any]], kind: str = "") -> tuple[float, float]:
    """Seconds of sessions on one device each, and the percentage of them in which it was busy; `kind` is `queued_` for
    those with four or more runs waiting."""
    seconds = sum(session[f"{kind}seconds"] for session in sessions)
    share = sum(session["devices"][0]["busy_queued" if kind else "busy"] for session in sessions) / seconds
    return seconds, 100 * share


def written(losses: Mapping[float, float | None], rates: Sequence[float]) -> list[str]:
    """Cells of a table: the loss at each rate, or nothing."""
    return ["" if (loss := losses.get(rate)) is None else f"{loss:.3f}" for rate in rates]


def to_mha(row: Row) -> str:
    """The cell of the difference to mha, empty for mha."""
    pairs = None if row.difference is None else row.difference.pairs
    return "" if pairs is None else f"{pairs.mean:+.3f}"


def copied(row: Row) -> str:
    """The cell of copying, empty if it was not measured."""
    found = [f"{c['accuracy']:.1f} ± {c['accuracy_stderr']:.1f}" for c in copying(row, "as it is")]
    return "".join(found)
