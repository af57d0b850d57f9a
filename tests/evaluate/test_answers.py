"""One table of designs, compressed caches, perplexity and scores, from runs, studies, files and sweeps made here."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.errors import UserError
from cllm.evaluate.answers import EXACT, Answer, Answers, answers
from cllm.evaluate.answers_table import csv_text, markdown
from cllm.evaluate.comparison import compare as compare_runs
from cllm.evaluate.comparison import find_runs
from cllm.evaluate.measured import read_measured
from cllm.evaluate.report import markdown_table
from cllm.evaluate.score_choice import parse_score_choice
from cllm.evaluate.suites.registry import suites

MODEL = {"vocab_size": 320, "d_model": 16, "n_layers": 2, "n_heads": 2}
XKV, KIVI = "xkv:group=4,ratio=4", "kivi:bits=4"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


def copying(run: str, spec: str, accuracy: float, *, task: str = "all", error: float = 1.0, **more: Any) -> Any:
    own = {"suite": "copying", "run": run, "spec": spec, "task": task, "settings": {"samples": 8}, "questions": 8}
    ratio = {XKV: 4.0, KIVI: 3.2}.get(spec, 1.0)
    return own | {"accuracy": accuracy, "accuracy_stderr": error, "ratio_to_own": ratio} | more


def after_prefix(run: str, spec: str, perplexity: float, exact: float, *, own: float = 1000.0) -> Any:
    sizes = {"bf16_bytes_per_token": own / {XKV: 4.1, KIVI: 3.3}.get(spec, 1.0), "own_bf16_bytes_per_token": own}
    shared = {"run": run, "spec": spec, "set": "books", "prefix": 32, "window": 64, "uncompressed_loss": 1.0}
    shared |= {"mha_bf16_bytes_per_token": 1000.0, "uncompressed_perplexity": exact, "perplexity": perplexity}
    return shared | sizes


def table(paths: list[Path], *scores: str, **options: Any) -> Answers:
    models, _ = read_measured(paths)
    return answers(models, [parse_score_choice(score, suites()) for score in scores], **options)


def row(found: Answers, label: str, spec: str = EXACT) -> Answer:
    (one,) = (row for row in found.rows if (row.label, row.spec) == (label, spec))
    return one


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run with full attention and one with half of its cache, both measured with two specs."""
    folders = []
    for name, share, exact, copied in (("mha", 1.0, 20.0, 40.0), ("cla", 0.5, 10.0, 60.0)):
        folder = tmp_path / "runs" / name
        kv = {"resident": 1000.0 * share, "read": 1000.0 * share}
        summary = {"design": name, "parameters": 10, "steps": 5, "kv_vs_mha": {"resident": share, "read": share}}
        write(folder / "summary.json", summary | {"kv_bytes_per_token": kv})
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "model": MODEL | {"kv": {"preset": name}}}))
        write(folder / "metrics.jsonl", {"step": 5, "tokens": 50, "time": 1.0, "val/loss": 3.0})
        evaluation = folder / "evaluation"
        for spec, cost, kept in (("none", 1.0, 1.0), (XKV, 1.005, 0.5), (KIVI, 1.2, 0.25)):
            file = f"{spec.replace(':', '-')}.json"
            write(
                evaluation / "posthoc" / "books" / file, after_prefix(name, spec, exact * cost, exact, own=1000 * share)
            )
            write(evaluation / "copying" / "default" / file, copying(name, spec, copied * kept))
            single = copying(name, spec, copied * kept + 1, task="distance=512")
            write(evaluation / "copying" / "default" / f"one-{file}", single)
        write(evaluation / "copying" / "copying.json", copying(name, "none", copied, step=5))
        write(evaluation / "copying" / "default" / "all-step-00000003.json", copying(name, XKV, 99.0))
        harness = {"suite": "lm_eval", "run": name, "task": "arc_easy", "spec": "as it is"}
        write(evaluation / "lm_eval" / "arc_easy.json", harness | {"metrics": {"acc": 0.3, "acc_stderr": 0.01}})
        folders.append(folder)
    return folders


