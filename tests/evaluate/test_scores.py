"""Comparisons by a suite's score, and maps of scores by needle depth and length; the records are made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from PIL import Image

from cllm.evaluate import heatmap as heatmaps
from cllm.evaluate.comparison import compare as compare_runs
from cllm.evaluate.comparison import find_runs
from cllm.evaluate.report import figure, markdown_table
from cllm.evaluate.score_choice import parse_score_choice
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.mqar import Mqar

SPECS = ("as it is", "xkv:group=4,ratio=4")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs whose accuracies at recall are 30, 20 and 10, and whose losses order them the other way round."""
    folders = []
    for n, (name, share) in enumerate({"mha": 1.0, "cla": 0.5, "yoco": 0.25}.items()):
        folder = tmp_path / "runs" / name
        config = {"name": name, "model": {"vocab_size": 320, "d_model": 16, "n_layers": 2, "n_heads": 2}}
        kv = {"resident": share, "read": share}
        summary = {"design": name, "parameters": 10, "steps": 5, "kv_vs_mha": kv, "kv_bytes_per_token": kv}
        write(folder / "summary.json", summary)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        write(folder / "metrics.jsonl", {"step": 5, "tokens": 50, "time": 1.0, "val/loss": 3.0 - n})
        own = {"step": 5, "settings": {"pairs": [4]}, "accuracy": 30.0 - 10 * n, "loss": 1.0 + n}
        write(folder / "evaluation" / "mqar" / "mqar.json", own)
        folders.append(folder)
    return folders


def test_runs_are_compared_by_a_suites_score(runs: list[Path], compare: Any, capsys: Any, tmp_path: Path) -> None:
    assert compare(*runs, "--score", "mqar", "--out", tmp_path / "out") == 0
    heads, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:5]]
    table = [dict(zip((head.strip() for head in heads), (cell.strip() for cell in row), strict=True)) for row in rows]
    assert [row["mqar, accuracy %"] for row in table] == ["30.0", "20.0", "10.0"]
    assert [row["difference"] for row in table] == ["baseline", "-10.0", "-20.0"]
    assert [row["perplexity"] for row in table] == ["20.086", "7.389", "2.718"]
    with (tmp_path / "out" / "comparison.csv").open() as lines:
        assert [float(row["mqar_accuracy"]) for row in csv.DictReader(lines)] == [30.0, 20.0, 10.0]


@pytest.mark.parametrize(
    ("score", "title", "heights"),
    [
        (None, "Perplexity against resident KV cache: down and left is better", [20.086, 7.389, 2.718]),
        ("mqar", "mqar, accuracy % against resident KV cache: up and left is better", [30, 20, 10]),
        ("mqar/loss", "mqar, loss against resident KV cache: down and left is better", [1, 2, 3]),
    ],
)
def test_the_figure_shows_the_score_and_its_better_direction(runs, score, title, heights) -> None:
    (axes,) = figure(compare_runs(find_runs(runs), score=score)).axes
    assert axes.get_title(loc="left") == title
    bars = cast(list[Any], axes.containers)
    points = [bar.lines[0].get_ydata()[0] for bar in bars]
    assert points == pytest.approx(heights, rel=1e-3)


