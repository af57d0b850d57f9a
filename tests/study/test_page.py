"""The numbers of docs/study_results.md, of the answers in docs/study.md and of the README are those of docs/results."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest

from cllm.statistics import t_quantile
from cllm.study.beside import beside
from cllm.study.results import read_results
from cllm.study.summary import Summary
from tests.study.page import (
    FOLDER,
    README,
    RESULTS,
    STUDY,
    at,
    cells_of,
    copying,
    copying_in,
    crossing_of,
    row,
    said,
    table,
    to_mha,
)


def test_no_result_is_left_out(summary: Summary) -> None:
    assert not summary.others
    assert {result.name for result in summary.used} == {file.stem for file in FOLDER.glob("*.json")}


def test_the_table_of_designs(summary: Summary) -> None:
    head, _, *rows = table("## Designs after 490 M tokens", "design")
    assert len(rows) == len(summary.rows)
    two = [found.label for found in summary.rows if len(found.results) == 2]
    said(f"and do papers say the same? | 3, {two[0]} and {two[1]} 2 |")
    for cells, found in zip(rows, summary.rows, strict=True):
        numbers = dict(zip(head, cells, strict=True))
        kv = found.first.content["summary"]["kv_vs_mha"]
        label, _, rate = numbers["design"].partition(", rate ")
        assert label.partition(",")[0] == found.label
        assert found.first.rate == float(rate or 1.5e-3)
        assert [float(numbers["cache × mha"]), float(numbers["read × mha"])] == pytest.approx(
            [kv["resident"], kv["read"]], abs=5e-4
        )
        assert int(numbers["seeds"]) == len(found.results)
        mean, _, error = numbers["loss"].partition(" ± ")
        assert float(mean) == pytest.approx(found.loss.mean, abs=5.1e-5)
        assert (float(error) if error else None) == pytest.approx(found.loss.error, abs=5.1e-5)
        if found.difference is None:
            assert found.label == "mha"
            continue
        pairs = found.difference.pairs
        assert pairs is not None
        expected = f"{pairs.mean:+.4f}"
        if pairs.interval is not None:
            expected += f" ({pairs.interval[0]:+.4f} to {pairs.interval[1]:+.4f})"
        assert numbers["difference to mha, 95 % interval"] == expected
        assert numbers["verdict"] == found.difference.verdict


def test_the_table_of_losses_in_training(summary: Summary) -> None:
    head, _, *rows = table("## Designs after 490 M tokens", "tokens")
    assert [cells[0] for cells in rows] == ["49 M", "98 M", "245 M", "490 M"]
    for tokens, *cells in rows:
        for design, cell in zip(head[1:], cells, strict=True):
            values = [at(result, 1e6 * float(tokens.split()[0])) for result in row(summary, design).results]
            assert cell == ", ".join(f"{value:.3f}" for value in values), f"{design} at {tokens}"


def test_the_first_points() -> None:
    found = {result.variant.design: result for result in read_results(RESULTS / "2026-11-27-study-100m-h200")}
    _, _, *rows = table("## First points", "tokens")
    for tokens, *cells in rows:
        expected: list[str] = []
        for tag in ("val/loss", "val/ar_loss"):
            both = [at(found[design], 1e6 * float(tokens.split()[0]), tag) for design in ("mha", "fusedkv_lite")]
            expected += [f"{value:.3f}" for value in both] + [f"{round(both[0], 3) - round(both[1], 3):.3f}"]
        assert cells == expected, tokens


def test_the_sentences(summary: Summary) -> None:
    rows = {found.label: found for found in summary.rows}
    loss = {name: {r.content["seed"]: r.loss or math.nan for r in found.results} for name, found in rows.items()}

    def below(design: str, tokens: float) -> str:
        """Nats below mha's loss, the mean over the seeds that both have."""
        losses = [{r.content["seed"]: at(r, tokens) for r in rows[name].results} for name in ("mha", design)]
        common = losses[0].keys() & losses[1].keys()
        return f"{sum(losses[0][seed] - losses[1][seed] for seed in common) / len(common):.2f}"

    gaps = [f"{loss['mha'][seed] - loss['fusedkv'][seed]:.3f}" for seed in (1, 2, 3)]
    crossing = "{:.1f} to {:.1f} G tokens".format(*crossing_of(rows["cla-2"]))
    swiftkv = "{:.2f} to {:.2f} G".format(*crossing_of(rows["swiftkv"]))
    mha = loss["mha"]
    apart = [f"{loss['mha'][seed] - loss['mha'][1]:.3f}" for seed in (2, 3)]
    said(
        f"{gaps[0]}, {gaps[1]} and {gaps[2]} below mha's with the same seed",
        f"for fusedkv from {below('fusedkv', 49e6)} to {below('fusedkv', 490e6)} nats",
        f"for cla-2 from {below('cla-2', 49e6)} to {below('cla-2', 490e6)}",
        f"and for yoco from {below('yoco', 49e6)} to {below('yoco', 490e6)}",
        f"The fitted curves cross for cla-2 at {crossing} and for swiftkv, at half of mha's rate, at {swiftkv} (90 %",
        f"two seeds of mha by {apart[0]} to {apart[1]}.",
        f"{mha[1] - loss['gqa'][1]:.3f} below it with seed 1, {loss['gqa'][2] - mha[2]:.3f} and "
        f"{loss['gqa'][3] - mha[3]:.3f} above with seeds 2 and 3.",
        f"Its seeds are up to {max(loss['gqa'].values()) - min(loss['gqa'].values()):.3f} apart.",
        "by {:.3f}, {:.3f} and {:.3f}; the interval".format(*(mha[seed] - loss["yoco"][seed] for seed in (1, 2, 3))),
    )
    lite = [f"{loss['mha'][seed] - loss['fusedkv_lite'][seed]:.3f}" for seed in (1, 2, 3)]
    close = [f"{loss['fusedkv_lite'][seed] - loss['fusedkv'][seed]:.4f}" for seed in (1, 2, 3)]
    said(
        f"those of fusedkv_lite {lite[0]}, {lite[1]} and {lite[2]}",
        f"fusedkv is {close[0]}, {close[1]} and {close[2]} below fusedkv_lite with the same seed",
    )
    again = json.loads((RESULTS / "2026-11-28-mha-490m-again-h200.json").read_text(encoding="utf-8"))
    assert (again["design"], again["seed"], again["code"]) == ("mha", 3, rows["mha"].results[2].content["code"])
    curve = again["validation"]
    apart = [
        abs(value - at(rows["mha"].results[2], tokens))
        for tokens, value in zip(curve["tokens"], curve["val/loss"], strict=True)
        if tokens > 98e6
    ]
    repeated = mha[3] - again["loss"]
    said(
        f"{again['loss']:.3f} instead of {mha[3]:.3f}, and up to {max(apart):.3f} apart on the way",
        f"[the same point differed by {repeated:.3f}]",
    )
    for name in rows.keys() - {"mha", "cla-2", "swiftkv"}:
        assert rows[name].crossing is not None
        assert rows[name].crossing.tokens is None
    assert all(max(loss["yoco"][seed], loss["cla-2"][seed]) < mha[seed] for seed in (1, 2, 3))
    apart = [f"{abs(loss['yoco'][seed] - loss['cla-2'][seed]):.3f}" for seed in (1, 2, 3)]
    assert [loss["yoco"][seed] > loss["cla-2"][seed] for seed in (1, 2, 3)] == [True, False, False]
    said(f"yoco is {apart[0]} above cla-2 with seed 1, {apart[1]} and {apart[2]} below it with seeds 2 and 3")
    differences = [mha[seed] - loss["cla-2"][seed] for seed in (1, 2, 3)]
    said(
        "it is {:.3f}, {:.3f} and {:.3f} below mha with the same seed".format(*differences),
        f"These differ by {max(differences) - min(differences):.3f}, and two trainings of one point by {repeated:.3f}.",
    )
    by_seed = {name: {r.content["seed"]: r for r in rows[name].results} for name in ("mha", "cla-2")}
    for tokens in (49e6, 98e6, 245e6, 490e6):
        assert all(at(by_seed["cla-2"][seed], tokens) < at(by_seed["mha"][seed], tokens) for seed in (1, 2, 3))
    percent = 100 * math.expm1(rows["cla-2"].difference.pairs.mean)
    said(f"| {percent:.1f} %: not reproduced at this scale |")
    # seed 3 of gqa, whose seed 2 was measured too
    copied = {name: f"{copying(found)[-1]['accuracy']:.0f} %" for name, found in rows.items()}
    second = copying(rows["gqa"])[0]
    said(f"gqa's seed 2 copies {second['accuracy']:.1f} ± {second['accuracy_stderr']:.1f} %")
    said(
        f"fusedkv copies {copied['fusedkv']} of random tokens, fusedkv_lite {copied['fusedkv_lite']}, "
        f"swiftkv {copied['swiftkv']}, mla {copied['mla']}, yoco {copied['yoco']}, mha {copied['mha']}, "
        f"cla-2 and gqa {copied['cla-2']}"
    )
    assert copied["gqa"] == copied["cla-2"]