def test_a_row_for_each_design_and_compression_with_its_changes(runs: list[Path]) -> None:
    found = table(runs, "copying", "copying:distance=512", "lm_eval/acc")
    assert [(row.label, row.spec) for row in found.rows] == [(d, s) for d in ("mha", "cla") for s in (EXACT, KIVI, XKV)]
    base, xkv, kivi, cla = (row(found, *which) for which in (("mha",), ("mha", XKV), ("mha", KIVI), ("cla",)))
    assert (base.kv_bytes, base.ratio_to_mha, base.perplexity) == (1000.0, 1.0, (20.0, None, None, False))
    assert (cla.kv_bytes, cla.ratio_to_own, cla.ratio_to_mha) == (500.0, 1.0, 2.0)
    assert xkv.ratio_to_own == pytest.approx(4.1), "of the perplexity's prefix, where it was measured"
    assert row(found, "cla", XKV).ratio_to_mha == pytest.approx(8.2)
    assert xkv.perplexity is not None
    assert xkv.perplexity.change == pytest.approx(0.5)
    assert cla.perplexity is not None
    assert cla.perplexity.change == pytest.approx(-50)
    copied, one_task, harness = xkv.scores
    assert copied == (20.0, 1.0, -20.0, True), "half of the copying is lost, 0.5 % of the perplexity"
    assert one_task is not None
    assert one_task[:2] == (21.0, 1.0)
    assert harness is None
    assert kivi.scores[0] == (10.0, 1.0, -30.0, False), "a loss that the perplexity shows too is not hidden"
    assert cla.scores[0] == (60.0, 1.0, 20.0, False)
    assert cla.scores[2] == (0.3, 0.01, 0.0, False)
    lines = markdown(found).splitlines()
    cells = [cell.strip() for cell in lines[4].strip("| ").split("|")]
    assert cells[:8] == ["mha", f"`{XKV}`", "244", "4.10", "4.10", "20.10", "+0.5 %", "20.0 ± 1.0"]
    assert cells[8] == "**-20.0**"
    read = list(csv.DictReader(csv_text(found).splitlines()))
    assert [float(line["copying_accuracy"]) for line in read] == [40.0, 10.0, 20.0, 60.0, 15.0, 30.0]


def test_a_small_or_uncertain_loss_is_not_marked(runs: list[Path]) -> None:
    for spec, accuracy, error in ((XKV, 38.0, 1.0), (KIVI, 20.0, 15.0)):
        file = runs[0] / "evaluation" / "copying" / "default" / f"{spec.replace(':', '-')}.json"
        write(file, copying("mha", spec, accuracy, error=error))
        file = runs[0] / "evaluation" / "posthoc" / "books" / f"{spec.replace(':', '-')}.json"
        write(file, after_prefix("mha", spec, 20.0, 20.0))
    found = table(runs[:1], "copying")
    assert [row.scores[0].hidden_loss for row in found.rows if row.scores[0]] == [False] * 3
    assert "**" not in markdown(found).partition("Bytes:")[0]


