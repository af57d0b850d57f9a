"""Evaluation suites: the registry, a suite from another package, and the options of suites that do not run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.errors import UserError
from cllm.evaluate.suites.registry import suites

ACCURACY = '''
from cllm.evaluate.suites.suite import Number, Option, Suite


class Accuracy(Suite):
    """The share of tokens that are the likeliest under the model."""

    name = "accuracy"
    help = "share of tokens predicted exactly"
    options = (Option("--first", type=int, default=4, metavar="N", help="tokens to score"),)
    numbers = (Number(key="accuracy", head="hits", form="{:.2f}".format, tag="hits"),)

    def run(self, subject, job):
        import torch

        tokens = torch.from_numpy(job.text.source.read(0, job.options.first + 1))[None].to(job.device)
        logits = subject.logits(tokens[:, :-1], None, None, job.options.first)
        hits = (logits.argmax(dim=-1) == tokens[:, 1:]).float().mean().item()
        return [self.record(subject, job, {"accuracy": hits})]


class Layers(Suite):
    """A number of the model alone."""

    name = "layers"
    help = "number of layers"
    numbers = (Number(key="layers", head="layers", form="{:d}".format),)
    takes_text = False

    def run(self, subject, job):
        return [self.record(subject, job, {"layers": len(subject.model.blocks)})]
'''
Install = Callable[..., Path]


@pytest.fixture
def package(install_package: Install) -> None:
    """A package outside of cllm with two suites."""
    points = {"accuracy": "outside_suites:Accuracy", "layers": "outside_suites:Layers"}
    install_package("outside", {"outside_suites": ACCURACY}, {"cllm.suites": points})


def _summarise(path: Path) -> None:
    """Write the files of a trained run that `make_run` leaves out."""
    kv = {"resident": 8.0, "written": 8.0, "read": 8.0}
    summary = {"design": "cla", "parameters": 1000, "kv_bytes_per_token": kv, "kv_vs_mha": kv, "steps": 20}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.jsonl").write_text('{"step": 20, "tokens": 320, "time": 1.0, "val/loss": 5.0}\n')


def test_cllms_own_suites_begin_with_perplexity_and_posthoc() -> None:
    assert list(suites())[:2] == ["perplexity", "posthoc"]


def test_a_suite_of_another_package_is_measured_logged_and_compared(
    package, evaluate, compare, make_run, tmp_path, capsys
) -> None:
    (run, decoder), (other, _) = make_run("a"), make_run("b", data={"document_mask": True})
    assert evaluate("--run", run.path, "--suite", "accuracy", "--first", 6, "--device", "cpu") == 0
    head, row, written = capsys.readouterr().out.splitlines()
    file = run.path / "evaluation" / "accuracy" / "validation.json"
    record = json.loads(file.read_text())
    assert written == f"written: {file}"
    assert (record["suite"], record["run"], record["step"], record["set"]) == ("accuracy", "a", 20, "validation")
    assert 6 * record["accuracy"] == pytest.approx(round(6 * record["accuracy"])), "a share of six tokens"
    assert head.split() == ["run", "step", "set", "hits"]
    assert row.split() == ["a", "20", "validation", f"{record['accuracy']:.2f}"]
    events = EventAccumulator(str(run.tensorboard_folder)).Reload()
    assert events.Scalars("eval-validation/hits")[0].value == pytest.approx(record["accuracy"])

    assert evaluate("--run", run.path, "--suite", "layers") == 0
    assert json.loads((run.path / "evaluation" / "layers" / "layers.json").read_text())["layers"] == len(decoder.blocks)

    for path in (run.path, other.path):
        _summarise(path)
    capsys.readouterr()
    assert compare(run.path, other.path, "--out", tmp_path / "out") == 0
    heads, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:4]]
    assert [cell.strip() for cell in heads[-3:]] == ["hits", "layers", "from"]
    assert [cell.strip() for cell in rows[0][-3:-1]] == [f"{record['accuracy']:.2f}", "2"]
    assert [cell.strip() for cell in rows[1][-3:-1]] == ["–", "–"]
    with (tmp_path / "out" / "comparison.csv").open() as lines:
        first, second = csv.DictReader(lines)
    assert (float(first["accuracy_accuracy"]), first["layers_layers"]) == (record["accuracy"], "2")
    assert second["accuracy_accuracy"] == ""


def test_a_number_that_is_older_than_the_run_is_warned_of(package, evaluate, compare, make_run, tmp_path, capsys):
    run, _ = make_run("a")
    _summarise(run.path)
    assert evaluate("--run", run.path, "--suite", "layers") == 0
    (run.path / "metrics.jsonl").write_text('{"step": 30, "tokens": 480, "time": 1.0, "val/loss": 5.0}\n')
    assert compare(run.path, "--out", tmp_path / "out") == 0
    assert "warning: a: layers was measured at step 20 and trained to 30 since" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--first 3", "--first 3: goes with --suite accuracy"),
        ("--suite accuracy --posthoc none", "--posthoc none: goes with --suite posthoc"),
        ("--suite accuracy --prefix 3", "--prefix 3: needs --posthoc, which says how to compress it"),
        ("--suite posthoc", "--suite posthoc: needs --posthoc SPEC"),
        ("--suite layers --data a.txt", "--data: --suite layers takes no text"),
        ("--suite acuracy", "--suite is 'acuracy'; did you mean \"accuracy\"?"),
    ],
)
def test_options_of_a_suite_that_does_not_run_are_refused(package, evaluate, capsys, words, message) -> None:
    assert evaluate("--run", "a", *words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_help_lists_suites_and_their_options(package, evaluate, capsys) -> None:
    with pytest.raises(SystemExit):
        evaluate("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "accuracy: share of tokens predicted exactly" in text
    assert "--first N tokens to score" in text


_SUITE = "from cllm.evaluate.suites.suite import Number, Option, Suite\nclass S(Suite):\n"
_RUN = "    def run(self, subject, job): return []\n"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("s", "S = 3", "is a int; allowed: a subclass of Suite"),
        ("s", f"{_SUITE}    name = 's'\n{_RUN}", "a suite without help, numbers"),
        ("s", f"{_SUITE}    name, help, numbers = 's', '', ()\n", "a suite without run"),
        ("s", f"{_SUITE}    name, help, numbers = 't', '', ()\n{_RUN}", 'the name of the suite is "t"'),
        (
            "posthoc",
            f"{_SUITE}    name, help, numbers = 'posthoc', '', ()\n{_RUN}",
            "has the name of one of cllm's own",
        ),
    ],
)
def test_a_plugin_that_is_no_suite_is_refused_with_its_package(install_package: Install, name, source, message) -> None:
    install_package("outside", {"outside_suite": source}, {"cllm.suites": {name: "outside_suite:S"}})
    with pytest.raises(UserError, match=rf'plug-in cllm\.suites "{name}" .*outside 1\.0\): {message}'):
        suites()


def test_an_option_that_is_taken_is_refused(install_package: Install, evaluate, capsys) -> None:
    source = f"{_SUITE}    name, help, numbers, options = 's', '', (), (Option('--run'),)\n{_RUN}"
    install_package("outside", {"outside_suite": source}, {"cllm.suites": {"s": "outside_suite:S"}})
    assert evaluate("--run", "a") == 2
    assert "outside 1.0): --run: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        evaluate("--help")
    assert "--suite" in capsys.readouterr().out
