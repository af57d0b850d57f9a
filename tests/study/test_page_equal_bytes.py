"""The numbers of docs/study_results.md about `studies/equal_bytes` are those of the files in docs/results."""

from __future__ import annotations

import itertools
import math

from cllm.study.results import read_results
from cllm.study.summary import Row, Summary
from tests.study.page import (
    EQUAL_BYTES,
    README,
    RESULTS,
    at,
    at_common_rate,
    busy,
    copied,
    copying,
    copying_of,
    flat,
    gap_of_parts,
    repeats,
    row,
    said,
    sessions_of,
    table,
    text_loss,
    to_mha,
    written,
)

RATES = (1.5e-3, 3e-3)


def at_share(summary: Summary, share: str) -> list[Row]:
    """The designs at a share of mha's cache, `half` or `quarter`, and mha, the lowest loss first."""
    rows = [row for row in summary.rows if row.label == "mha" or row.variant.design.endswith(f"-{share}")]
    return sorted(rows, key=lambda row: row.loss.mean)


def name_of(row: Row) -> str:
    return row.variant.design.partition("-")[0]


def searched(summary: Summary, design: str, tag: str = "val/loss") -> dict[float, float]:
    """The last validation of a design's runs of the search by their rates."""
    runs = {r.content["rate"]: r for r in summary.used if r.content["search"] and r.variant.design == design}
    return {rate: run.curve(tag)[-1][1] for rate, run in runs.items()}


def long(summary: Summary, row: Row) -> dict[float, float]:
    """The losses of a design's runs of 100 M tokens by their rates."""
    own = [r for r in summary.used if r.variant == row.variant and not r.content["search"]]
    return {result.rate: result.loss or math.nan for result in own if result.rate is not None}


def learned(row: Row) -> float:
    """Tokens at the first validation with less than 3 nats on tokens that repeat a bigram."""
    return next(tokens for tokens, loss in row.first.curve("val/ar_loss") if loss < 3)


def test_no_result_is_left_out(both: Summary) -> None:
    assert {result.name for result in both.used} == {file.stem for file in EQUAL_BYTES.glob("*.json")}


def test_the_table_of_half_of_the_cache(both: Summary) -> None:
    gqa = row(both, "gqa-half").loss.mean
    expected = []
    for found in at_share(both, "half"):
        short, losses = searched(both, found.variant.design), long(both, found)
        assert min(short, key=lambda rate: short[rate]) in losses
        assert found.loss.mean == min(losses.values())
        kv = found.first.content["summary"]["kv_vs_mha"]
        assert kv["resident"] == (1.0 if found.label == "mha" else 0.5)
        against = "" if name_of(found) == "gqa" else f"{found.loss.mean - gqa:+.3f}"
        rates = [*written(short, RATES), *written(losses, RATES)]
        cells = [to_mha(found), against, f"{learned(found) / 1e6:.0f} M", copied(found)]
        expected.append([name_of(found), f"{kv['read']:.3f}", *rates, *cells])
    _, _, *rows = table("## Designs at half of the cache", "design")
    assert rows == expected
    assert [found[0] for found in expected if not found[-1]] == ["fusedkv_rich"]
    (other,) = (r for r in both.used if r.name.startswith("fusedkv_rich-half-lr0.003-100M"))
    (record,) = copying_of(other, "as it is")
    said(f"at 3e-3 only: there it copies {record['accuracy']:.1f} ± {record['accuracy_stderr']:.1f} %")


def test_the_table_of_a_quarter_of_the_cache(both: Summary) -> None:
    halves = {name_of(found): found for found in at_share(both, "half")}
    expected = []
    for found in at_share(both, "quarter"):
        name, kv = name_of(found), found.first.content["summary"]["kv_vs_mha"]
        assert kv["resident"] == (1.0 if name == "mha" else 0.25)
        losses, short = long(both, found), searched(both, found.variant.design)
        assert found.loss.mean == min(losses.values())
        rates = [*written(short, RATES), *written(losses, RATES)]
        against = "" if name in ("mha", "xmla") else f"{found.loss.mean - halves[name].loss.mean:+.3f}"
        cells = [to_mha(found), against, f"{learned(found) / 1e6:.0f} M", copied(found)]
        expected.append([name, f"{kv['read']:.3f}", *rates, *cells])
    _, _, *rows = table("## Designs at a quarter of the cache", "design")
    assert rows == expected


