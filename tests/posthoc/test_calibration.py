"""The text on which methods calibrate: `--calibration`, and `calibration=` of `cllm.compress`."""

from __future__ import annotations

import json

import pytest
import torch

import cllm
from cllm.data.store import TokenStore
from cllm.errors import UserError
from cllm.evaluate import posthoc
from cllm.posthoc.methods.palu import Palu

SPEC = "palu:keep=0.5,allocation=uniform"


@pytest.fixture
def calibrated_on(monkeypatch):
    """The tokens that `palu` has calibrated on, call by call."""
    found, prepare = [], Palu.prepare

    def record(self, engine, ids):
        found.append(ids.clone())
        prepare(self, engine, ids)

    monkeypatch.setattr(Palu, "prepare", record)
    return found


@pytest.fixture
def other(tmp_path, texts):
    """A text file of other documents."""
    path = tmp_path / "other.txt"
    path.write_text(" ".join(f"{text} {i}" for i, text in enumerate(texts[::-1])), encoding="utf-8")
    return path


def records(run):
    return [json.loads(path.read_text()) for path in sorted(run.evaluation_folder.glob("posthoc/**/*.json"))]


def test_methods_calibrate_on_the_named_text(evaluate, run, other, prepared, calibrated_on) -> None:
    made, _ = run()
    words = ["--run", made.path, "--device", "cpu", "--batch", 3, "--posthoc", SPEC, "--posthoc", "svd:ratio=2"]
    for more in ([], ["--calibration", other], ["--calibration", prepared(300)]):
        assert evaluate(*words, *more) == 0
    own, named, train = calibrated_on
    assert own.shape == named.shape == train.shape == (3, 24)
    validation, training = (TokenStore(prepared(300), split).read(0, 23) for split in ("validation", "train"))
    assert own[0, 1:].tolist() == validation.tolist()  # after the start token
    assert train[0, 1:].tolist() == training.tolist()
    assert named[0].tolist() not in (own[0].tolist(), train[0].tolist())
    assert not torch.equal(named[0], named[1])
    found = {record["calibration"]: record for record in records(made) if record["spec"] == SPEC}
    assert set(found) == {None, str(other), str(prepared(300))}
    assert len({record["loss"] for record in found.values()}) == 3
    assert [record["calibration"] for record in records(made) if record["spec"] == "svd:ratio=2"] == [None]


def test_suites_of_samples_calibrate_on_the_named_text(evaluate, run, other, calibrated_on) -> None:
    made, _ = run()
    words = ["--run", made.path, "--device", "cpu", "--suite", "copying:distances=16,samples=3", "--posthoc", SPEC]
    for more in ([], ["--calibration", other]):
        assert evaluate(*words, *more) == 0
    own, named = calibrated_on
    assert own.shape == named.shape
    assert not torch.equal(own, named)
    files = sorted((made.evaluation_folder / "copying").glob("*/palu*/*.json"))
    assert {json.loads(file.read_text())["calibration"] for file in files} == {None, str(other)}
    assert len({file.parent for file in files}) == 2


def test_a_sweep_measures_again_on_another_calibration_text(sweep, run, other, monkeypatch, capsys) -> None:
    made, _ = run()
    words = [made.path, "--device", "cpu", "--spec", SPEC, "--spec", "svd:ratio=2", "--calibration", other]
    measure, measured = posthoc.measure, []

    def record(subject, text, settings, specs, *args, **more):
        measured.extend(specs)
        return measure(subject, text, settings, specs, *args, **more)

    monkeypatch.setattr(posthoc, "measure", record)
    assert sweep(*words) == 0
    assert sweep(*words) == 0
    assert measured == ["none", SPEC, "svd:ratio=2"]
    assert sweep(*words[:-2]) == 0  # `none` and `svd` do not calibrate
    assert measured[3:] == [SPEC]
    other.write_text(other.read_text() + " more", encoding="utf-8")
    assert sweep(*words) == 0
    assert measured[4:] == [SPEC]
    capsys.readouterr()


def test_analyze_calibrates_on_the_named_text(analyze_command, run, other, calibrated_on) -> None:
    made, _ = run()
    words = [made.path, "--device", "cpu", "--sequences", 2, "--length", 24, "--group", 1, "--posthoc", SPEC]
    for more in ([], ["--calibration", other]):
        assert analyze_command(*words, *more) == 0
    own, named = calibrated_on
    assert own.shape == named.shape
    assert not torch.equal(own, named)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration", "{other}"], "--calibration {other}: needs --posthoc"),
        (["--posthoc", "svd:ratio=2", "--calibration", "{other}"], "none of svd:ratio=2 calibrates on a text"),
        (
            ["--posthoc", SPEC, "--calibration", "no/such"],
            "calibration text: no/such: no such file or folder",
        ),
        (["--posthoc", SPEC, "--calibration", "{short}"], "calibration text: {short}: too short: it has no 24 tokens"),
        (["--calibration", "{other}", "--suite", "mqar"], "--calibration {other}: needs --posthoc"),
    ],
)
def test_a_calibration_text_that_cannot_be_used_is_one_line(
    words, message, evaluate, run, other, tmp_path, capsys
) -> None:
    made, _ = run()
    (short := tmp_path / "short.txt").write_text("alpha", encoding="utf-8")
    words = [word.format(other=other, short=short) for word in words]
    assert evaluate("--run", made.path, "--device", "cpu", *words) == 2
    error = capsys.readouterr().err
    assert message.format(other=other, short=short) in error
    assert error.count("\n") == 1


def test_score_calibrates_on_the_named_text(run, other, calibrated_on) -> None:
    made, _ = run()
    own = cllm.score(made.path, posthoc=[SPEC, "svd:ratio=2"], device="cpu")
    named = cllm.score(made.path, posthoc=[SPEC, "svd:ratio=2"], calibration=other, device="cpu")
    assert [record["calibration"] for record in (*own, *named)] == [None, None, str(other), None]
    assert own[0]["loss"] != named[0]["loss"]
    assert own[1]["loss"] == named[1]["loss"]
    with pytest.raises(UserError, match=r"score: calibration .*other.txt: needs posthoc methods"):
        cllm.score(made.path, calibration=other)


def test_compress_calibrates_on_the_given_tokens(decoder, tokens, filled) -> None:
    model, prompt, other = decoder(), tokens(1, 24), tokens(2, 32, seed=1)
    own = cllm.compress(model, prompt, SPEC)
    named = cllm.compress(model, prompt, SPEC, calibration=other)
    assert own.outcome.errors != named.outcome.errors
    assert cllm.compress(model, other[:, :24], SPEC, calibration=prompt).outcome.errors != own.outcome.errors
    _, cache = filled(model, prompt)
    assert cllm.compress(model, cache, SPEC, calibration=other).outcome.errors == named.outcome.errors
    with pytest.raises(UserError, match="calibrates on tokens; give calibration="):
        cllm.compress(model, cache, SPEC)
    with pytest.raises(UserError, match=r"compress: calibration: svd:ratio=2 does not calibrate on tokens"):
        cllm.compress(model, prompt, "svd:ratio=2", calibration=other)
    with pytest.raises(UserError, match=r"compress: calibration has shape \(24\)"):
        cllm.compress(model, prompt, SPEC, calibration=prompt[0])
    with pytest.raises(UserError, match="records what the prefill computes"):
        cllm.compress(model, cache, "h2o:tokens=8")