def result_of_study(seed: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary = {"kv_bytes_per_token": {"resident": 1000.0}, "kv_vs_mha": {"resident": 1.0}}
    result = {"format": 1, "design": "mha", "settings": {}, "seed": seed, "tokens": 10**6, "summary": summary}
    return result | {
        "evaluations": records, "loss": 3.0, "config": {"optim": {"lr": 1e-3}}, "code": "a", "data": "b",
    }  # fmt: skip


def test_seeds_of_a_study_are_one_row_with_their_standard_error(tmp_path: Path) -> None:
    for seed, exact, copied in ((1, 20.0, 40.0), (2, 24.0, 44.0)):
        name = f"mha-s{seed}"
        records = [after_prefix(name, "none", exact, exact), after_prefix(name, XKV, 1.005 * exact, exact)]
        records += [copying(name, "none", copied), copying(name, XKV, copied - 3 - seed / 4)]
        records += [copying(name, KIVI, copied)] * (seed == 1)
        result = result_of_study(seed, records)
        write(tmp_path / "study" / "results" / f"{name}.json", result)
        write(tmp_path / "study" / "results" / f"search-{seed}.json", result | {"search": True})
    other = result | {"tokens": 2 * 10**6, "evaluations": [], "loss": math.log(18.0)}
    write(tmp_path / "study" / "results" / "mha-long.json", other)
    found = table([tmp_path / "study"], "copying")
    labels = ["mha, tokens 1000000", "mha, tokens 2000000"]
    assert [row.label for row in found.rows] == [labels[0], labels[0], labels[0], labels[1]]
    mean, kivi, xkv = found.rows[:3]
    assert (kivi.spec, kivi.seeds, xkv.seeds) == (KIVI, 1, 2), "seeds are those that the row is of"
    assert (mean.seeds, mean.scores[0]) == (2, (42.0, 2.0, None, False))
    assert mean.perplexity is not None
    assert mean.perplexity[:2] == (22.0, 2.0)
    assert xkv.scores[0] == (38.625, pytest.approx(1.875), -3.375, True), "the difference has its own error, by seed"
    assert row(found, labels[1]).perplexity is not None
    assert row(found, labels[1]).scores == (None,)
    assert any("other texts" in line for line in found.warnings)


@pytest.mark.parametrize(("lost", "is_clear"), [((3.0, 5.0), False), ((3.9, 4.1), True)])
def test_a_loss_over_two_seeds_is_clear_if_its_interval_excludes_0(
    tmp_path: Path, lost: tuple[float, float], is_clear: bool
) -> None:
    """The interval of two seeds reaches 12.7 standard errors to either side; 4 is four of them in the first case."""
    for seed, by in enumerate(lost):
        records = [after_prefix("mha", "none", 20.0, 20.0), after_prefix("mha", XKV, 20.0, 20.0)]
        records += [copying("mha", "none", 40.0), copying("mha", XKV, 40.0 - by)]
        write(tmp_path / "study" / "results" / f"mha-s{seed}.json", result_of_study(seed, records))
    _, xkv = table([tmp_path / "study"], "copying").rows
    assert xkv.scores[0] is not None
    assert (xkv.scores[0].change, xkv.scores[0].hidden_loss) == (pytest.approx(-4.0), is_clear)


def test_a_compression_of_one_seed_is_compared_with_that_seed(runs: list[Path]) -> None:
    """Its number is not that of the other seeds, which may lie far apart."""
    other = runs[0].parent / "mha-2"
    shutil.copytree(runs[0], other)
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("name: mha", "name: mha-2", 1))
    shutil.rmtree(other / "evaluation")
    name = "exact.json"
    write(other / "evaluation" / "copying" / "default" / name, copying("mha-2", "none", 90.0))
    write(other / "evaluation" / "posthoc" / name, after_prefix("mha-2", "none", 40.0, 40.0))
    for paths in ([*runs, other], [other, *runs]):
        found = table(paths, "copying")
        exact, xkv = (next(r for r in found.rows if r.label.startswith("mha") and r.spec == s) for s in (EXACT, XKV))
        assert exact.scores[0] is not None
        assert exact.scores[0].value == 65.0  # of 40 and 90
        alone = row(table(runs, "copying"), "mha", XKV)
        assert xkv.scores[0] == alone.scores[0]
        assert xkv.perplexity == alone.perplexity


def test_bytes_are_those_of_the_text_of_the_perplexity(runs: list[Path]) -> None:
    """A window is a larger share of a short context: sizes at two lengths have no mean."""
    other = runs[0].parent / "mha-2"
    shutil.copytree(runs[0], other)
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("name: mha", "name: mha-2", 1))
    shutil.rmtree(other / "evaluation")
    summary = json.loads((other / "summary.json").read_text())
    write(other / "summary.json", summary | {"kv_bytes_per_token": {"resident": 600.0, "read": 600.0}})
    for paths in ([*runs, other], [other, *runs]):
        mha = next(row for row in table(paths).rows if row.label.startswith("mha") and row.spec == EXACT)
        assert (mha.kv_bytes, mha.ratio_to_mha) == (1000.0, 1.0)


def test_a_score_over_seeds_is_of_one_setting(runs: list[Path]) -> None:
    other = runs[0].parent / "mha-2"
    shutil.copytree(runs[0], other)
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("name: mha", "name: mha-2", 1))
    shutil.rmtree(other / "evaluation" / "copying")
    record = copying("mha-2", "none", 90.0, settings={"samples": 9})
    write(other / "evaluation" / "copying" / "default" / "exact.json", record)
    for paths in ([*runs, other], [other, *runs]):
        found = table(paths, "copying")
        mha = next(row for row in found.rows if row.label.startswith("mha") and row.spec == EXACT)
        assert mha.scores[0] is not None
        assert mha.scores[0].value == 40.0
        assert any("copying without mha-2, measured with other options than samples=8" in w for w in found.warnings)


def test_a_seed_without_the_score_does_not_hide_the_change_to_the_baseline(runs: list[Path]) -> None:
    other = runs[0].parent / "mha-2"  # a seed of the baseline
    shutil.copytree(runs[0], other)
    shutil.rmtree(other / "evaluation" / "copying")
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("name: mha", "name: mha-2", 1))
    for paths in ([*runs, other], [other, *runs]):
        score = row(table(paths, "copying"), "cla").scores[0]
        assert score is not None
        assert score.change == 20.0