def test_training_compute(summary: Summary) -> None:
    flops = {found.label: found.first.content["summary"]["training_flops_per_token"] for found in summary.rows}
    share = {label: 100 * (value / flops["mha"] - 1) for label, value in flops.items()}
    said(f"mla needs {share.pop('mla'):.0f} % more of it than mha, and yoco {-share.pop('yoco'):.0f} % less")
    assert max(map(abs, share.values())) < 1, "the others are equal"
    designs = [found.first.content["config"]["model"] for found in summary.rows]
    assert all(model["qk_norm"] for model in designs), "all designs but mla, which has no keys to norm"


def test_intervals_with_a_pooled_standard_deviation(summary: Summary) -> None:
    differences = [
        [a.loss - b.loss for a, b in zip(row(summary, name).results, row(summary, "mha").results, strict=True)]
        for name in ("cla-2", "fusedkv", "fusedkv_lite", "gqa", "yoco")
    ]
    pooled = math.sqrt(statistics.mean(map(statistics.variance, differences)))
    half, of_two = (t_quantile(0.975, 2 * len(differences)) * pooled / math.sqrt(seeds) for seeds in (3, 2))
    said(
        f"with three seeds, is {pooled:.3f}, and intervals with it reach {half:.3f} to either side, "
        f"and {of_two:.3f} with two seeds",
    )
    excluding = [abs(statistics.mean(of)) > half for of in differences]
    assert excluding == [True, True, True, False, True], "those of cla-2 and yoco would exclude 0"
    assert -row(summary, "swiftkv").difference.pairs.mean > of_two, "and that of swiftkv"


