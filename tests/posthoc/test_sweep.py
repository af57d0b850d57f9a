"""`python -m experiments.sweep_posthoc`: one table and one figure of trained designs and their compressed caches."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.data.manifest import Manifest
from cllm.errors import EXIT_STOPPED, UserError
from cllm.evaluate import posthoc
from cllm.evaluate.pareto import TRAINED, expand, markdown, points
from cllm.evaluate.pareto_figure import figure
from cllm.evaluate.points import Scores
from cllm.evaluate.result_folders import beside, results_of_checkpoint, run_of
from cllm.model.sizes import count_parameters, meta_decoder

SPECS = ["--spec", "xkv:group={group},ratio={ratio}", "--spec", "minicache:start=0", "--group", 2, 4, "--ratio", 1.5]


def record(run, spec, n_bytes, perplexity, *, own=100.0, exact=10.0, **more):
    shared = {"design": run, "set": "s", "data": "d", "prefix": 8, "window": 16, "max_tokens": None,
              "tokens_scored": 80, "path": f"/runs/{run}", "checkpoint": "step-00000002.ckpt"}  # fmt: skip
    return {
        "run": run, "spec": spec, "method": spec.partition(":")[0], "bf16_bytes_per_token": n_bytes,
        "perplexity": perplexity, "own_bf16_bytes_per_token": own, "mha_bf16_bytes_per_token": 200.0,
        "uncompressed_perplexity": exact,
        "compression_share_of_prefill": 0.5, "weight_bytes": 0, **shared, **more,
    }  # fmt: skip


def test_templates_are_filled_in_once():
    assert expand(["a:g={group},r={ratio}", "b:r={ratio}", "c"], [2, 4], [2.0, 1.5]) == [
        "a:g=2,r=2", "a:g=2,r=1.5", "a:g=4,r=2", "a:g=4,r=1.5", "b:r=2", "b:r=1.5", "c",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"allowed in braces: \{group\} and \{ratio\}"):
        expand(["xkv:{rank}"], [1], [1.0])


def test_the_front_has_what_nothing_beats():
    found = points(
        [
            record("mha", "none", 100.0, 10.0),
            record("mha", "xkv:a", 50.0, 11.0),
            record("mha", "svd:a", 50.0, 12.0),  # as many bytes and worse
            record("mha", "xkv:b", 25.0, 20.0),
            record("half", "none", 50.0, 10.5, own=50.0, exact=10.5),
            record("half", "xkv:a", 25.0, 19.0, own=50.0, exact=10.5),
        ]
    )
    assert [(p.run, p.spec, p.front) for p in found] == [
        ("mha", TRAINED, True),
        ("half", TRAINED, True),
        ("mha", "xkv:a", False),
        ("mha", "svd:a", False),
        ("half", "xkv:a", True),
        ("mha", "xkv:b", False),
    ]
    assert [round(p.increase_percent) for p in found] == [0, 5, 10, 20, 90, 100]
    assert [(p.ratio_to_own, p.ratio_to_mha) for p in found[1:3]] == [(1, 4), (2, 4)]
    half = points(
        [record("mha", "none", 100.0, 10.0), record("b", "none", 50.0, 5.0, own=50.0, exact=5.0)], baseline="b"
    )
    assert [p.increase_percent for p in half] == [100, 0]
    heavy = markdown(points([record("mha", "none", 100.0, 10.0), record("mha", "c", 50.0, 11.0, weight_bytes=2048)]))
    assert heavy.rstrip().endswith("- mha, c: and 2,048 bytes of weights, for all caches together")
    split = markdown(points([record("mha", "s", 50.0, 11.0, bf16_host_bytes_per_token=40.0)]))
    assert split.rstrip().endswith("- mha, s: and 40 bytes/token in host memory")
    assert markdown(found, ["x: too short"]).rstrip().endswith("- not measured: x: too short")


def test_unequal_measurements_are_refused():
    with pytest.raises(UserError, match="measurements differ in prefix: 4, 8; measure all alike"):
        points([record("a", "none", 1.0, 1.0), record("b", "none", 1.0, 1.0, prefix=4)])
    with pytest.raises(UserError, match=r"measurements differ in tokens_scored: 40, 80; measure all alike \(another"):
        points([record("a", "none", 1.0, 1.0), record("b", "none", 1.0, 1.0, tokens_scored=40)])
    for other in ({"path": "/other/a"}, {"checkpoint": "step-00000001.ckpt"}):
        with pytest.raises(UserError, match='two runs are called "a": /'):
            points([record("a", "none", 1.0, 1.0), record("a", "xkv:a", 1.0, 1.0, **other)])
    with pytest.raises(UserError, match="--baseline c: not among the runs"):
        points([record("a", "none", 1.0, 1.0)], baseline="c")


def test_a_sweep_is_written_and_resumed(sweep, run, tmp_path, capsys, monkeypatch):
    runs = [run("mha")[0], run("cla", kv={"preset": "cla"})[0]]
    words = [*(made.path for made in runs), "--device", "cpu", *SPECS]
    assert sweep(*words) == 0
    printed = capsys.readouterr().out
    assert "not measured: cla, minicache" not in printed
    folder = tmp_path / "runs" / "posthoc"
    rows = list(csv.DictReader((folder / "posthoc.csv").open()))
    assert {(row["run"], row["spec"]) for row in rows} == {
        (made.name, spec)
        for made in runs
        for spec in (TRAINED, "xkv:group=2,ratio=1.5", "xkv:group=4,ratio=1.5", "minicache:start=0")
    }
    config = runs[0].config()
    of_mha = [row for row in rows if row["run"] == "mha"]
    assert {row["trained_tokens"] for row in of_mha} == {str(20 * config.train.global_batch * 48)}
    assert {row["parameters"] for row in of_mha} == {str(count_parameters(meta_decoder(config.model)))}
    assert {row["window"] for row in rows} == {"48"}
    of_text = {f"validation {Manifest.read(config.data.main_folder).digest()[:12]}"}
    assert {row["text"] for row in rows} == of_text, "as results of studies name it"
    assert (folder / "posthoc.png").stat().st_size > 10_000
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["posthoc"]
    assert "posthoc/text_summary" in events.Tags()["tensors"]

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(posthoc, "measure", fail)
    assert sweep(*words) == 0
    with pytest.raises(AssertionError, match="measured again"):
        sweep(*words, "--again")
    with pytest.raises(AssertionError, match="measured again"):
        sweep(*words, "--batch", 1)
    path = next((runs[0].evaluation_folder / "posthoc" / "validation").glob("minicache*"))
    text = path.read_text()
    for change in ({"step": 3}, {"sinks": 0}):  # of another step, or before sinks were kept
        path.write_text(json.dumps({**json.loads(text), **change}))
        assert sweep(*words) == 1
        assert "mha, minicache:start=0: failed: measured again" in capsys.readouterr().out
    path.write_text(text)
    assert sweep(*words) == 0
    path = next((runs[0].evaluation_folder / "posthoc" / "validation").glob("xkv-group=2*"))
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "facts": {}}))  # before svd=auto, which chooses the solver
    assert sweep(*words) == 1
    assert "mha, xkv:group=2,ratio=1.5: failed: measured again" in capsys.readouterr().out
    older = {key: value for key, value in json.loads(text).items() if key != "text"}
    path.write_text(json.dumps(older))  # before records had it
    assert sweep(*words) == 0
    assert {row["text"] for row in csv.DictReader((folder / "posthoc.csv").open())} == of_text
    path.write_text(text)
    (_, checkpoint), *_ = runs[0].checkpoints()
    checkpoint.write_bytes(checkpoint.read_bytes())  # saved anew: other weights may be under the same name
    with pytest.raises(AssertionError, match="measured again"):
        sweep(*words)


def test_a_spec_that_does_not_fit_a_run_is_told_and_the_others_go_on(sweep, run, capsys):
    made, _ = run("cla", kv={"preset": "cla"})
    words = ["--device", "cpu", "--spec", "minicache", "--spec", "svd:rank_k=2,rank_v=2"]
    assert sweep(made.path, *words) == 0
    out = capsys.readouterr().out
    assert "not measured: cla, minicache: minicache: no two neighbours of one shape from slot 1 on, of 2" in out
    assert "svd:rank_k=2,rank_v=2" in out
    assert sweep(made.path, "--spec", "svd:rank=2") == 2
    assert 'unknown option "rank" of svd' in capsys.readouterr().err


def test_a_spec_that_fails_loses_no_other(sweep, run, capsys, monkeypatch):
    made, _ = run("mha")
    measure = posthoc.measure

    def fragile(subject, text, settings, specs, *rest, **options):
        if specs == ["minicache"]:
            raise RuntimeError("out of\nmemory")
        return measure(subject, text, settings, specs, *rest, **options)

    monkeypatch.setattr(posthoc, "measure", fragile)
    assert sweep(made.path, "--device", "cpu", "--spec", "minicache", "--spec", "svd:rank_k=2,rank_v=2") == 1
    told = capsys.readouterr()
    assert "not measured: mha, minicache: failed: out of memory" in told.out
    assert "| svd:rank_k=2,rank_v=2 |" in told.out.replace("`", "")
    assert "Traceback" in told.err


def test_a_broken_run_is_left_out(sweep, run, tmp_path, capsys):
    good, broken = run("mha")[0], tmp_path / "broken"
    broken.mkdir()
    words = ["--device", "cpu", "--spec", "svd:rank_k=2,rank_v=2", "--out", tmp_path / "out"]
    assert sweep(broken, good.path, *words) == 1
    told = capsys.readouterr()
    assert f"left out: {broken}: neither a run" in told.err
    assert "| mha |" in told.out
    assert sweep(broken, broken, *words) == 2
    assert "none of the 2 runs can be used" in capsys.readouterr().err


def test_two_sweeps_do_not_write_one_table(sweep, run, tmp_path, capsys, monkeypatch):
    """The second starts while the first measures: the table would hold the rows of the one that ended last."""
    made, _ = run("mha")
    words = [made.path, "--device", "cpu", "--out", tmp_path / "out", "--spec"]
    measure = posthoc.measure
    statuses: list[int] = []

    def meanwhile(*arguments, **options):
        if not statuses:
            statuses.append(sweep(*words, "kivi:bits=8,group=8,residual=0"))
        return measure(*arguments, **options)

    monkeypatch.setattr(posthoc, "measure", meanwhile)
    assert sweep(*words, "minicache:start=0") == 0
    assert statuses == [2]
    assert f"error: {tmp_path / 'out'}: is in use by process {os.getpid()} on " in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "out" / "posthoc.csv").open()))
    assert {row["spec"] for row in rows} == {TRAINED, "minicache:start=0"}


def test_a_sweep_that_a_signal_stops_keeps_what_it_measured(sweep, run, tmp_path, capsys, monkeypatch):
    made, _ = run("mha")
    measure = posthoc.measure

    def stopped(subject, text, settings, specs, *rest, **options):
        if specs == ["minicache:start=0"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(subject, text, settings, specs, *rest, **options)

    monkeypatch.setattr(posthoc, "measure", stopped)
    words = [made.path, "--device", "cpu", "--spec", "minicache:start=0"]
    assert sweep(*words) == EXIT_STOPPED
    line = "stopped by SIGTERM; the same command goes on: what was measured is kept"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert len(list((made.evaluation_folder / "posthoc" / "validation").glob("none*"))) == 1
    monkeypatch.setattr(posthoc, "measure", measure)
    assert sweep(*words) == 0


def test_a_stop_that_became_another_error_is_no_failed_measurement(sweep, run, tmp_path, capsys, monkeypatch):
    """As pydantic's compiled code replaces the exception of a signal by its own."""
    made, _ = run("mha")
    measure = posthoc.measure

    def stopped(subject, text, settings, specs, *rest, **options):
        if specs != ["minicache:start=0"]:
            return measure(subject, text, settings, specs, *rest, **options)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("cannot be built: Interrupted: SIGTERM")

    monkeypatch.setattr(posthoc, "measure", stopped)
    out = tmp_path / "out"
    assert sweep(made.path, "--device", "cpu", "--spec", "minicache:start=0", "--out", out) == EXIT_STOPPED
    printed, err = capsys.readouterr()
    assert err.splitlines()[-1] == "stopped by SIGTERM; the same command goes on: what was measured is kept"
    assert "Traceback" not in err
    assert printed == ""
    assert not (out / "posthoc.csv").exists()