def test_a_mean_over_seeds_is_of_one_text(runs: list[Path]) -> None:
    """Seeds measured otherwise, here after a prefix and in validation, have no common perplexity."""
    other = runs[0].parent / "mha-2"
    shutil.copytree(runs[0], other)
    shutil.rmtree(other / "evaluation")
    (other / "config.yaml").write_text((runs[0] / "config.yaml").read_text().replace("name: mha", "name: mha-2", 1))
    for paths in ([*runs, other], [other, *runs]):
        found = table(paths, "copying")
        mha = next(row for row in found.rows if row.label.startswith("mha") and row.spec == EXACT)
        assert mha.seeds == 1, "no number of the other counts"
        assert mha.perplexity is not None
        assert mha.perplexity[:2] == (20.0, None)
        assert row(found, mha.label, XKV).perplexity == pytest.approx((20.1, None, 0.5, False))
        assert any("perplexity without mha-2, measured on another text" in line for line in found.warnings)


def test_a_score_can_name_an_option_of_its_evaluation(runs: list[Path]) -> None:
    """An option and a task can have one name: a record's settings decide."""
    for length, accuracy in ((2048, 70.0), (4096, 50.0)):
        settings = {"length": [length], "samples": 4}
        for task, more in (("all", 0.0), ("vt", 1.0), ("distance=512", 2.0)):
            record = copying("mha", "none", accuracy + more, task=task, settings=settings)
            write(runs[0] / "evaluation" / "copying" / f"{length}" / f"{task}.json", record)
    scores = ("length=4096", "vt,length=2048", "distance=512,length=4096", "samples=8")
    found = table(runs[:1], *(f"copying:{part}" for part in scores))
    assert [cell and cell.value for cell in row(found, "mha").scores] == [50.0, 71.0, 52.0, 40.0]


def test_results_of_one_run_are_put_together_from_several_files(runs: list[Path], tmp_path: Path) -> None:
    """Bytes come from the run; a file of records has scores; the table of a sweep has bytes and perplexity."""
    write(tmp_path / "records.json", {"rows": [copying("cla", "svd:ratio=8", 2.0, ratio_to_own=8.0)]})
    found = table([runs[1], tmp_path / "records.json"], "copying", specs=["svd*"])
    assert [row.spec for row in found.rows] == [EXACT, "svd:ratio=8"]
    assert (found.rows[1].kv_bytes, found.rows[1].ratio_to_mha) == (62.5, 16.0)
    head = "run,design,spec,bytes_per_token,ratio_to_own,ratio_to_mha,perplexity\n"
    lines = ("a,mha,as trained,800,1,1,20", f'a,mha,"{XKV}",200,4,4,21')
    (tmp_path / "sweep.csv").write_text(head + "\n".join(lines))
    swept = table([tmp_path / "sweep.csv"]).rows
    assert [(row.spec, row.kv_bytes, row.ratio_to_mha) for row in swept] == [(EXACT, 800.0, 1.0), (XKV, 200.0, 4.0)]
    assert swept[1].perplexity is not None
    assert swept[1].perplexity.change == pytest.approx(5.0)


