"""Statistics against numbers computed by hand; the report: equal bytes, verdicts, and what it leaves out."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.suites.registry import suites
from cllm.statistics import Mean, paired, t_quantile
from cllm.study.curves import crossing, fit_curve
from cllm.study.figures import curves_figure, scores_figure
from cllm.study.layout import Layout
from cllm.study.points import Variant
from cllm.study.report import report_data, report_text, write_report
from cllm.study.results import point_name, read_results, with_evaluations
from cllm.study.summary import Score, Summary, summarise

# ---- statistics


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)


def test_a_mean_has_the_standard_error_and_interval_computed_by_hand() -> None:
    mean = Mean.of([1.0, 2.0, 6.0])  # variance (4 + 1 + 9) / 2 = 7
    assert (mean.n, mean.mean, mean.error) == (3, 3.0, pytest.approx(math.sqrt(7 / 3)))
    half = 4.302653 * math.sqrt(7 / 3)
    assert mean.interval == pytest.approx((3 - half, 3 + half))


def test_verdicts_are_those_that_the_paired_interval_allows() -> None:
    base = {1: 3.0, 2: 3.5, 3: 4.0}  # differences between seeds are much larger than those between designs
    better = paired({1: 2.99, 2: 3.48, 3: 3.99, 9: 7.0}, base)
    assert better.pairs.mean == pytest.approx(-0.04 / 3)
    assert better.pairs.error == pytest.approx(0.01 / 3)  # -0.01, -0.02, -0.01
    assert better.pairs.interval == pytest.approx((-0.0133333 - 0.0143422, -0.0133333 + 0.0143422), abs=1e-6)
    assert better.verdict == "not distinguishable", "three seeds are few"
    assert paired({1: 2.9, 2: 3.4, 3: 3.901}, base).verdict == "better"
    assert paired({1: 3.1, 2: 3.6, 3: 4.101}, base).verdict == "worse"
    assert paired({2: 1.0}, base).verdict == "one seed: no interval"
    assert paired({7: 1.0}, base).verdict == "no common seed"


def test_a_fit_finds_the_curve_that_the_points_come_from_and_where_two_cross() -> None:
    t = np.linspace(5e6, 1e8, 30)

    def curve(e: float, a: float, b: float, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float]]:
        draws = np.random.default_rng(seed).normal(size=len(t)) * noise
        return [(float(x), float(y)) for x, y in zip(t, e + a * t**-b + draws, strict=True)]

    exact = fit_curve(curve(2.0, 400.0, 0.4))
    assert exact.parameters == pytest.approx((2.0, 400.0, 0.4), rel=0.03)
    assert exact.at(5e7) == pytest.approx(2 + 400 * 5e7**-0.4, abs=1e-4)
    fits = [fit_curve(curve(2.0, 400.0, 0.4, noise=0.002, seed=seed)) for seed in range(10)]
    for n, truth in enumerate((2.0, 400.0, 0.4)):
        inside = sum(low <= truth <= high for low, high in (fit.interval(n) for fit in fits))
        assert inside >= 7, "intervals of 90 %"
    other = fit_curve(curve(1.9, 800.0, 0.4))  # 400 t^-0.4 = 0.1 at t = 4000^2.5
    assert crossing(other, exact).tokens == pytest.approx(4000**2.5, rel=0.05)
    assert crossing(fit_curve(curve(2.1, 400.0, 0.4)), exact).text == "no crossing predicted"
    assert fit_curve(curve(2.0, 1.0, 0.4)[:5]) is None


# ---- the report


def copy_of(finished: Path, out: Path) -> Layout:
    shutil.copytree(finished / "results", out / "results")
    return Layout.at(out)


@pytest.mark.parametrize("noise", [0.001, 0.01])
def test_intervals_of_a_fit_contain_the_truth_about_as_often_as_they_say(noise: float) -> None:
    """90 % intervals, 100 curves with independent noise. With 12 seeds the shares are 0.83 to 0.92, 0.88 on average."""
    t, truth = np.linspace(16e6, 490e6, 30), (2.6, 120.0, 0.3)
    generator, inside = np.random.default_rng(0), np.zeros(3)
    for _ in range(100):
        losses = truth[0] + truth[1] * t ** -truth[2] + generator.normal(0, noise, len(t))
        fit = fit_curve(list(zip(t.tolist(), losses.tolist(), strict=True)))
        assert fit is not None
        intervals = [fit.interval(n) for n in range(3)]
        inside += [low <= value <= high for (low, high), value in zip(intervals, truth, strict=True)]
    assert all(0.8 <= share / 100 <= 0.97 for share in inside)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("seed", [], r"seed is \[\]; allowed: a whole number"),
        ("seed", True, "seed is True; allowed: a whole number"),
        ("seed", 2, "has the result of the point .*-s2-"),
        ("design", "cla", "has the result of the point cla-"),
        ("loss", math.nan, "loss is nan; allowed: finite numbers"),
        ("loss", "3.1", "loss is '3.1'; allowed: a number or null"),
        ("summary", {"parameters": 1}, "summary.kv_vs_mha is missing"),
        ("environment", None, "environment is None; allowed: a mapping"),
        ("finished", None, "finished is None; allowed: text"),
        ("format", 2, "format is 2; allowed: 1"),
    ],
)
def test_a_result_that_was_edited_by_hand_is_left_out_with_its_key(
    finished: Path,
    chaos: ModuleType,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key: str,
    value: Any,
    error: str,
) -> None:
    layout = copy_of(finished, tmp_path)
    change(layout, "mha-lr0.002-160-s1-*", **{key: value})
    summary = summarise(chaos.study_of(finished / "base.yaml"), read_results(layout.results))
    assert [len(row.results) for row in summary.rows if row.label == "mha"] == [1]
    assert re.search(f"left out: .*mha-lr0.002-160-s1-.*: {error}", caplog.text)


def test_a_copy_of_a_result_does_not_count_as_another_point(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A seed counted twice would make intervals too narrow."""
    layout = copy_of(finished, tmp_path)
    one, two = (next(layout.results.glob(f"mha-lr0.002-160-s{seed}-*")) for seed in (1, 2))
    shutil.copy(one, two)
    assert two.stem not in {result.name for result in read_results(layout.results)}
    assert f"allowed: a file of that name, {one.name}" in caplog.text


