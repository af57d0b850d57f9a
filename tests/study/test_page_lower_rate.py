"""The numbers of docs/study_results.md about mla and swiftkv, which have half of the other designs' learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.statistics import Mean
from cllm.study.results import Result
from cllm.study.summary import Summary
from tests.study.page import (
    STUDY,
    at,
    at_common_rate,
    copying_of,
    gap_of_parts,
    repeats,
    row,
    said,
    text_loss_of,
)


def test_the_sentences_about_mla(summary: Summary) -> None:
    mla, mha, common = row(summary, "mla").results, row(summary, "mha").results, at_common_rate()
    assert [result.content["seed"] for result in mla] == [1, 2]
    assert {result.rate for result in mla} == {common.rate / 2}
    above = [(at(mla[i], 490e6) - at(mha[i], 490e6), at(mha[i], 245e6) - at(mla[i], 245e6)) for i in (0, 1)]
    gap, part, _ = gap_of_parts(text_loss_of(common), text_loss_of(mla[1]))
    lost, end = common.loss - mla[1].loss, f"{common.loss - mha[1].loss:.3f} above mha"
    share = f"{repeats(text_loss_of(common)):.0f} % of tokens that repeat a bigram"
    said(
        f"{above[0][0]:.3f} above it with seed 1 and {-above[1][0]:.3f} below with seed 2",
        f"both seeds are below mha's, by {above[0][1]:.3f} and {above[1][1]:.3f}",
        f"has {at(mla[0], 98e6):.3f} and {at(mla[1], 98e6):.3f} after 98 M tokens",
        f"its seed 2 ends at {common.loss:.3f}, which is {lost:.3f} above the same seed at half of that rate",
        f"and {end}. On the whole validation text the first of these is {gap:.3f}, "
        f"of which {part:.0f} % is on the {share}, less than",
        f"where it is {lost:.3f} better",
    )
    interval = row(summary, "mla").difference.pairs.interval
    assert [round(abs(end), 2) for end in interval] == [0.05, 0.05], "it may be 0.05 better or worse"
    said(
        f"mla ends {end}, and at half of it no difference is found",
        text=STUDY,
    )


def test_the_sentences_about_swiftkv(summary: Summary) -> None:
    swiftkv, mha, gqa = (row(summary, name).results[:2] for name in ("swiftkv", "mha", "gqa"))
    assert [[result.content["seed"] for result in of] for of in (swiftkv, mha, gqa)] == [[1, 2]] * 3
    assert {result.rate for result in swiftkv} == {gqa[0].rate / 2} == {mha[0].rate / 2}
    sizes = [of[0].content["summary"] for of in (swiftkv, gqa)]
    assert sizes[0]["kv_bytes_per_token"] == sizes[1]["kv_bytes_per_token"], "as many KV heads"

    def below(others: Sequence[Result], tokens: float = 490e6) -> list[float]:
        return [at(other, tokens) - at(own, tokens) for own, other in zip(swiftkv, others, strict=True)]

    gaps, wider = below(mha), below(gqa)
    early = [[f"{gap:.3f}" for gap in below(mha, tokens)] for tokens in (49e6, 98e6, 245e6)]
    text = text_loss_of(mha[1])["loss"] - text_loss_of(swiftkv[1])["loss"]
    interval = Mean.of([-gap for gap in wider]).interval
    assert interval is not None
    said(
        f"it is {gaps[0]:.3f} and {gaps[1]:.3f} below mha with the same seed. These differ by {gaps[0] - gaps[1]:.4f}.",
        f"On the whole validation text seed 2 is {text:.3f} below, so the choice of the text alone moves it by "
        f"{gaps[1] - text:.3f}.",
        f"is {wider[0]:.3f} and {wider[1]:.3f} below gqa with the same seed, at half of gqa's rate "
        f"(interval {interval[0]:+.3f} to {interval[1]:+.3f})",
        f"swiftkv was {early[0][0]} and {early[0][1]} below mha at 49 M, {early[1][0]} and {early[1][1]} at 98 M, and "
        f"{early[2][0]} and {early[2][1]} at 245 M.",
    )
    copied = [f"{copying_of(run, 'none')[0]['accuracy']:.1f}" for run in (swiftkv[1], gqa[1])]
    said(f"With seed 2 it copies {float(copied[0]):.0f} % of random tokens and gqa {copied[1]} %, one training each.")


def test_the_speed_of_swiftkv_on_another_machine(both: Summary) -> None:
    said(f"one swiftkv had {round((row(both, 'swiftkv-half').first.tokens_per_s or 0) / 1e3)},000")