def test_runs_without_the_score_and_other_settings_are_warned_of(runs: list[Path]) -> None:
    (runs[1] / "evaluation" / "mqar" / "mqar.json").unlink()
    other = {"step": 5, "settings": {"pairs": [8]}, "accuracy": 1.0, "loss": 1.0}
    write(runs[2] / "evaluation" / "mqar" / "mqar.json", other)
    comparison = compare_runs(find_runs(runs), score="mqar")
    assert "mqar was measured with different options: pairs=[4]: mha; pairs=[8]: yoco" in comparison.warnings
    assert "cla: has no mqar, accuracy %; evaluate --suite mqar measures it" in comparison.warnings
    for run, tasks in ((runs[0], 3), (runs[2], 2)):  # the defaults of some suites depend on the model
        path = run / "evaluation" / "mqar" / "mqar.json"
        write(path, other | {"settings": {"pairs": None}, "tasks": tasks, "questions": 10 * tasks})
    (warning,) = [line for line in compare_runs(find_runs(runs), score="mqar").warnings if "samples" in line]
    assert warning == "mqar was measured on different samples: 3 tasks, 30 questions: mha; 2 tasks, 20 questions: yoco"
    assert markdown_table(comparison).splitlines()[3].count("–") >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--score mqr", '--score mqr: no such suite; did you mean "mqar"?'),
        ("--score mqar/accurac", '--score mqar/accurac: mqar has no such number; did you mean "accuracy"?'),
        ("--score perplexity", "--score perplexity: no such suite"),
        ("--score copying", "--score copying: no run has a record of it; first run evaluate --suite copying"),
        (
            "--heatmap mqar",
            "--heatmap mqar: its records have no means by depth and length; allowed: suites with needles",
        ),
        ("--heatmap ruler", "--heatmap ruler: no run has records with means of accuracy by depth and length"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(runs, compare, tmp_path, capsys, words, message) -> None:
    assert compare(*runs, *words.split(), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "task", "key"),
    [
        ("wikitext:path=a/b.txt", "path=a/b.txt", "bits_per_byte"),
        ("wikitext:path=a/b.txt/loss", "path=a/b.txt", "loss"),
        ("ruler:vt,length=8/margin", "vt,length=8", "margin"),
        ("lm_eval:task/acc", "task", "acc"),
    ],
)
def test_a_score_may_name_an_option_with_a_path(text: str, task: str, key: str) -> None:
    choice = parse_score_choice(text, suites())
    assert (choice.task, choice.number.key) == (task, key)
    assert choice.text in (text, f"{text}/{key}")


class Unnamed(Mqar):
    """Its numbers go without its name."""

    name = "unnamed"
    compared = False
    named_by_number = True


def test_a_suite_says_that_its_numbers_go_without_its_name() -> None:
    number = Unnamed.numbers[0]
    choice = parse_score_choice(f"unnamed/{number.key}", {"unnamed": Unnamed()})
    assert choice.head == number.head


def test_a_score_that_no_model_has_is_named_as_it_was_written(runs, compare, tmp_path, capsys) -> None:
    words = ("--posthoc", "*", "--score", "ruler:length=960", "--out", tmp_path / "out")
    assert compare(*runs, *words) == 2
    assert "error: --score ruler:length=960/accuracy: no model has a record" in capsys.readouterr().err