def test_two_runs_of_one_name_are_not_put_together(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "mha"
    shutil.copytree(runs[1], other)
    with pytest.raises(UserError, match="two runs are called mha; a comparison needs a name for each"):
        read_measured([*runs, other])
    read_measured([*runs, runs[0]])


def test_two_checkpoint_folders_of_one_name_are_two_models(tmp_path: Path) -> None:
    """As `runs/evaluation/NAME-HASH` of two Hugging Face folders with one base name."""
    for folder, accuracy in (("a", 10.0), ("b", 30.0)):
        own = {"kind": "huggingface", "path": f"/{folder}/small"}
        write(tmp_path / folder / "copying" / "all.json", copying("small", "none", accuracy, **own))
        write(tmp_path / folder / "copying" / "xkv.json", copying("small", XKV, accuracy - 1, **own))
    found = table([tmp_path / "a", tmp_path / "b"], "copying")
    rows = {(row.label, row.spec): row.scores[0] for row in found.rows}
    labels = ["small, folder /a/small", "small, folder /b/small"]
    assert list(rows) == [(label, spec) for label in labels for spec in (EXACT, XKV)]
    assert [cell and cell[0] for cell in rows.values()] == [10.0, 9.0, 30.0, 29.0]
    assert [row.label for row in table([tmp_path / "a"], "copying").rows] == ["small"] * 2, "alone it has its name"
    write(tmp_path / "c.json", {"rows": [copying("small", KIVI, 5.0)]})
    assert len(table([tmp_path / "a", tmp_path / "c.json"], "copying").rows) == 3
    with pytest.raises(UserError, match="two models are called small, /a/small and /b/small, and some records do not"):
        read_measured([tmp_path / "c.json", tmp_path / "a", tmp_path / "b"])


def test_other_settings_are_warned_of_and_have_no_change_to_the_baseline(runs: list[Path]) -> None:
    folder = runs[1] / "evaluation" / "copying"
    (folder / "default").rename(folder / "path=piqa.json")  # the folder of an option that names a file
    for file in [file for file in folder.rglob("*.json") if file.is_file()]:
        write(file, json.loads(file.read_text()) | {"settings": {"samples": 9}})
    found = table(runs, "copying")
    assert "copying was measured with different options: samples=8: mha; samples=9: cla" in found.warnings
    exact, xkv = (row(found, "cla", spec).scores[0] for spec in (EXACT, XKV))
    assert exact is not None
    assert xkv is not None
    assert (exact.change, xkv.change) == (None, -30.0)


def test_several_scores_are_columns_of_a_comparison_of_runs(runs: list[Path]) -> None:
    scores = ["lm_eval:arc_easy/acc", "copying", "copying:distance=512"]
    comparison = compare_runs(find_runs(runs), score=scores)
    assert comparison.quality.head == "lm_eval arc_easy, acc"
    heads, _, *rows = [line.strip("| ").split("|") for line in markdown_table(comparison).splitlines()]
    cells = [dict(zip(map(str.strip, heads), map(str.strip, row), strict=True)) for row in rows]
    wanted = {"lm_eval arc_easy, acc": "0.3000", "copying, accuracy %": "60.0"}
    assert cells[1].items() >= (wanted | {"copying distance=512, accuracy %": "61.0"}).items()


def test_the_command_prints_the_table_of_runs_and_of_files(runs, compare, capsys, tmp_path) -> None:
    assert compare(*runs, "--posthoc", "xkv*", "--score", "copying", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "answers.md").read_text() == printed
    assert printed.count(f"`{XKV}`") == 2
    write(tmp_path / "records.json", [copying("a", "none", 1.0)][0])
    assert compare(tmp_path / "records.json", "--score", "copying") == 0
    assert "1.0 ± 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--posthoc xvk*", "--posthoc xvk*: no record of it"),
        ("--posthoc * --score mqar", "--score mqar/accuracy: no model has a record of mqar, accuracy %"),
        ("--posthoc * --score lm_eval", "--score lm_eval: names no metric; allowed: lm_eval:TASK/METRIC"),
        ("--posthoc * --baseline x", "--baseline x: not among the rows"),
        ("--posthoc * --set x", "--set x: no model has a perplexity on it"),
        ("--posthoc * --heatmap ruler", "--heatmap of results, or with --posthoc, needs --out, the folder of the maps"),
    ],
)
def test_what_was_not_measured_is_refused(runs, compare, capsys, words, message) -> None:
    assert compare(*runs, *words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("record", "key", "value"),
    [
        (after_prefix, "spec", ["none"]),
        (after_prefix, "perplexity", "low"),
        (after_prefix, "uncompressed_perplexity", 0),
        (after_prefix, "bf16_bytes_per_token", "few"),
        (after_prefix, "own_bf16_bytes_per_token", math.nan),
        (copying, "settings", "samples=8"),
        (copying, "questions", "eight"),
        (copying, "ratio_to_own", 0),
        (copying, "accuracy_stderr", -1.0),
    ],
)
def test_a_record_with_a_wrong_value_is_refused_by_its_key(record, key: str, value: Any, tmp_path: Path) -> None:
    made = record("mha", XKV, 10.0, *([10.0] if record is after_prefix else []))
    write(tmp_path / "a.json", {"rows": [made]})
    read_measured([tmp_path / "a.json"])
    write(tmp_path / "a.json", {"rows": [made | {key: value}]})
    with pytest.raises(UserError, match=rf"a\.json: {key} is "):
        read_measured([tmp_path / "a.json"])


def test_a_record_without_a_perplexity_is_not_read(runs: list[Path]) -> None:
    file = runs[0] / "evaluation" / "posthoc" / "books" / f"{XKV.replace(':', '-')}.json"
    record = json.loads(file.read_text())
    del record["perplexity"]
    write(file, record)
    assert row(table(runs), "mha", KIVI).perplexity is not None
    assert not [found for found in table(runs).rows if (found.label, found.spec) == ("mha", XKV)]