def test_the_two_rates_of_a_quarter_of_the_cache(both: Summary) -> None:
    rows = {name_of(found): found for found in at_share(both, "quarter")}
    short = {name: searched(both, found.variant.design) for name, found in rows.items()}
    preferred = {name for name, losses in short.items() if losses[3e-3] < losses[1.5e-3]}
    trained = {name for name, found in rows.items() if 3e-3 in long(both, found)}
    assert trained == preferred == {"fusedkv", "fusedkv_lite", "fusedkv_rich", "svformer", "kv_tie"}
    losses = {name: long(both, rows[name]) for name in trained}
    worse = {name: of[3e-3] - of[1.5e-3] for name, of in losses.items()}
    copies = {}
    for result in both.used:
        name, _, share = result.variant.design.partition("-")
        if share == "quarter" and result.rate == 3e-3 and not result.content["search"]:
            (record,) = copying_of(result, "as it is")
            copies[name] = f"{record['accuracy']:.1f}"
    said(
        "preferred 3e-3 for five designs, for fusedkv by "
        f"{short['fusedkv'][1.5e-3] - short['fusedkv'][3e-3]:.3f} nats.",
        f"{worse['fusedkv']:.3f} worse for fusedkv, {worse['fusedkv_lite']:.3f} for fusedkv_lite, "
        f"{worse['fusedkv_rich']:.3f} for fusedkv_rich and {worse['svformer']:.3f} for svformer, "
        f"and {-worse['kv_tie']:.3f} better for kv_tie",
        f"{copies['fusedkv']}, {copies['fusedkv_lite']} and {copies['fusedkv_rich']} % of random tokens",
    )


def test_the_sentences_about_a_quarter_of_the_cache(both: Summary) -> None:
    rows, halves = ({name_of(found): found for found in at_share(both, share)} for share in ("quarter", "half"))
    gap = {name: found.loss.mean - rows["mha"].loss.mean for name, found in rows.items()}
    first, last = ("fusedkv", "fusedkv_lite", "fusedkv_rich", "svformer"), ("xmla", "kv_tie")
    assert tuple(rows)[:4] == first
    assert tuple(rows)[-2:] == last
    around = [name for name in tuple(rows)[4:-2] if name != "mha"]
    change = {name: rows[name].loss.mean - found.loss.mean for name, found in halves.items() if name != "mha"}
    lost = sorted(value for value in change.values() if value > 0)
    assert len(lost) == 9
    younger = {name: at(rows[name].first, 50e6) - at(rows["mha"].first, 50e6) for name in ("gqa", "cla", "mla")}
    when = {name: [round(learned(of[name]) / 1e6) for of in (rows, halves)] for name in ("yoco", "mla")}
    said(
        f"{', '.join(first[:3])} and {first[3]} are {-gap[first[3]]:.3f} to {-gap[first[0]]:.3f} below mha",
        f"{rows[around[0]].loss.mean - rows[first[3]].loss.mean:.3f} or more below all others",
        f"They lose {min(change[n] for n in first):.3f} to {max(change[n] for n in first):.3f} to",
        f"from {-gap[around[0]]:.3f} below to {gap[around[-1]]:.3f} above: {', '.join(around[:5])} and {around[5]}.",
        f"gqa was {younger['gqa']:.3f} above mha, cla {younger['cla']:.3f} and mla {younger['mla']:.3f}:",
        f"xmla and kv_tie are {gap['xmla']:.3f} and {gap['kv_tie']:.3f} above mha",
        f"nine designs lose {lost[0]:.3f} to {lost[-1]:.3f}, and two gain**: yoco {-change['yoco']:.3f} and "
        f"mla {-change['mla']:.3f}.",
        f"yoco at {when['yoco'][0]} M tokens and not at {when['yoco'][1]} M, "
        f"mla at {when['mla'][0]} M and not at {when['mla'][1]} M",
        f"fusedkv_rich is {rows['fusedkv_rich'].loss.mean - rows['fusedkv'].loss.mean:.3f} above fusedkv.",
    )
    percent = {name: float(copied(found).split()[0]) for name, found in rows.items()}
    half = {name: float(copied(halves[name]).split()[0]) for name in ("fusedkv", "fusedkv_lite")}
    said(
        f"copy {percent.pop('fusedkv_rich')} and {percent.pop('fusedkv')} % of random tokens, fusedkv_lite "
        f"{percent.pop('fusedkv_lite')}, all others {max(percent.values()):.0f} % or less",
        f"With half of the cache fusedkv had {half['fusedkv']} and fusedkv_lite {half['fusedkv_lite']}.",
    )
    speed = {name: found.first.tokens_per_s or 0.0 for name, found in rows.items() if name != "mha"}
    ced = speed.pop("ced")
    said(
        f"At a quarter, on other machines: {round(min(speed.values()) / 1e3)},000 to "
        f"{round(max(speed.values()) / 1e3)},000, and ced {round(ced / 1e3)},000"
    )