def test_the_table_beside_other_models(summary: Summary) -> None:
    report = beside(summary, FOLDER)[1].split("\n\n")[0]
    head, _, *rows = cells_of(report.replace("–", ""))
    columns = ["bytes/token", "perplexity", "copying distance=512, accuracy %", "ruler, accuracy %", "piqa, norm %"]
    spec = head.index("compressed")
    expected = {(line[0], line[spec]): [line[head.index(name)] for name in columns] for line in rows}
    _, _, *written = table("## Beside other models", "model")
    found = {(line[0], line[1]): line[2:] for line in written}
    for line in found.values():
        line[1] = re.sub(r" [a-g]$", "", line[1])
    left_out = {key for key in expected if re.search(r", [12] % of its tokens", key[0])}
    assert found == {key: values for key, values in expected.items() if key not in left_out}

    def lost(model: str, spec: str) -> str:
        before, after = (float(found[model, key][2].split()[0]) for key in ("", spec))
        return f"{100 * (1 - after / before):.0f} %"

    four = "`xkv:group=4,ratio=4`"
    perplexity = {model: [found[model, key][1] for key in ("", four)] for model, spec in found if spec == four}
    costs = [100 * (float(b) / float(a) - 1) for a, b in perplexity.values() if a and b and "±" not in a]
    most = f"costs at most {max(costs):.2f} % of perplexity"
    said(
        f"xKV at 4x {most}, but",
        f"fusedkv loses {lost('fusedkv', four)} of its copying, swiftkv {lost('swiftkv', four)} and "
        f"fusedkv_lite {lost('fusedkv_lite', four)}.**",
        f"mla, which copies less, loses {lost('mla', four)}; SmolLM2",
        f"loses {lost('smollm2', '`xkv:group=5,ratio=4`')}. Its students",
    )
    records = row(summary, "fusedkv").results[1].content["evaluations"]
    after = {record["spec"]: record["perplexity"] for record in records if record.get("prefix") == 3072}
    cost = 100 * (after["xkv:group=4,ratio=4"] / after["none"] - 1)
    said(
        f"xKV at 4x costs fusedkv {cost:.1f} % of perplexity, and {lost('fusedkv', four)} of its copying from 512",
        text=STUDY,
    )