def test_the_report_names_files_that_it_could_not_read(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    layout = copy_of(finished, tmp_path)
    change(layout, "mha-lr0.002-160-s1-*", loss="3.1")
    file = next(layout.results.glob("mha-lr0.002-160-s1-*")).name
    write_report(chaos.study_of(finished / "base.yaml"), layout)
    reason = f"{file}: loss is '3.1'; allowed: a number or null"
    assert f"## Not used\n\n- {reason}\n" in (layout.report / "report.md").read_text()
    assert json.loads((layout.report / "report.json").read_text())["not_read"] == [reason]


def test_a_crossing_is_of_the_seeds_that_both_designs_have(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    study, layout = chaos.study_of(finished / "base.yaml"), copy_of(finished, tmp_path)
    tokens = [round(16 * 1.3**n) for n in range(12)]

    def curve(e: float, a: float) -> dict[str, Any]:
        return {"validation": {"tokens": tokens, "val/loss": [e + a / t**0.5 for t in tokens]}}

    change(layout, "mha-lr0.002-160-s1-*", **curve(2.0, 8.0))
    change(layout, "cla-lr0.002-160-s1-*", **curve(2.3, 1.0))  # 7 / t^0.5 = 0.3 at t = 544
    next(layout.results.glob("cla-lr0.002-160-s2-*")).unlink()
    for level in (2.0, 5.0):  # the second seed of mha is one that cla does not have
        change(layout, "mha-lr0.002-160-s2-*", **curve(level, 8.0))
        (row,) = (row for row in summarise(study, read_results(layout.results)).rows if row.label == "cla")
        assert row.crossing.tokens == pytest.approx((7 / 0.3) ** 2, rel=0.02)


def change(layout: Layout, pattern: str, **values: Any) -> None:
    """Change values in the result files that match."""
    for file in layout.results.glob(pattern):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_report_has_equal_bytes_each_time_and_reads_results_alone(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    study = chaos.study_of(finished / "base.yaml")
    layouts = [copy_of(finished, tmp_path / name) for name in ("one", "two")]
    for layout in layouts:
        tokens = [0, 32, 48, 64, 96, 112, 128, 160]
        curve = {"tokens": tokens, "val/loss": [9 / (1 + t) + 2 for t in tokens], "val/ar_loss": [1.0] * len(tokens)}
        change(layout, "*160*", validation=curve)
        write_report(study, layout)
    one, two = (contents(layout.report) for layout in layouts)
    assert one == two
    board = "tensorboard/events.out.tfevents.0.study"
    assert {"report.md", "report.json", "loss.png", "pareto.png", "ar_loss.png", "scores.png", board} <= one.keys()
    text = one["report.md"].decode()
    assert "| mha " in text
    assert "baseline" in text
    assert "0.001: 2.1" in text
    assert "## Learning curves" in text
    data = json.loads(one["report.json"])
    assert [row["design"] for row in data["rows"]] == ["mha", "cla"]
    assert data["rows"][0]["commits"] == ["abc"]
    assert data["rows"][0]["config"]["model"]["d_model"] == 8


def test_scores_are_means_over_seeds_and_not_over_tasks_or_suites(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    study = chaos.study_of(finished / "base.yaml")
    layout = copy_of(finished, tmp_path)
    for seed, level in ((1, 1.0), (2, 3.0)):
        records = []
        for suite, above in (("copying", 0.0), ("mqar", 5.0)):
            chosen = parse_choice(f"{suite}:samples=4", suites()).given
            assert chosen is not None
            record: dict[str, Any] = {"suite": suite, "set": suite, "spec": "as it is"}
            record["settings"] = chosen.model_dump(mode="json")
            for task, loss in (("all", level), ("one", level - 0.5), ("two", level + 0.5), ("all", level)):
                records.append(record | {"task": task, "loss": loss + above})  # evaluate writes "all" twice
        for stride in (64, 128):
            records.append({"set": "books", "window": 256, "stride": stride, "loss": level + stride})
        records.append({"suite": "copying", "refused": {"kivi:bits=4": "why"}})
        change(layout, f"mha-lr0.002-160-s{seed}-*", evaluations=records)
    found = summarise(study, read_results(layout.results)).scores
    means = {(score.label, score.head): by_row["mha"] for score, by_row in found if "mha" in by_row}
    assert means == {
        ("copying:samples=4", "loss"): Mean(2, 2.0, 1.0),  # sqrt(2) / sqrt(2)
        ("mqar:samples=4", "loss"): Mean(2, 7.0, 1.0),
        ("perplexity, books, --stride 64", "loss"): Mean(2, 66.0, 1.0),
        ("perplexity, books, --stride 128", "loss"): Mean(2, 130.0, 1.0),
    }, "entries of perplexity with other options are rows of their own"
    text = report_text(summarise(study, read_results(layout.results)), [])
    assert text.count("- mha, copying: `kivi:bits=4`: why") == 1


def test_one_table_has_share_parameters_loss_and_main_scores_by_falling_share(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    study = chaos.study_of(finished / "base.yaml")
    layout = copy_of(finished, tmp_path)
    plain = {"suite": "copying", "set": "copying", "settings": {"distances": [8]}, "loss": 9.0, "accuracy_stderr": 2.5}

    def evaluated(*accuracies: float) -> dict[str, Any]:
        specs = dict(zip(("as it is", "kivi:bits=4"), accuracies, strict=False))
        records = [plain | {"spec": spec, "accuracy": accuracy} for spec, accuracy in specs.items()]
        return {"evaluations": [record | {"task": task} for record in records for task in ("all", "distance=8")]}

    small = {"parameters": 1234, "kv_vs_mha": {"resident": 0.25, "read": 0.5}, "kv_bytes_per_token": {"resident": 64}}
    for design, seed, loss, accuracies in (
        ("mha", 1, 3.0, (40.0, 1.0)),
        ("mha", 2, 3.2, (44.0,)),
        ("cla", 1, 2.0, (7.0,)),
    ):
        change(layout, f"{design}-lr0.002-160-s{seed}-*", loss=loss, **evaluated(*accuracies))
    change(layout, "cla-lr0.002-160-s1-*", summary=small)
    next(layout.results.glob("cla-lr0.002-160-s2-*")).unlink()
    text = report_text(summarise(study, read_results(layout.results)), [])
    table = text.split("## Designs by cache bytes")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["design", "cache × mha", "parameters", "loss", "copying:distances=8, accuracy %"]
    assert rows[2:] == [
        ["mha", "1.0000", "1k", "3.1000 ± 0.1000", "42.0 ± 2"],
        ["cla", "0.2500", "1.234k", "2.0000", "7.0 ± 2.5"],
    ]


def test_a_result_keeps_each_record_once_and_of_paths_the_last_part() -> None:
    record = {
        "suite": "blimp",
        "data": "/tmp/data",
        "path": "/runs/a",
        "settings": {"path": "/tmp/blimp.jsonl", "shots": 0},
    }
    found = with_evaluations({}, [record, dict(record)], "code")["evaluations"]
    assert found == [{"suite": "blimp", "data": "data", "settings": {"path": "blimp.jsonl", "shots": 0}}]


def test_the_report_computes_losses_by_hand_and_names_the_rule(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    study = chaos.study_of(finished / "base.yaml")
    layout = copy_of(finished, tmp_path)
    for design, losses in {"mha": (3.0, 3.2), "cla": (2.8, 2.9)}.items():
        for seed, loss in enumerate(losses, start=1):
            change(layout, f"{design}-lr0.002-160-s{seed}-*", loss=loss)
    summary = summarise(study, read_results(layout.results))
    rows = {row["design"]: row for row in report_data(summary)["rows"]}
    assert rows["mha"]["loss"]["mean"] == pytest.approx(3.1)
    assert rows["mha"]["loss"]["standard_error"] == pytest.approx(0.1)
    assert rows["cla"]["difference"]["mean"] == pytest.approx(-0.25)  # -0.2 and -0.3
    assert rows["cla"]["difference"]["interval_95"] == pytest.approx((-0.25 - 0.635310, -0.25 + 0.635310), abs=1e-5)
    text = report_text(summary, [])
    assert "## 160 tokens: equal tokens" in text
    assert "-0.2500 [-0.8853, +0.3853] | not distinguishable" in text
    assert "3.1000 ± 0.1000" in text


def test_a_report_mixes_no_versions(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    study = chaos.study_of(finished / "base.yaml")
    layout = copy_of(finished, tmp_path)
    first, second = sorted(layout.results.glob("cla-lr0.002-160-*"))
    change(layout, first.name, code="another", loss=99.0)
    first = first.rename(first.with_stem(point_name(json.loads(first.read_text()))))
    change(layout, second.name, data="other data", loss=99.0)
    text = report_text(summarise(study, read_results(layout.results)), [])
    assert "| cla " not in text.split("## Learning rates")[0]
    assert f"- {first.stem}: other version of the code (code another" in text
    assert f"- {second.stem}: other data" in text
    with pytest.raises(UserError, match="no result of its present settings"):
        summarise(study.model_copy(update={"overrides": {"optim": {"eps": 1e-6}}}), read_results(layout.results))


def test_the_legend_names_the_lines_in_the_order_of_their_ends(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    layout = copy_of(finished, tmp_path)
    losses = {"mha": [5.0, 3.0], "cla": [4.0, 3.5]}
    for design, values in losses.items():
        change(layout, f"{design}-*-160-*.json", validation={"tokens": [80, 160], "val/loss": values})
    found = summarise(chaos.study_of(finished / "base.yaml"), read_results(layout.results))
    (legend,) = [axes.get_legend() for axes in curves_figure(found, found.rows, "val/loss", "Loss").axes]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == sorted(names, key=lambda name: -losses[name][-1])
    assert len(names) > 1


@pytest.mark.parametrize("count", [1, 2, 15, 30])
def test_labels_of_scores_do_not_cover_each_other(summary: Summary, count: int) -> None:
    names = [f"fusedkv_rich-{n:02d}" for n in range(count)]
    score = Score(suite="copying", label="copying", head="accuracy %", form=str)
    rows = tuple(replace(summary.rows[0], variant=Variant(name)) for name in names)
    means = {name: Mean.of([1.0, 2.0]) for name in names}
    figure = scores_figure(replace(summary, rows=rows, scores=((score, means),)))
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == names
    step = (labels[-1].get_window_extent().x1 - labels[0].get_window_extent().x1) / max(1, count - 1)
    height = labels[0].get_fontsize() * figure.dpi / 72
    angle = math.radians(labels[0].get_rotation())
    assert count == 1 or step * math.sin(angle) >= 0.99 * height, "the distance of parallel lines of text"


def test_suites_in_training_are_drawn_over_tokens(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    """`evaluate_suites` of the runs: the main number of each, by its label; numbers of one label are of one suite."""
    layout = copy_of(finished, tmp_path)
    file = next(layout.results.glob("*-160-*.json"))
    config = json.loads(file.read_text())["config"]
    config["evaluate_suites"] = [{"suite": "copying:samples=4", "every": 2, "name": "far"}]
    points = [[32, 10.0], [96, None], [160, 30.0]]
    change(layout, "*160*", config=config, suites={"suite/far/accuracy": points, "suite/far/loss": points})
    written = write_report(chaos.study_of(finished / "base.yaml"), layout)
    assert [path.name for path in written if path.suffix == ".png"] == [
        "loss.png",
        "pareto.png",
        "far.png",
        "scores.png",
    ]
    board = EventAccumulator(str(layout.report / "tensorboard" / "mha-160")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("suite/far/accuracy")] == [(32, 10.0), (160, 30.0)]


def test_other_models_are_beside_the_designs(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    """Files of `beside`: records, students of half_cache, and the best of each plan of an uptraining experiment."""
    layout = copy_of(finished, tmp_path)
    record = {"suite": "copying", "run": "big", "task": "all", "accuracy_stderr": 1.0}
    specs = (("none", 50.0), ("xkv:ratio=4", 30.0), ("int8", 49.0))
    records = [record | {"spec": spec, "accuracy": value} for spec, value in specs]
    student = {"student": "cla2", "loss": math.log(20), "bytes_per_token": 8, "finished": True}
    students = [student | {"teacher_bytes_per_token": 16, "teacher_loss": math.log(18)}]
    students.append({**student, "student": "cla4", "bytes_per_token": 4, "finished": False})
    half: dict[str, Any] = {
        "command": "python -m experiments.half_cache --teacher models/small --lr 1",
        "students": students,
    }
    half["suites"] = {"cla2": {"copying": {"all": {"accuracy": 12.0, "accuracy_stderr": 2.0}}}}
    run = {"kind": "run", "plan": "cla", "percent": 5.0, "kv_bytes_per_token": 9.0, "kv_vs_teacher": 0.5}
    base = {"kind": "base", "name": "base", "loss": math.log(10), "parameters": 110e6}
    runs = [base, run | {"name": "a", "loss": math.log(12)}, run | {"name": "b", "loss": math.log(11)}]
    for name, content in (("big", {"rows": records}), ("half", half), ("up", {"rows": runs})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = [str(tmp_path / f"{name}.json") for name in ("big", "half", "up")]
    chosen = {"results": results, "scores": ["copying"], "posthoc": ["xkv*"]}
    study = chaos.study_of(finished / "base.yaml", beside=chosen)
    write_report(study, layout)
    text = layout.report.joinpath("report.md").read_text().split("## Beside other models")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    head, _, *rows = cells
    found = {(row[0], row[head.index("compressed")]): row for row in rows}
    at = {name: head.index(name) for name in ("bytes/token", "perplexity", "copying, accuracy %")}
    assert {key: [row[n] for n in at.values()] for key, row in found.items() if "mha" not in key[0]} == {
        ("cla", ""): ["64", found["cla", ""][at["perplexity"]], "–"],
        ("big", ""): ["–", "–", "50.0 ± 1.0"],
        ("big", "`xkv:ratio=4`"): ["–", "–", "30.0 ± 1.0"],
        ("small", ""): ["16", "18.00", "–"],
        ("small as cla2", ""): ["8", "20.00", "12.0 ± 2.0"],
        ("small as cla4", ""): ["4", "–", "–"],
        ("base of 110M", ""): ["18", "10.00", "–"],
        ("base of 110M as cla, 5 % of its tokens", ""): ["9", "11.00", "–"],
    }
    assert "rows without compression to mha" in text
    (tmp_path / "half.json").write_text(json.dumps(half | {"name": "mha of 110M"}))
    write_report(study, layout)
    assert "| mha of 110M as cla2 " in layout.report.joinpath("report.md").read_text()
    half["students"] = [{"student": "cla2", "loss": "low"}]
    (tmp_path / "half.json").write_text(json.dumps(half))
    with pytest.raises(UserError, match=r"study tiny: beside: .*half\.json cannot be read"):
        write_report(study, layout)


@pytest.mark.parametrize(
    ("values", "note", "known_note"),
    [([0.001, 0.002], "edge", "known; the search found 0.002"), ([0.002], "found", "known; no search")],
    ids=["searched", "one value"],
)
def test_of_the_found_and_the_known_rate_the_better_long_run_is_shown(
    values: list[float], note: str, known_note: str, chaos: ModuleType, tmp_path: Path
) -> None:
    rates = {"values": values, "tokens": 64, "known": 0.001}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates, seeds=[1], evaluate={})
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert runner.run() == 0

    def shown() -> set[tuple[float, str]]:
        return {(row.first.rate, row.note) for row in summarise(study, read_results(runner.layout.results)).rows}

    assert shown() == {(0.002, note)}
    for file in runner.layout.results.glob("*-lr0.001-160-*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, "loss": content["loss"] - 9.0}), encoding="utf-8")
    assert shown() == {(0.001, known_note)}


def test_the_best_rate_so_far_is_shown_while_a_search_goes_on_beyond_its_values(
    chaos: ModuleType, tmp_path: Path
) -> None:
    rates = {"values": [0.004, 0.008], "tokens": 160}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates, seeds=[1], evaluate={})
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert runner.run() == 0

    def shown(**more: int) -> list[tuple[str, float, str]]:
        extended = chaos.study_of(tmp_path / "base.yaml", rates=rates | more, seeds=[1], evaluate={})
        summary = summarise(extended, read_results(runner.layout.results))
        return [(row.label, row.first.rate, row.note) for row in summary.rows]

    assert shown() == [("mha", 0.004, "edge"), ("cla", 0.004, "edge")]
    assert shown(extend=1) == [("mha", 0.004, "the search goes on"), ("cla", 0.004, "the search goes on")]
