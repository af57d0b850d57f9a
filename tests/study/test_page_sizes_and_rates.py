"""The numbers of docs/study_results.md about `studies/110m` and the search of rates are those of docs/results."""

from __future__ import annotations

import json

import pytest

from cllm.study.results import Result, read_results
from cllm.study.schema import load_study
from cllm.study.summary import Summary, summarise
from tests.study.page import DOCS, RESULTS, at, copied, flat, row, said, table, text_loss, to_mha, written

SIZE = RESULTS / "2026-11-29-study-110m-h200"
RATES = RESULTS / "2026-11-29-study-rates-50m-h200"


@pytest.fixture(scope="module")
def larger() -> Summary:
    return summarise(load_study(DOCS.parent / "configs/studies/110m.yaml"), read_results(SIZE))


def answers(sentence: str) -> None:
    """The short forms of both pages say it too."""
    for page in ("docs/study.md", "README.md"):
        assert sentence in flat((DOCS.parent / page).read_text(encoding="utf-8")), page


def test_the_table_of_110m(larger: Summary) -> None:
    assert {result.name for result in larger.used} == {file.stem for file in SIZE.glob("*.json")}
    expected = []
    for found in sorted(larger.rows, key=lambda found: found.loss.mean):
        first = found.first
        losses = [f"{at(first, tokens):.3f}" for tokens in (50e6, 100e6, 150e6, 200e6, 250e6)]
        share = first.content["summary"]["kv_vs_mha"]["resident"]
        expected.append([found.label, f"{share:.3f}", *losses, to_mha(found), copied(found)])
        assert first.content["summary"]["parameters"] == pytest.approx(110.1e6, rel=1e-3)
    _, _, *rows = table("## One size up: 110 M", "design")
    assert rows == expected


def test_the_sentences_about_110m(larger: Summary) -> None:
    lite, mha = row(larger, "fusedkv_lite"), row(larger, "mha")
    gap = mha.loss.mean - lite.loss.mean
    small = {result.variant.design: result for result in read_results(RESULTS / "2026-11-27-study-100m-h200")}
    before = at(small["mha"], 100e6) - at(small["fusedkv_lite"], 100e6)
    ratios = [100e6 / small["mha"].content["summary"]["parameters"], 250e6 / mha.first.content["summary"]["parameters"]]
    scores = [text_loss(found) for found in (mha, lite)]
    change = {tag: scores[0][tag] - scores[1][tag] for tag in ("loss", "ar_loss", "other_loss")}
    share = 100 * scores[0]["ar_tokens"] / scores[0]["tokens_scored"]
    assert lite.crossing is not None
    assert lite.crossing.interval is not None
    crossing = "{:.2f} to {:.2f} G".format(*(tokens / 1e9 for tokens in lite.crossing.interval))
    speeds = [f"{round((found.first.tokens_per_s or 0) / 1e3)},000" for found in (mha, lite)]
    (session,) = (json.loads(file.read_text()) for file in (SIZE / "sessions").glob("*.json"))
    said(
        f"{speeds[0]} and {speeds[1]} tokens/s",
        f"fusedkv_lite is {gap:.3f} nats below mha with half of its cache",
        f"With 47 M parameters it was {before:.3f} below",
        f"for each parameter: {ratios[0]:.1f} there, {ratios[1]:.1f} here",
        f"from {at(mha.first, 50e6) - at(lite.first, 50e6):.3f} at 50 M tokens to {gap:.3f}",
        f"cross at {crossing} tokens (90 % interval)",
        f"{share * change['ar_loss'] / change['loss']:.0f} % is carried by the {share:.0f} % of tokens",
        f"the other tokens are {change['other_loss']:.2f} nats better",
        f"busy for {100 * session['devices'][0]['busy'] / session['seconds']:.0f} % of {session['seconds']:,.0f} s",
    )
    answers(f"fusedkv_lite is {gap:.3f}")


def rows_of(summary: Summary, rates: tuple[float, ...]) -> list[list[str]]:
    """The rows of a table of rates: design, tokens, and the loss at each rate."""
    found = []
    for label, searched in summary.searches.items():
        for part in searched.rounds:
            if any(cells := written(part.losses, rates)):
                digits = 0 if part.tokens > 2e6 else 1
                found.append([label, f"{part.tokens / 1e6:.{digits}f} M", *cells])
    return found


def test_the_table_of_rates() -> None:
    study = load_study(RESULTS / "2026-11-29-study-rates-50m.yaml")
    summary = summarise(study, read_results(RATES))
    assert {result.name for result in summary.used} == {file.stem for file in RATES.glob("*.json")}
    _, _, *rows = table("## Learning rates after 50 M tokens", "design")
    assert rows == rows_of(summary, (7.5e-4, 1.5e-3, 3e-3))
    mla = summary.searches["mla"]
    assert (mla.chosen, mla.at_edge) == ((7.5e-4,), True)

    def run(rate: float, tokens: float) -> Result:
        return next(r for r in summary.used if (r.variant.design, r.rate, r.content["tokens"]) == ("mla", rate, tokens))

    def better(tokens: float, tag: str = "val/loss") -> str:
        return f"{at(run(1.5e-3, tokens), tokens, tag) - at(run(7.5e-4, tokens), tokens, tag):.3f}"

    said(
        f"half of it is {better(25e6)} nats better after 25 M tokens and {better(50e6)} after 50 M, "
        f"on repeated bigrams {better(50e6, 'val/ar_loss')}.",
        f"after 50 M tokens half of it is {better(50e6)} nats better",
    )
    answers(f"mla is {better(50e6)} nats better at half of")


def test_rates_with_and_without_a_norm_on_keys() -> None:
    study = load_study(RESULTS / "2026-11-29-study-rates-norm-1m-cpu.yaml")
    folder = RESULTS / "2026-11-29-study-rates-norm-1m-cpu"
    summary = summarise(study, read_results(folder))
    assert {result.name for result in summary.used} == {file.stem for file in folder.glob("*.json")}
    log = (DOCS / "log" / "designs.md").read_text(encoding="utf-8")
    lines = log.split("## 2026-11-29, two CPU cores: rates")[1].split("| design |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == rows_of(summary, (1.5e-3, 3e-3, 6e-3, 1.2e-2))
    assert {(found.chosen, found.at_edge) for found in summary.searches.values()} == {((6e-3,), False)}
    first = {label: found.rounds[0].losses for label, found in summary.searches.items()}
    above = {label: f"{(losses[1.2e-2] or 0) - (losses[6e-3] or 0):.3f}" for label, losses in first.items()}
    said(f"Twice that rate costs {above['mha']}, {above['mha-no-norm']} and {above['mla']} nats")
    gap = row(summary, "mha").loss.mean - row(summary, "mha-no-norm").loss.mean
    said(f"mha without the norm is {gap:.3f} below mha with it", text=log)