def test_the_short_form(summary: Summary) -> None:
    text = STUDY.split("\n## Answers so far\n")[1].split("\n## ")[0]
    differences = {found.label: found.difference for found in summary.rows if found.difference is not None}
    verdicts = {name: difference.verdict for name, difference in differences.items()}
    better = ["fusedkv", "fusedkv_lite", "swiftkv", "cla-2"]
    even = dict.fromkeys(("yoco", "gqa", "mla"), "not distinguishable")
    assert verdicts == {**dict.fromkeys(better, "better"), **even}
    numbers = []
    for name in better:
        pairs = differences[name].pairs
        assert pairs is not None
        assert pairs.interval is not None
        seeds = {2: "two", 3: "three"}[pairs.n]
        numbers.append([f"{-value:.3f}" for value in (pairs.mean, *reversed(pairs.interval))] + [seeds])
    gaps = []
    for tokens in (49e6, 490e6):
        losses = [[at(r, tokens) for r in row(summary, name).results] for name in ("mha", "fusedkv")]
        gaps.append(f"{(sum(losses[0]) - sum(losses[1])) / 3:.2f}")
    said(
        "fusedkv by {} nats (95 % interval {} to {}, {} seeds)".format(*numbers[0]),
        "fusedkv_lite by {} ({} to {}, {} seeds)".format(*numbers[1]),
        "swiftkv, at half of their rate, by {} ({} to {}, {} seeds)".format(*numbers[2]),
        "cla-2 by {} ({} to {}, {} seeds)".format(*numbers[3]),
        f"falls from {gaps[0]} nats at 49 M tokens to {gaps[1]} at 490 M",
        text=text,
    )


def test_a_crossing_that_was_predicted_did_not_come(summary: Summary, both: Summary) -> None:
    """The fits of the runs of 100 M tokens, and the differences after 490 M."""
    designs = ("fusedkv", "fusedkv_lite")
    ends = [tokens for name in designs for tokens in crossing_of(row(both, f"{name}-half"))]
    (below,) = {f"{-float(to_mha(row(summary, name))):.2f}" for name in designs}
    said(f"cross mha at {min(ends):.2f} to {max(ends):.2f} G tokens. Here they are {below} nats below it")


def test_copying_differs_between_trainings_of_mha(summary: Summary) -> None:
    def share(found: Sequence[dict[str, Any]]) -> float:
        (accuracy,) = {record["accuracy"] for record in copying_in(found, "none", "distance=512")}
        return float(accuracy)

    shares = [share(row(summary, "mha").results[1].content["evaluations"])]
    for file in ("2026-11-28-methods-45m-h200.json", "2026-11-28-methods-45m-again-h200.json"):
        shares.append(share([record for record in records(file) if str(record["run"]).startswith("mha-")]))
    said(f"depends on the training: {shares[1]:.1f} and {shares[2]:.1f} % in two with seed 3")
    said(f"mha copied {shares[0]:.0f}, {shares[1]:.0f} and {shares[2]:.0f} % in three", text=README)


