"""The numbers of docs/study.md about `studies/equal_bytes` are those of the files in docs/results."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from cllm.study.results import read_results
from cllm.study.schema import load_study
from cllm.study.summary import Row, Summary, summarise
from tests.study.page import DOCS, RESULTS, at, copying, row, said, table, text_loss

LONG = RESULTS / "2026-11-27-study-490m-h200"
HALF = RESULTS / "2026-11-28-study-equal-bytes-h200"


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(load_study(RESULTS / "2026-11-27-study-490m.yaml"), read_results(LONG))


@pytest.fixture(scope="module")
def half() -> Summary:
    return summarise(load_study(DOCS.parent / "configs/studies/equal_bytes.yaml"), read_results(HALF))


def name_of(row: Row) -> str:
    return row.variant.design.removesuffix("-half")


def searched(summary: Summary, design: str, tag: str = "val/loss") -> list[float]:
    """The last validation of a design's runs of the search, at 1.5e-3 and 3e-3."""
    runs = {r.content["rate"]: r for r in summary.used if r.content["search"] and r.variant.design == design}
    return [runs[rate].curve(tag)[-1][1] for rate in (1.5e-3, 3e-3)]


def long(row: Row) -> dict[float, float | None]:
    """The losses of a design's runs of 100 M tokens by their rates."""
    own = [r for r in read_results(HALF) if r.variant == row.variant and not r.content["search"]]
    return {result.rate: result.loss for result in own}


def learned(row: Row) -> float:
    """Tokens at the first validation with less than 3 nats on tokens that repeat a bigram."""
    return next(tokens for tokens, loss in row.first.curve("val/ar_loss") if loss < 3)


def test_the_table_of_equal_bytes(half: Summary) -> None:
    assert {result.name for result in half.used} == {file.stem for file in HALF.glob("*.json")}
    rows = sorted(half.rows, key=lambda row: row.loss.mean)
    gqa = row(half, "gqa-half").loss.mean
    _, _, *written = table("### Twelve designs, half of the cache", "design")
    expected = []
    for found in rows:
        short, kv = searched(half, found.variant.design), found.first.content["summary"]["kv_vs_mha"]
        losses = long(found)
        assert (1.5e-3 if short[0] < short[1] else 3e-3) in losses
        assert found.loss.mean == min(loss for loss in losses.values() if loss is not None)
        assert kv["resident"] == (1.0 if found.label == "mha" else 0.5)
        copied = [f"{c['accuracy']:.1f} ± {c['accuracy_stderr']:.1f}" for c in copying(found, "as it is")]
        pairs = None if found.difference is None else found.difference.pairs
        expected.append(
            [
                name_of(found),
                f"{kv['read']:.3f}",
                *(f"{loss:.3f}" for loss in short),
                *("" if rate not in losses else f"{losses[rate]:.3f}" for rate in (1.5e-3, 3e-3)),
                "" if pairs is None else f"{pairs.mean:+.3f}",
                "" if name_of(found) == "gqa" else f"{found.loss.mean - gqa:+.3f}",
                f"{learned(found) / 1e6:.0f} M",
                *(copied or [""]),
            ]
        )
    assert written == expected
    assert [found[0] for found in expected if not found[-1]] == ["fusedkv_rich"]
    (other,) = (r for r in read_results(HALF) if r.name.startswith("fusedkv_rich-half-lr0.003-100M"))
    wanted = ("copying", "all")
    (record,) = (r for r in other.content["evaluations"] if (r.get("suite"), r.get("task")) == wanted)
    said(f"at 3e-3 only: there it copies {record['accuracy']:.1f} ± {record['accuracy_stderr']:.1f} %")


