"""evaluate.py with suites of samples: their options, --posthoc, files, tables, and what is refused."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COPYING = "copying:distances=6|8,length=6,samples=3"
MAIN = ["copying, accuracy %", "mqar, accuracy %"]
SUITES = ("--suite", COPYING, "--suite", "mqar:pairs=[2,4],length=16,samples=2", "--device", "cpu")


def test_suites_of_a_run_are_measured_written_and_compared(evaluate, compare, make_run, capsys, tmp_path) -> None:
    run, _ = make_run("a")
    assert evaluate("--run", run.path, *SUITES, "--suite", "perplexity", "--max-tokens", 20) == 0
    copying, mqar, perplexity = capsys.readouterr().out.split("\n\n")
    assert copying.splitlines()[0] == "copying"
    assert [line.split()[2] for line in copying.splitlines()[2:]] == ["distance=6", "distance=8", "all"]
    assert mqar.splitlines()[1].split()[3:] == ["questions", "accuracy", "%", "loss"]
    assert "bits/byte" in perplexity
    folder = run.path / "evaluation" / "copying"
    assert f"written: 3 files in {folder / 'distances=6+8,length=6,samples=3'}" in perplexity
    record = json.loads((folder / "distances=6+8,length=6,samples=3" / "distance=6.json").read_text())
    assert (record["task"], record["spec"], record["samples"], record["questions"]) == ("distance=6", "as it is", 3, 6)
    assert record["loss_stderr"] > 0
    mean = json.loads((folder / "copying.json").read_text())
    assert (mean["task"], mean["tasks"], mean["step"]) == ("all", 2, 20)
    events = EventAccumulator(str(run.tensorboard_folder)).Reload()
    assert events.Scalars("eval-copying/loss")[0].value == pytest.approx(mean["loss"])

    other, _ = make_run("b", data={"document_mask": True})
    assert evaluate("--run", other.path, "--suite", "copying:distances=6,samples=3", "--device", "cpu") == 0
    kv = {"resident": 8.0, "written": 8.0, "read": 8.0}
    summary = {"design": "cla", "parameters": 1000, "kv_bytes_per_token": kv, "kv_vs_mha": kv, "steps": 20}
    for path in (run.path, other.path):
        (path / "summary.json").write_text(json.dumps(summary))
        (path / "metrics.jsonl").write_text('{"step": 20, "tokens": 320, "time": 1.0, "val/loss": 5.0}\n')
    capsys.readouterr()
    assert compare(run.path, other.path, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    heads = [head.strip() for head in out.splitlines()[0].split("|")]
    assert [head for head in heads if "," in head] == ["KV resident, bf16", "KV read, bf16", *MAIN]
    assert "copying was measured with different options: distances=[6, 8],length=6,samples=3,seed=0: a;" in out


def test_posthoc_compresses_the_contexts_of_every_suite(evaluate, make_run, capsys, caplog, tmp_path) -> None:
    run, _ = make_run("a")
    specs = ("--posthoc", "none", "--posthoc", "svd:ratio=4,sinks=0")
    assert evaluate("--run", run.path, *SUITES, *specs, "--out", tmp_path / "out") == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.splitlines()[0] for table in tables] == [
        "copying: accuracy %", "copying: loss", "copying: own/x", "mqar: accuracy %", "mqar: loss", "mqar: own/x"
    ]  # fmt: skip
    assert "mqar: svd:ratio=4,sinks=0: pairs=2 is left out: " in caplog.text
    assert tables[3].splitlines()[2].split()[-1] == "-"
    assert float(tables[2].split()[-1]) > 3.9
    folder = tmp_path / "out" / "copying" / "distances=6+8,length=6,samples=3"
    none, svd = (json.loads((folder / spec / "all.json").read_text()) for spec in ("none", "svd-ratio=4,sinks=0"))
    assert none["loss"] == json.loads((tmp_path / "out" / "copying" / "copying.json").read_text())["loss"]
    assert none["loss"] != svd["loss"]


def test_tables_of_one_suite_with_several_options_are_told_apart(evaluate, make_run, capsys) -> None:
    run, _ = make_run("a")
    texts = ("copying:distances=6,samples=1", "copying:distances=8,samples=1")
    assert evaluate("--run", run.path, "--suite", texts[0], "--suite", texts[1], "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("--suite")] == [f"--suite {text}" for text in texts]
    assert evaluate("--run", run.path, "--suite", texts[0], "--device", "cpu") == 0
    assert capsys.readouterr().out.startswith("copying\n")


@pytest.mark.parametrize("specs", [(), ("--posthoc", "none", "--posthoc", "int8:sinks=0")])
def test_subjects_of_one_name_have_lines_of_their_own(evaluate, make_run, capsys, specs) -> None:
    run, _ = make_run("a", steps=(10, 20))
    runs = ("--run", run.path, "--run", run.checkpoint_path(10))
    assert evaluate(*runs, "--suite", "copying:distances=6,samples=1", *specs, "--device", "cpu") == 0
    for table in capsys.readouterr().out.partition("\nwritten")[0].split("\n\n"):
        assert [line.split()[1] for line in table.splitlines()[2:]] == ["20", "10"]


def test_a_spec_that_is_given_twice_is_measured_once(evaluate, make_run, capsys) -> None:
    run, _ = make_run("a")
    words = ("--suite", "copying:distances=6,length=6,samples=1", "--device", "cpu")
    assert evaluate("--run", run.path, *words, "--posthoc", "none", "--posthoc", "none") == 0
    assert "2 files" in capsys.readouterr().out, "the task and the mean, of one spec"


def test_an_exported_folder_gives_the_numbers_of_its_run(evaluate, make_run, tmp_path, monkeypatch, capsys) -> None:
    from cllm.commands.convert import main as convert

    run, _ = make_run("a")
    assert convert(["export", str(run.path), str(tmp_path / "exported")]) == 0
    monkeypatch.chdir(tmp_path)
    spec = ("--posthoc", "svd:rank_k=2,rank_v=2,sinks=1")
    assert evaluate("--run", run.path, "--run", "exported", *SUITES, *spec) == 0
    (other,) = (tmp_path / "runs" / "evaluation").iterdir()
    losses = [
        [json.loads(file.read_text())["loss"] for file in sorted(folder.rglob("*.json"))]
        for folder in (run.path / "evaluation", other)
    ]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines[-4:]] == ["written: 3 files"] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite copying:distances=400", "has 800 tokens; allowed: up to the context of a, 32"),
        ("--suite copying:distance=4", 'unknown option "distance" of copying; did you mean "distances"?'),
        ("--suite copying:samples=0", "samples: Input should be greater than or equal to 1 got 0"),
        (
            "--suite copying:samples",
            '"samples" is not of the form KEY=VALUE; allowed: distances, length',
        ),
        ("--suite perplexity:window=3", "perplexity has no options in its name"),
        ("--suite copying --suite copying", "--suite copying: is given twice"),
        ("--suite copying --prefix 4 --posthoc none", "--prefix 4: goes with --suite posthoc"),
        ("--suite copying --posthoc xkw", 'unknown method "xkw"'),
        ("--suite perplexity --suite copying:distances=8,samples=1 --window 99", "--window is 99; allowed: up to"),
        ("--suite copying --data a.txt", "--data: --suite copying takes no text"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_runs(evaluate, make_run, capsys, words, message) -> None:
    run, _ = make_run("a")
    first = () if words.count("--suite") == 2 or "--data" in words else ("--suite", "perplexity")
    assert evaluate("--run", run.path, *first, *words.split(), "--device", "cpu") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
    assert not (run.path / "evaluation").exists()


def test_suites_and_their_options_are_listed(evaluate, capsys) -> None:
    assert evaluate("--list-suites") == 0
    text = capsys.readouterr().out
    assert "mqar: multi-query associative recall" in text
    assert "    pairs=4|8|16|32  N, the key-value pairs of a sample." in text
    assert "    --prefix N tokens of each window to compress" in text
