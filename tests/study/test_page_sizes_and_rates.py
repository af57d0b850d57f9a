"""The numbers of docs/study_results.md about `studies/110m` and the search of rates are those of docs/results."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest

from cllm.study.results import Result, read_results
from cllm.study.schema import load_study
from cllm.study.summary import Summary, summarise
from tests.study.page import (
    DOCS,
    FOLDER,
    README,
    RESULTS,
    STUDY,
    at,
    busy,
    cells_of,
    copied,
    crossing_of,
    gap_of_parts,
    repeats,
    row,
    said,
    sessions_of,
    table,
    text_loss,
    text_loss_of,
    to_mha,
    written,
)

SIZE = RESULTS / "2026-11-29-study-110m-h200"
RATES = RESULTS / "2026-11-29-study-rates-50m-h200"
SWIFTKV = RESULTS / "2026-11-30-study-rates-swiftkv-h200"


@pytest.fixture(scope="module")
def larger() -> Summary:
    return summarise(load_study(DOCS.parent / "configs/studies/110m.yaml"), read_results(SIZE))


def answers(sentence: str) -> None:
    """The short forms of both pages say it too."""
    for text in (STUDY, README):
        said(sentence, text=text)


def test_the_table_of_110m(larger: Summary) -> None:
    assert {result.name for result in larger.used} == {file.stem for file in SIZE.glob("*.json")}
    expected = []
    for found in sorted(larger.rows, key=lambda found: found.loss.mean):
        first = found.first
        losses = [f"{at(first, tokens):.3f}" for tokens in (50e6, 100e6, 150e6, 200e6, 250e6)]
        shares = first.content["summary"]["kv_vs_mha"]
        bytes_ = [f"{shares[part]:.3f}" for part in ("resident", "read")]
        expected.append([found.label, *bytes_, *losses, to_mha(found), copied(found)])
        assert first.content["summary"]["parameters"] == pytest.approx(110.1e6, rel=2e-3)
    _, _, *rows = table("## One size up: 110 M", "design")
    assert rows == expected


def test_the_sentences_about_110m(larger: Summary) -> None:
    mha, *others = (row(larger, design) for design in ("mha", "fusedkv", "fusedkv_lite", "svformer"))
    gaps = {found.label: mha.loss.mean - found.loss.mean for found in others}
    range_ = f"{min(gaps.values()):.3f} to {max(gaps.values()):.3f}"
    early = [at(mha.first, 50e6) - at(found.first, 50e6) for found in others]
    score = text_loss(mha)
    _, carried, left = zip(*(gap_of_parts(score, text_loss(found)) for found in others), strict=True)
    crossings = ["{:.2f} to {:.2f} G".format(*crossing_of(found)) for found in others]
    speed = {found.label: f"{round((found.first.tokens_per_s or 0) / 1e3)},000" for found in larger.rows}
    said(
        f"{speed['mha']} tokens/s with mha, {speed['fusedkv_lite']} with fusedkv_lite, "
        f"{speed['svformer']} with svformer and {speed['fusedkv']} with fusedkv",
        f"All three are {range_} nats below mha with about half of its cache",
        f"are {gaps['fusedkv'] - gaps['fusedkv_lite']:.4f} apart: not distinguishable",
        f"the three were {min(early):.3f} to {max(early):.3f} below mha",
        f"cross mha's at {crossings[0]} tokens (fusedkv, 90 % interval), {crossings[1]} (fusedkv_lite) "
        f"and {crossings[2]} (svformer)",
        f"{min(carried):.0f} to {max(carried):.0f} % is carried by the {repeats(score):.0f} % of tokens",
        f"The other tokens are {min(left):.2f} to {max(left):.2f} nats better",
    )
    shares = [busy([session]) for session in sessions_of(SIZE)]
    said("busy for " + " and for ".join(f"{share:.0f} % of {seconds:,.0f} s" for seconds, share in shares))
    answers(f"fusedkv, fusedkv_lite and svformer are {range_} nats below mha")


def test_the_gap_of_110m_beside_that_of_47m(larger: Summary, both: Summary, summary: Summary) -> None:
    gaps = []
    for design in ("fusedkv", "fusedkv_lite", "svformer"):
        losses = [(row(larger, "mha"), row(larger, design)), (row(both, "mha"), row(both, f"{design}-half"))]
        gaps.append([mha.loss.mean - found.loss.mean for mha, found in losses])
    assert all(here < there for here, there in gaps)
    said(f"they are both {gaps[0][1]:.3f} below it, [svformer {gaps[2][1]:.3f}]")
    assert gaps[0][1] == pytest.approx(gaps[1][1], abs=1e-3), "both"
    below = []
    for design in ("fusedkv", "fusedkv_lite"):
        pairs = zip(row(summary, "mha").results, row(summary, design).results, strict=True)
        below.append(statistics.mean(at(mha, 245e6) - at(found, 245e6) for mha, found in pairs))
    said(f"There fusedkv and fusedkv_lite are {below[0]:.3f} and {below[1]:.3f} below mha after as many tokens")
    said(f"At 47 M fusedkv is {below[0]:.3f} below it", text=STUDY)
    sizes = [found.first.content["summary"]["parameters"] for found in (row(both, "mha"), row(larger, "mha"))]
    said(f"for each parameter, {100e6 / sizes[0]:.1f} there and {250e6 / sizes[1]:.1f} here")


def rows_of(summary: Summary, rates: tuple[float, ...]) -> list[list[str]]:
    """The rows of a table of rates: design, tokens, and the loss at each rate."""
    found = []
    for label, searched in summary.searches.items():
        losses: dict[int, dict[float, float | None]] = {}
        for part in searched.rounds:  # rates beyond the values are rounds of their own
            losses.setdefault(part.tokens, {}).update(part.losses)
        for tokens, of in losses.items():
            if any(cells := written(of, rates)):
                digits = 0 if tokens > 2e6 else 1
                found.append([label, f"{tokens / 1e6:.{digits}f} M", *cells])
    return found


@dataclass(frozen=True)
class Rates:
    """The search of rates after 50 M tokens: runs by design, rate and tokens."""

    summary: Summary

    def run(self, rate: float, tokens: float, design: str) -> Result:
        point = (design, rate, tokens)
        return next(r for r in self.summary.used if (r.variant.design, r.rate, r.content["tokens"]) == point)

    def loss(self, rate: float, tokens: float, design: str) -> float:
        return at(self.run(rate, tokens, design), tokens)

    def costs(self, rate: float, tokens: float, design: str) -> str:
        """How much higher the loss is than at 1.5e-3."""
        return f"{self.loss(rate, tokens, design) - self.loss(1.5e-3, tokens, design):.3f}"

    def better(self, tokens: float, design: str, than: float = 1.5e-3) -> str:
        """How much lower the loss is at 7.5e-4."""
        return f"{self.loss(than, tokens, design) - self.loss(7.5e-4, tokens, design):.3f}"


@pytest.fixture(scope="module")
def searched() -> Rates:
    return Rates(summarise(load_study(RESULTS / "2026-11-29-study-rates-50m.yaml"), read_results(RATES)))


@pytest.fixture(scope="module")
def swiftkv() -> Rates:
    return Rates(summarise(load_study(RESULTS / "2026-11-30-study-rates-swiftkv.yaml"), read_results(SWIFTKV)))


def test_the_table_of_rates(searched: Rates, swiftkv: Rates) -> None:
    expected = []
    for of, folder in ((searched.summary, RATES), (swiftkv.summary, SWIFTKV)):
        assert {result.name for result in of.used} == {file.stem for file in folder.glob("*.json")}
        expected += rows_of(of, (3.75e-4, 7.5e-4, 1.5e-3, 3e-3))
    _, _, *rows = table("## Learning rates after 50 M tokens", "design")
    assert rows == expected


def test_lower_rates_lead_early(searched: Rates) -> None:
    for design in ("mha", "gqa", "cla-2"):
        low, high = (searched.run(rate, 50e6, design) for rate in (7.5e-4, 1.5e-3))
        assert all(at(low, tokens) < at(high, tokens) for tokens, _ in low.curve("val/loss") if 4e6 < tokens < 21e6)
        assert at(low, 50e6) > at(high, 50e6)
    said("mha, gqa and cla-2 lead at half of 1.5e-3 for the first 20 M of 50 M tokens, and trail at the end")


def test_the_rate_of_swiftkv(searched: Rates, swiftkv: Rates, summary: Summary) -> None:
    search = swiftkv.summary.searches["swiftkv"]
    assert (search.chosen, search.at_edge) == ((7.5e-4,), True), "a quarter of 1.5e-3 was not tried"
    long = row(summary, "swiftkv").results
    assert {result.rate for result in long} == {*search.chosen}
    assert {result.code for result in long} == {result.code for result in swiftkv.summary.used}
    seeds = [at(result, 49e6) for result in long]
    said(
        f"half of 1.5e-3 is {swiftkv.better(50e6, 'swiftkv')} better. "
        f"Its two seeds are {max(seeds) - min(seeds):.3f} apart at this age"
    )
    gqa = searched.loss(1.5e-3, 50e6, "gqa")
    above = [swiftkv.loss(rate, 50e6, "swiftkv") - gqa for rate in (1.5e-3, 7.5e-4)]
    said(f"it is {above[0]:.3f} above gqa at 1.5e-3, and {above[1]:.3f} above at the better rate of each")
    by = swiftkv.better(50e6, "swiftkv")
    said(f"in its search that was {by} better", text=STUDY)
    said(f"swiftkv's search preferred half of it by {by},", text=README)


def test_the_better_rate_of_each_design(searched: Rates, summary: Summary) -> None:
    searches = searched.summary.searches
    yoco = [text_loss_of(searched.run(rate, 50e6, "yoco"))["loss"] for rate in (1.5e-3, 7.5e-4)]
    seeds = [at(result, 49e6) for result in row(summary, "yoco").results]
    tried = {(r.variant.design, r.rate) for r in searched.summary.used if r.content["tokens"] == 50e6}
    assert {design for design, rate in tried if rate == 3e-3} == {"fusedkv", "fusedkv_lite"}
    assert {design for design, rate in tried if rate == 7.5e-4} == searches.keys() - {"fusedkv", "fusedkv_lite"}
    lower = {"mla", "yoco"}
    assert {label: search.chosen for label, search in searches.items()} == {
        label: (7.5e-4 if label in lower else 1.5e-3,) for label in searches
    }
    assert not any(search.at_edge for search in searches.values())
    worse = {label: searched.better(50e6, label).removeprefix("-") for label in ("mha", "cla-2", "gqa")}
    twice = {label: searched.costs(3e-3, 50e6, label) for label in ("fusedkv", "fusedkv_lite")}
    said(
        f"Half of 1.5e-3 is {worse['mha']} nats worse for mha, {worse['cla-2']} for cla-2 and {worse['gqa']} for gqa",
        f"twice as much is {twice['fusedkv']} worse for fusedkv and {twice['fusedkv_lite']} for fusedkv_lite",
        f"half of 1.5e-3 is {searched.better(50e6, 'yoco')} better at the last validation and "
        f"{yoco[0] - yoco[1]:.3f} on a million tokens",
        f"Seeds of yoco were {max(seeds) - min(seeds):.3f} apart at this age",
        f"from 1.5e-3 to 3e-3 after 25 M tokens: {searched.costs(3e-3, 25e6, 'mha')} and "
        f"{searched.costs(3e-3, 25e6, 'mla')} nats",
    )
    answers("the better of two after 50 M tokens, or (yoco) not distinguishable from half of it")


def test_what_a_search_of_25m_tokens_would_have_found(searched: Rates, swiftkv: Rates) -> None:
    of = {**dict.fromkeys(searched.summary.searches, searched), "swiftkv": swiftkv}
    gain = {label: rates.better(25e6, label) for label, rates in of.items()}
    six = ("gqa", "mha", "cla-2", "swiftkv", "yoco", "mla")
    assert {label for label, by in gain.items() if float(by) > 0} == {*six}
    by = ", ".join(f"{gain[label]} ({label})" for label in six[:-1])
    said(f"better for six designs: by {by} and {gain['mla']} (mla)")
    changed = [label for label in six if float(of[label].better(50e6, label)) < 0]
    assert changed == ["gqa", "mha", "cla-2"], "three of these six had changed sides"
    late = searched.loss(1.5e-3, 50e6, "mha") - searched.loss(1.5e-3, 50e6, "fusedkv")
    early = searched.loss(7.5e-4, 25e6, "mha") - searched.loss(1.5e-3, 25e6, "fusedkv")
    said(
        f"the gap of fusedkv to mha is {late:.3f} after 50 M tokens",
        f"At the best rates after 25 M it was {early:.3f}.",
    )


def test_the_rate_of_mla(searched: Rates) -> None:
    mla = searched.summary.searches["mla"]
    assert (mla.chosen, mla.at_edge) == ((7.5e-4,), False)
    early, late = (searched.better(tokens, "mla") for tokens in (25e6, 50e6))
    runs = {rate: searched.run(rate, 50e6, "mla") for rate in (3.75e-4, 7.5e-4, 1.5e-3)}
    bigrams = {rate: f"{at(run, 50e6, 'val/ar_loss'):.2f}" for rate, run in runs.items()}
    high, low = (text_loss_of(runs[rate]) for rate in (1.5e-3, 7.5e-4))
    gap, part, others = gap_of_parts(high, low)
    assert high["tokens_scored"] == 1_000_000
    said(
        f"half of it is {early} nats better after 25 M tokens and {late} after 50 M.",
        f"A quarter of it is worse than half, by {searched.better(50e6, 'mla', than=3.75e-4)}",
        f"is {bigrams[7.5e-4]} at 7.5e-4, and {bigrams[3.75e-4]} and {bigrams[1.5e-3]} at the other two",
        f"7.5e-4 is {gap:.3f} nats better than 1.5e-3, of which {part:.0f} % is on tokens that repeat a "
        f"bigram; the others are {others:.3f} better",
    )


def test_the_sessions_of_rates() -> None:
    longest = max(sessions_of(RATES), key=lambda session: session["seconds"])
    seconds, share = busy([longest])
    said(f"the GPU was busy for {share:.0f} % of {seconds:,.0f} s. The first start is not hidden")
    last = sessions_of(RATES)[-1]
    total, queued = last["seconds"], last["queued_seconds"]
    shares = [100 * device["busy"] / total for device in last["devices"]]
    waiting = 50 * sum(device["busy_queued"] for device in last["devices"]) / queued
    said(
        f"two GPUs were busy for {shares[0]:.0f} and {shares[1]:.0f} % of {total:.0f} s, and for {waiting:.0f} % of "
        f"the {queued:.0f} s with four or more runs waiting"
    )


def test_rates_with_and_without_a_norm_on_keys() -> None:
    study = load_study(RESULTS / "2026-11-29-study-rates-norm-1m-cpu.yaml")
    folder = RESULTS / "2026-11-29-study-rates-norm-1m-cpu"
    summary = summarise(study, read_results(folder))
    assert {result.name for result in summary.used} == {file.stem for file in folder.glob("*.json")}
    log = (DOCS / "log" / "designs.md").read_text(encoding="utf-8")
    text = log.split("## 2026-11-29, two CPU cores: rates")[1].split("\n\n| design |")[1].split("\n\n")[0]
    assert cells_of(text)[1:] == rows_of(summary, (1.5e-3, 3e-3, 6e-3, 1.2e-2))
    assert {(found.chosen, found.at_edge) for found in summary.searches.values()} == {((6e-3,), False)}
    first = {label: found.rounds[0].losses for label, found in summary.searches.items()}
    above = {label: f"{(losses[1.2e-2] or 0) - (losses[6e-3] or 0):.3f}" for label, losses in first.items()}
    said(f"twice that rate costs {above['mha']}, {above['mha-no-norm']} and {above['mla']} nats")
    gap = row(summary, "mha").loss.mean - row(summary, "mha-no-norm").loss.mean
    said(f"mha without the norm is {gap:.3f} below mha with it", text=log)


def test_repeated_bigrams_carry_the_early_gap(larger: Summary) -> None:
    runs = {result.variant.design: result for result in read_results(RESULTS / "2026-11-27-study-100m-h200")}
    share = repeats(text_loss(row(larger, "mha")))  # of the same validation text

    def carried(mha: Result, lite: Result, tokens: float) -> float:
        change = [at(mha, tokens, tag) - at(lite, tokens, tag) for tag in ("val/ar_loss", "val/loss")]
        return share * change[0] / change[1]

    early, late = (carried(runs["mha"], runs["fusedkv_lite"], tokens) for tokens in (25e6, 100e6))
    longer = {(r.variant.design, r.content["seed"]): r for r in read_results(FOLDER)}
    ends = [carried(longer["mha", seed], longer["fusedkv_lite", seed], 490e6) for seed in (1, 2, 3)]
    said(
        f"After 25 M tokens these tokens carry {early:.0f} % of the difference and after 100 M {late:.0f} %, "
        f"hardly more than their share of {share:.0f} %. In the three seeds after 490 M it is "
        f"{min(ends):.0f} to {max(ends):.0f} %."
    )