def test_the_sentences_about_equal_bytes(half: Summary, summary: Summary) -> None:
    rows = {name_of(found): found for found in half.rows}
    order = sorted(rows, key=lambda name: rows[name].loss.mean)
    loss = {name: found.loss.mean for name, found in rows.items()}
    first, close, last = order[:4], order[4:10], order[10:]
    older = {result.variant.design: result for result in read_results(RESULTS / "2026-11-27-study-100m-h200")}
    apart = {name: abs(loss[name] - (older[name].loss or math.nan)) for name in ("mha", "fusedkv_lite")}
    assert older["mha"].content["code"] != rows["mha"].first.content["code"]
    largest = max(loss[b] - loss[a] for a, b in itertools.pairwise(close))
    assert largest < apart["mha"]
    said(
        f"{loss['mha']:.3f} and {older['mha'].loss:.3f}, {apart['mha']:.3f} apart",
        f"Those of fusedkv_lite are {apart['fusedkv_lite']:.3f} apart",
        f"by {loss[close[0]] - loss[first[3]]:.3f} or more: {', '.join(first[:3])} and {first[3]}.",
        f"They are {loss['mha'] - loss[first[3]]:.3f} to {loss['mha'] - loss[first[0]]:.3f} below mha",
        f"fusedkv and fusedkv_lite are {loss['fusedkv_lite'] - loss['fusedkv']:.4f} apart",
        f"{', '.join(close[:5])} and {close[5]} lie within {loss[close[5]] - loss[close[0]]:.3f}",
        f"each is within {largest:.3f} of the next",
    )

    def gap(name: str, tokens: float, base: str = "mha") -> float:
        return at(rows[name].first, tokens) - at(rows[base].first, tokens)

    later = {name: row(summary, name).difference.pairs.mean for name in ("fusedkv", "mla")}
    said(
        f"fusedkv was {-gap('fusedkv', 50e6):.3f} below mha at 50 M",
        f"after [490 M tokens](#seven-designs-490-m-tokens) it is {-later['fusedkv']:.3f} below",
        f"after 490 M tokens it was still {later['mla']:.3f} above mha",
    )
    for name, sentence in {
        "mla": "its gap to mha is {} at 50 M and {} at the end",
        "kv_tie": "kv_tie's {} and {}.",
    }.items():
        said(sentence.format(f"{gap(name, 50e6):.3f}", f"{gap(name, 100e6):.3f}"))
    at_tokens = {name: round(learned(found) / 1e6) for name, found in rows.items()}
    assert {at_tokens[name] for name in first} == {15, 20}
    assert {min(at_tokens[name] for name in close), max(at_tokens[name] for name in close)} == {25, 40}
    assert last == ["kv_tie", "mla"]
    said(f"at {at_tokens['kv_tie']} M in kv_tie and at {at_tokens['mla']} M in mla")
    differ = [
        (at_tokens[a] > at_tokens[b]) for a, b in itertools.combinations(order, 2) if at_tokens[a] != at_tokens[b]
    ]
    said(f"of the {len(differ)} pairs of designs that differ in it, {sum(differ)} differ the other way in their losses")
    scores = {name: text_loss(found) for name, found in rows.items() if name != "fusedkv_rich"}
    repeated = scores["mha"]["ar_tokens"] / scores["mha"]["tokens_scored"]
    parts, others = [], []
    measured = [name for name in first if name in scores]
    for name in measured:
        difference = {tag: scores["mha"][tag] - scores[name][tag] for tag in ("loss", "ar_loss", "other_loss")}
        parts.append(100 * repeated * difference["ar_loss"] / difference["loss"])
        others.append(difference["other_loss"])
    said(
        f"The {100 * repeated:.0f} % of validation tokens that repeat a bigram carry",
        f"carry {min(parts):.0f} to {max(parts):.0f} % of the gap to mha of "
        f"{', '.join(measured[:2])} and {measured[2]};",
        f"the other tokens are {min(others):.2f} to {max(others):.2f} nats better",
    )
    assert round(copying(rows["svformer"], "as it is")[0]["accuracy"]) == 2

    short = {name: searched(half, found.variant.design) for name, found in rows.items()}
    late = [n for n, found in rows.items() if min(searched(half, found.variant.design, "val/ar_loss")) > 3.95]
    assert len(late) == 8
    assert set(late) == {*close, *last}
    curve = [(tokens, gap("fusedkv_rich", tokens, "fusedkv")) for tokens, _ in rows["fusedkv"].first.curve("val/loss")]
    assert all(change > 0 for tokens, change in curve if tokens > 5e6)
    assert rows["fusedkv_rich"].first.rate == rows["fusedkv"].first.rate == 1.5e-3
    worse = {name: (long(rows[name])[3e-3] or math.nan) - loss[name] for name in ("cla", "fusedkv_rich")}
    said(
        f"mla's two rates differ by {short['mla'][1] - short['mla'][0]:.3f} after 20 M",
        f"3e-3 for cla by {short['cla'][0] - short['cla'][1]:.3f};",
        f"after 100 M tokens 3e-3 is {worse['cla']:.3f} worse there",
        f"and {worse['fusedkv_rich']:.3f} worse for fusedkv_rich, which it had preferred by "
        f"{short['fusedkv_rich'][0] - short['fusedkv_rich'][1]:.3f}",
        f"from 5 M tokens on, and {gap('fusedkv_rich', 100e6, 'fusedkv'):.3f} above",
    )
    assert {name for name, found in rows.items() if found.first.rate == 3e-3} == {"kv_tie"}


def test_speeds_and_busy_devices_of_the_study_of_equal_bytes(half: Summary) -> None:
    speed = {name_of(found): found.first.tokens_per_s or 0.0 for found in half.rows}
    alone = {
        r.variant.design: r.tokens_per_s or 0.0
        for r in half.used
        if r.content["search"] and r.content["rate"] == 1.5e-3
    }
    named = {
        name: f"{round(speed.pop(name) / 1e3)},000" for name in ("fusedkv_rich", "fusedkv", "mla", "ced", "mha", "yoco")
    }
    said(
        f"{round(min(speed.values()) / 1e3)},000 to {round(max(speed.values()) / 1e3)},000 tokens/s; "
        + ", ".join(f"{name} {named[name]}" for name in ("fusedkv_rich", "fusedkv", "mla", "ced")),
        f"{named['mha']} and {named['yoco']}, where the search had {round(alone['mha'] / 1e3)},000 and "
        f"{round(alone['yoco-half'] / 1e3)},000 at 1.5e-3",
    )
    sessions = [json.loads(file.read_text()) for file in sorted((HALF / "sessions").glob("*.json"))]
    assert len(sessions) == 6
    assert all(len(session["devices"]) == 1 for session in sessions)

    def busy(of: Sequence[dict[str, Any]], kind: str = "") -> tuple[float, str]:
        seconds = sum(session[f"{kind}seconds"] for session in of)
        share = sum(session["devices"][0]["busy_queued" if kind else "busy"] for session in of) / seconds
        return seconds, f"{100 * share:.0f} %"

    (every, share), (waiting, share_waiting) = busy(sessions), busy(sessions, "queued_")
    middle, newest = ([busy(of, kind)[1] for kind in ("", "queued_")] for of in (sessions[2:4], sessions[4:]))
    said(
        f"busy for {share}** of {every:,.0f} s of six sessions on one GPU each",
        f"for {share_waiting} of the {waiting:,.0f} s with four or more runs waiting",
        f"these are {middle[0].removesuffix(' %')} and {middle[1]};",
        f"a part of the next, {newest[0].removesuffix(' %')} and {newest[1]}:",
    )