def test_the_readme_has_the_same_table(summary: Summary) -> None:
    text = README.split("## An answer")[1].split("\n\n| trained |")[1].split("\n\n")[0]
    rows = {cells[0].partition(":")[0]: cells for cells in cells_of(text)[1:]}
    assert rows.keys() == {found.label for found in summary.rows}
    for found in summary.rows:
        _, cache, seeds, loss, difference, copied = rows[found.label]
        assert copied in {f"{record['accuracy']:.1f} ± {record['accuracy_stderr']:.1f}" for record in copying(found)}
        share = found.first.content["summary"]["kv_vs_mha"]["resident"]
        assert float(Fraction(cache)) == pytest.approx(share, abs=0.01)
        assert int(seeds) == len(found.results)
        error = "" if found.loss.error is None else f" ± {found.loss.error:.3f}"
        assert loss == f"{found.loss.mean:.3f}{error}"
        pairs = None if found.difference is None else found.difference.pairs
        if pairs is None or pairs.interval is None:
            assert not difference
        else:
            low, high = pairs.interval
            assert difference == f"{pairs.mean:+.3f} ({low:+.3f} to {high:+.3f})"


def test_speeds(summary: Summary) -> None:
    speeds = {found.label: [result.tokens_per_s or 0.0 for result in found.results] for found in summary.rows}
    mla, swiftkv, yoco, gqa, cla = (speeds.pop(name) for name in ("mla", "swiftkv", "yoco", "gqa", "cla-2"))
    later = [*gqa[:2], cla[2], yoco[1]]
    every = [speed for values in speeds.values() for speed in values] + [gqa[2], *cla[:2], yoco[0]]
    assert 615e3 < min(every) < max(every) < 645e3
    assert yoco[2] < min(every), "seed 3 shared its GPU"
    fast = [f"{round(speed / 1e3)},000" for speed in (min(later), max(later), *mla, *swiftkv)]
    said(
        f"had {fast[0]} to {fast[1]} tokens/s, mla {fast[2]} and {fast[3]}, swiftkv {fast[4]} and {fast[5]}, "
        "the others 620,000 to 640,000"
    )


def records(file: str) -> Sequence[dict[str, Any]]:
    return json.loads((RESULTS / file).read_text())["rows"]


def test_parameters_bytes_and_flops_of_four_designs_by_hand(summary: Summary) -> None:
    """12 layers of width 512 with 8 heads of 64; a context of 4,096 tokens; widths of the feed-forward by the rule."""
    layers, d, head, t, embedding = 12, 512, 64, 4096, 16384 * 512
    every = layers * 2 * d + d  # norms of layers, and the last one
    full = t + 1  # twice the keys of a mean query
    window = 2 * (1024 * 1025 / 2 + (t - 1024) * 1024) / t
    # owners, width, further norms, resident K and V as tokens x width x 2, and twice the keys of all layers
    designs = {
        "mha": (12, 1408, 24 * head, 12 * t * d * 2, 12 * full),
        "cla-2": (6, 1584, 18 * head + 6 * d, 6 * t * d * 2, 12 * full),
        "yoco": (7, 1552, 19 * head + d, (6 * 1024 + t) * d * 2, 6 * window + 6 * full),
    }
    for name, (owners, width, norms, resident, keys) in designs.items():
        found = row(summary, name).first.content["summary"]
        matrices = (2 * layers + 2 * owners) * d * d + layers * 3 * d * width
        assert found["parameters"] == embedding + matrices + every + norms, name
        assert found["kv_bytes_per_token"]["resident"] == 2 * resident / t, name
        assert found["training_flops_per_token"] == 6 * (matrices + embedding) + 6 * d * keys, name
        assert found["parameters"] == pytest.approx(46_938_112, rel=0.005), "the rule: within 0.5 % of mha"
    latents = row(summary, "mla").first.content
    assert latents["summary"]["kv_bytes_per_token"]["resident"] == layers * (480 + head // 2) * 2
    assert latents["match"]["reached"] == 0.5