def test_the_sentence_of_the_readme(both: Summary) -> None:
    best = [[name_of(found) for found in at_share(both, share)[:4]] for share in ("half", "quarter")]
    assert best[0] == best[1] == ["fusedkv", "fusedkv_lite", "fusedkv_rich", "svformer"]
    rows = [found for share in ("half", "quarter") for found in at_share(both, share)[:4]]
    least = min(row(both, "mha").loss.mean - found.loss.mean for found in rows)
    readme = flat(README)
    assert f"They are at least {least:.3f} nats below mha." in readme


def test_the_sentences_about_half_of_the_cache(both: Summary, summary: Summary) -> None:
    rows = {name_of(found): found for found in at_share(both, "half")}
    order = list(rows)
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

    later = row(summary, "fusedkv").difference.pairs.mean
    mla = at_common_rate().loss - row(summary, "mha").results[1].loss
    said(
        f"fusedkv was {-gap('fusedkv', 50e6):.3f} below mha at 50 M",
        f"after [490 M tokens](#designs-after-490-m-tokens) it is {-later:.3f} below",
        f"at this rate it was still {mla:.3f} above mha after 490 M tokens",
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
    measured = [name for name in first if name in scores]
    _, parts, others = zip(*(gap_of_parts(scores["mha"], scores[name]) for name in measured), strict=True)
    said(
        f"The {repeats(scores['mha']):.0f} % of validation tokens that repeat one carry",
        f"carry {min(parts):.0f} to {max(parts):.0f} % of the gap to mha of "
        f"{', '.join(measured[:2])} and {measured[2]};",
        f"the other tokens are {min(others):.2f} to {max(others):.2f} nats better",
    )
    assert round(copying(rows["svformer"], "as it is")[0]["accuracy"]) == 2

    short = {name: searched(both, found.variant.design) for name, found in rows.items()}
    late = [n for n, found in rows.items() if min(searched(both, found.variant.design, "val/ar_loss").values()) > 3.95]
    assert len(late) == 8
    assert set(late) == {*close, *last}
    curve = [(tokens, gap("fusedkv_rich", tokens, "fusedkv")) for tokens, _ in rows["fusedkv"].first.curve("val/loss")]
    assert all(change > 0 for tokens, change in curve if tokens > 5e6)
    assert rows["fusedkv_rich"].first.rate == rows["fusedkv"].first.rate == 1.5e-3
    worse = {name: long(both, rows[name])[3e-3] - loss[name] for name in ("cla", "fusedkv_rich")}
    said(
        f"mla's two rates differ by {short['mla'][3e-3] - short['mla'][1.5e-3]:.3f} after 20 M",
        f"3e-3 for cla by {short['cla'][1.5e-3] - short['cla'][3e-3]:.3f};",
        f"after 100 M tokens 3e-3 is {worse['cla']:.3f} worse there",
        f"and {worse['fusedkv_rich']:.3f} worse for fusedkv_rich, which it had preferred by "
        f"{short['fusedkv_rich'][1.5e-3] - short['fusedkv_rich'][3e-3]:.3f}",
        f"from 5 M tokens on, and {gap('fusedkv_rich', 100e6, 'fusedkv'):.3f} above",
    )
    assert {name for name, found in rows.items() if found.first.rate == 3e-3} == {"kv_tie"}
    tied = long(both, rows["kv_tie"])
    said(f"kv_tie's two long runs are {tied[1.5e-3] - tied[3e-3]:.3f} apart")


def test_speeds_and_busy_devices_of_the_study_of_equal_bytes(both: Summary) -> None:
    speed = {name_of(found): found.first.tokens_per_s or 0.0 for found in at_share(both, "half")}
    alone = {
        r.variant.design: r.tokens_per_s or 0.0
        for r in both.used
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
    *sessions, last = sessions_of(EQUAL_BYTES)
    assert len(sessions) == 10
    assert all(len(session["devices"]) == 1 for session in sessions)

    (every, share), (waiting, share_waiting) = busy(sessions), busy(sessions, "queued_")
    each = [f"{busy([session])[1]:.0f}" for session in sessions]
    minutes = [round(session["seconds"] / 60) for session in sessions]
    shares = [100 * device["busy"] / last["seconds"] for device in last["devices"]]
    said(
        f"busy for {share:.0f} %** of {every:,.0f} s of ten sessions on one GPU each",
        f"for {share_waiting:.0f} % of the {waiting:,.0f} s with four or more runs waiting",
        f"In the two longest sessions, of {minutes[6]} and {minutes[7]} minutes, it was {each[6]} and {each[7]} %.",
        f"In two of {minutes[4]} and {minutes[5]} minutes it was {each[4]} and {each[5]} %:",
        f"In the last two, of {minutes[8]} and {minutes[9]} minutes, it was {each[8]} and {each[9]} %;",
        f"In an eleventh session, on 2026-11-30, of {last['seconds'] / 60:.0f} minutes with one run on each of two "
        f"GPUs, they were busy for {shares[0]:.0f} and {shares[1]:.0f} %.",
    )