def records(folder: Path, level: float) -> None:
    """Records of two tasks at two lengths: a needle is found at `level` percent minus its depth and the kibitokens."""
    for spec in SPECS:
        for length in (1024, 2048):
            for task, questions in (("single", 10), ("multi", 30)):
                base = level - length / 1024 - (20 if spec != SPECS[0] else 0) + (4 if task == "multi" else 0)
                depth = {str(d): {"accuracy": base - d / 2, "questions": questions} for d in (0, 50, 100)}
                groups = {"length": {str(length): {"accuracy": base, "questions": 3}}, "depth": depth}
                record = {"spec": spec, "task": f"{task}@{length}", "questions": 3 * questions, "groups": groups}
                record |= {"checkpoint": "step-00000005.ckpt"}
                place = folder / "evaluation" / "mqar" / "length=1024+2048"
                place = place if spec == SPECS[0] else place / spec.replace(":", "-")
                write(place / f"{task}-{length}.json", record)
    older = {"spec": SPECS[0], "task": "single@1024", "questions": 999, "checkpoint": "step-00000004.ckpt"}
    older |= {"groups": {"length": {"1024": {}}, "depth": {"0": {"accuracy": 0.0, "questions": 999}}}}
    write(folder / "evaluation" / "mqar" / "default" / "single-1024-step-00000004.json", older)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["groups"].update(length={"long": {}}), "groups.length has 'long'; allowed: a whole number"),
        (lambda r: r["groups"]["depth"].update({"top": {"accuracy": 1.0, "questions": 1}}), "groups.depth.top is"),
        (lambda r: r["groups"]["depth"].update({"0": 3}), "groups.depth.0 is 3; allowed"),
        (lambda r: r["groups"]["depth"]["0"].update(accuracy="much"), "groups.depth.0.accuracy is 'much'; allowed"),
        (lambda r: r["groups"]["depth"]["0"].update(questions=0), "groups.depth.0.questions is 0; allowed"),
        (lambda r: r["groups"]["depth"]["0"].pop("questions"), "groups.depth.0.questions is None; allowed"),
        (lambda r: r.update(spec=["none"]), "spec is ['none']; allowed: a text"),
        (lambda r: r.update(questions="many"), "questions is 'many'; allowed: a number"),
        (lambda r: r.update(questions=10**400), "a number of 401 digits"),
    ],
)
def test_a_map_from_a_damaged_record_is_refused_by_its_key(runs, compare, tmp_path, capsys, change, message) -> None:
    records(runs[0], 90.0)
    file = runs[0] / "evaluation" / "mqar" / "length=1024+2048" / "single-1024.json"
    record = json.loads(file.read_text())
    change(record)
    write(file, record)
    assert compare(*runs, "--heatmap", "mqar", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error
    assert error.count("\n") == 1


def test_a_map_has_a_panel_for_each_run_and_compression(runs, compare, tmp_path, capsys) -> None:
    for n, folder in enumerate(runs):
        records(folder, 90.0 - 5 * n)
    (number,) = (number for number in Mqar.numbers if number.key == "accuracy")
    found = heatmaps.read_heatmap(find_runs(runs), suites()["mqar"], number)
    assert (found.runs, found.specs) == (["mha", "cla", "yoco"], list(SPECS))
    cells = {cell[:4]: cell for cell in found.cells}
    assert len(cells) == 3 * 2 * 2 * 3
    wanted = (10 * (85 - 2 - 25) + 30 * (85 - 2 + 4 - 25)) / 40
    assert cells["cla", SPECS[0], 2048, 50.0].value == pytest.approx(wanted), "weighted by questions"
    assert cells["cla", SPECS[1], 2048, 50.0].value == pytest.approx(wanted - 20)
    assert cells["mha", SPECS[0], 1024, 0.0].questions == 40, "an older checkpoint does not count"
    drawn = heatmaps.figure(found)
    *panels, scale = drawn.axes
    assert [axes.get_title() for axes in panels] == ["mha", "cla", "yoco", "", "", ""]
    image = panels[4].images[0]
    assert image.get_array()[1, 1] == pytest.approx(wanted - 20)
    assert image.get_clim() == (0, 100)
    assert scale.get_ylabel() == "accuracy %"
    assert compare(*runs, "--heatmap", "mqar", "--out", tmp_path / "out") == 0
    assert "heatmap-mqar.png" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "heatmap-mqar.png") as picture:
        assert picture.width > 900
    with (tmp_path / "out" / "heatmap-mqar.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(cells)


def test_a_map_of_a_file_of_records_is_that_of_the_run(runs, compare, tmp_path) -> None:
    records(runs[0], 90.0)
    measured = (runs[0] / "evaluation" / "mqar").rglob("*.json")
    found = [
        json.loads(file.read_text()) | {"run": "mha", "suite": "mqar"} for file in measured if "-step-" not in file.stem
    ]
    write(tmp_path / "found.json", {"rows": found})
    options = ("--heatmap", "mqar")
    assert compare(runs[0], *options, "--out", tmp_path / "run") == 0
    assert compare(tmp_path / "found.json", *options, "--out", tmp_path / "file") == 0
    maps = [(tmp_path / name / "heatmap-mqar.csv").read_text() for name in ("run", "file")]
    assert sorted(maps[0].splitlines()) == sorted(maps[1].splitlines())
    assert len(maps[0].splitlines()) > 10