def test_the_table_goes_beside_the_runs_or_to_runs(tmp_path, monkeypatch):
    """Never into a folder that only happens to hold a checkpoint, or to be above two runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "far/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "llama").mkdir()
    where = {
        ("runs/a",): "runs/posthoc",
        ("far/c",): "far/posthoc",
        ("runs/a", "runs/b/checkpoints/step-00000001.ckpt"): "runs/posthoc",
        ("runs/a", "far/c"): "runs/posthoc",
        ("llama",): "runs/posthoc",
        ("far/c", "llama"): "runs/posthoc",
    }
    assert {paths: str(beside([run_of(path) for path in paths], "posthoc")) for paths in where} == where
    assert results_of_checkpoint(tmp_path / "llama") == results_of_checkpoint(Path("llama"))
    assert results_of_checkpoint(tmp_path / "a" / "llama") != results_of_checkpoint(tmp_path / "b" / "llama")


def test_a_score_takes_the_place_of_perplexity(sweep, run, tmp_path, capsys):
    made = run("mha")[0]
    words = [made.path, "--device", "cpu", "--spec", "svd:rank_k=1,rank_v=1", "--score"]
    score = "copying:samples=2,length=4,distances=8"
    assert sweep(*words, score) == 0
    (head, row, other), suite = _table(capsys.readouterr().out), made.evaluation_folder / "copying"
    assert head[7] == "copying, accuracy %"
    records = {r["spec"]: r for r in (json.loads(path.read_text()) for path in suite.glob("*/*/all.json"))}
    assert set(records) == {"none", "svd:rank_k=1,rank_v=1"}
    assert [row[7], other[7]] == [f"{records[spec]['accuracy']:.1f}" for spec in records]
    with (tmp_path / "runs" / "posthoc" / "posthoc.csv").open() as lines:
        assert [float(line["score"]) for line in csv.DictReader(lines)] == [r["accuracy"] for r in records.values()]
    for wrong, message in (("posthoc", "posthoc is no suite of samples; allowed: "), ("copyin", "--score copyin: ")):
        assert sweep(*words, wrong) == 2
        assert message in capsys.readouterr().err


def test_the_front_of_scores_goes_by_their_better_direction():
    found = points([record("a", "none", 100.0, 10.0), record("a", "x", 50.0, 9.0), record("a", "y", 25.0, 8.0)])
    assert [point.front for point in found] == [False, False, True], "the last one has less bytes and less perplexity"
    values = {("a", TRAINED): 90.0, ("a", "x"): 95.0, ("a", "y"): 10.0}
    for higher, front in ((True, [False, True, True]), (False, [False, False, True])):
        scores = Scores(head="hits", form="{:.0f}".format, higher_is_better=higher, values=values)
        assert [point.front for point in scores.apply(found)] == front
    (axes,) = figure(scores.apply(found)[:2], scores).axes
    assert axes.get_ylabel() == "hits"
    assert axes.get_title(loc="left") == "hits against bytes of cache: down and left is better"
    del values["a", "x"]
    assert [point.score for point in scores.apply(found)] == [90.0, None, 10.0]
    assert not scores.apply(found)[1].front


def _table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
