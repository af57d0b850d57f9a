"""evaluate.py in several processes: the results of one process, and what happens to failures, kills and signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.commands.evaluate_options import options_parser
from cllm.evaluate.parallel.parts import Part, parts_of
from cllm.evaluate.parallel.store import Report, Store, results_of, write_report
from cllm.evaluate.suites.registry import choose
from cllm.files import write_atomic
from cllm.posthoc.registry import parse
from cllm.workers import Health, find_gpus

REPO = Path(__file__).resolve().parents[2]
TIMES = re.compile(r"seconds|time|share_of_prefill")


def contents(folder: Path) -> dict[str, Any]:
    """The JSON files of a folder by path, without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(inner) for key, inner in value.items() if not TIMES.search(key)}
        return value

    return {str(f.relative_to(folder)): timeless(json.loads(f.read_bytes())) for f in sorted(folder.rglob("*.json"))}


def tables(text: str) -> list[str]:
    """The lines of printed tables, without the column of times, which is a percentage of a whole number."""
    return [" ".join(re.sub(r"\s\d+ %", "", line).split()).strip("- ") for line in text.splitlines()]


def parts(folder: Path) -> list[Path]:
    """The folders of parts below a folder."""
    return sorted(file.parent for file in folder.rglob("part.json"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Work in a folder of the test: the files of parts are in `runs/` of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("warm_python")
def test_two_processes_write_and_print_what_one_does(evaluate, make_run, capsys, monkeypatch) -> None:
    failures = list[bool]()
    monkeypatch.setattr(Health, "ended", lambda self, place, *, failed: failures.append(failed))
    run = make_run("a")[0].path
    words = ["--run", run]
    words += ["--suite", "copying:distances=6|8,length=6,samples=3", "--suite", "copying:distances=7,samples=2"]
    words += ["--suite", "posthoc", "--posthoc", "xkv:group=2,energy=0.9", "--posthoc", "none"]
    words += ["--posthoc", "svd:ratio=4,sinks=0", "--device", "cpu", "--max-tokens", 60]
    printed, written, events = [], [], []
    for more in ((), ("--processes", 2)):
        assert evaluate(*words, *more) == 0
        printed.append(tables(capsys.readouterr().out))
        written.append(contents(run / "evaluation"))
        events.append(len(list(run.rglob("events*"))))
        shutil.rmtree(run / "evaluation")
        shutil.rmtree(run / "tensorboard")
    assert written[0] == written[1]
    assert len(written[0]) > 10
    assert parse("xkv:group=2,energy=0.9").chooses_for_batch, "so it is measured apart from the other specs"
    assert printed[0] == printed[1]
    assert events[0] == events[1] > 0
    assert {*failures} == {False}, "no GPU would be given up"
    assert not list(Path("runs").glob("evaluation/.parts-*")), "nothing is left when all parts have ended"


@pytest.fixture
def command(make_run, tmp_path) -> Callable[..., list[str]]:
    """`command("copying:samples=2")`: the words of an evaluation of a run in two processes."""
    run = make_run("a")[0].path

    def words(*suites: str) -> list[str]:
        chosen = [word for suite in suites for word in ("--suite", suite)]
        return ["--run", str(run), *chosen, "--out", str(tmp_path / "out"), "--device", "cpu", "--processes", "2"]

    return words


@pytest.mark.usefixtures("warm_python")
def test_a_part_that_fails_is_named_and_the_rest_goes_on_and_is_not_repeated(
    evaluate, command, capsys, tmp_path, monkeypatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("")
    words = command("copying:distances=6,samples=2", f"wikitext:path={file}")
    assert evaluate(*words) == 1
    captured = capsys.readouterr()
    assert f"left out: --run {words[1]} --suite wikitext:path={file}: " in captured.err
    assert "log: " in captured.err
    assert "Traceback" not in captured.err
    assert captured.out.startswith("copying\n")
    (ended,) = [part for part in parts(tmp_path) if (part / "report.json").exists()]
    before = (ended / "report.json").stat().st_mtime_ns
    file.write_text("one two three " * 30)
    monkeypatch.setattr("cllm.evaluate.parallel.store.remove", lambda folder, kind: None)
    assert evaluate(*words) == 0
    captured = capsys.readouterr()
    assert "1 of 2 measurements were made before and are not repeated" in captured.err
    assert "wikitext\n" in captured.out
    assert captured.out.startswith("copying\n")
    assert (ended / "report.json").stat().st_mtime_ns == before


HALTING = """
import sys, time
from pathlib import Path
from cllm.commands import evaluate, evaluate_part
from cllm.evaluate.tasks.mqar import Mqar

began, file = sys.argv[1:3]

def halt(*_):
    Path(began).touch()
    while True:
        time.sleep(0.05)

if file.endswith("part.json"):
    Mqar.samples = halt
    sys.exit(evaluate_part.main([file]))
evaluate._command = lambda part: [sys.executable, __file__, began, str(part)]
sys.exit(evaluate.main(sys.argv[2:]))
"""
"""`cllm evaluate` whose suite mqar never ends. Takes a file to make when mqar has begun, then the command's words."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_process_and_goes_on_later(
    evaluate, command, capsys, tmp_path, number, warm_executable, monkeypatch
) -> None:
    words = command("copying:distances=6,samples=1", "mqar:pairs=2,length=16,samples=1")
    program, began = tmp_path / "halting.py", tmp_path / "began"
    program.write_text(HALTING)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, str(program), str(began), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (began.exists() and list(tmp_path.rglob("report.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, error = process.communicate(timeout=300)
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert out.startswith("copying\n"), "what has been measured is shown"
        assert "the same command goes on" in error
    deadline = time.monotonic() + 300
    while left := [pid for pid in Path("/proc").glob("[0-9]*") if str(tmp_path) in arguments(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not (tmp_path / "out" / "mqar").exists()
    monkeypatch.setattr(sys, "executable", str(warm_executable))
    assert evaluate(*words) == 0
    assert "1 of 2 measurements were made before" in capsys.readouterr().err
    assert (tmp_path / "out" / "mqar" / "mqar.json").exists()
    assert not parts(tmp_path)


def arguments(process: Path) -> str:
    """The command line of a process; empty for one that has ended."""
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.usefixtures("warm_python")
def test_specs_that_are_refused_by_several_parts_are_in_one_file(evaluate, make_run, capsys, tmp_path) -> None:
    run = make_run("a")[0].path
    words = ["--run", run, "--suite", "copying:distances=6,samples=1", "--suite", "copying:distances=8,samples=1"]
    words += ["--posthoc", "none", "--posthoc", "svd:ratio=30,sinks=0", "--posthoc", "xkv:group=2,ratio=40,sinks=0"]
    words += ["--posthoc", "minicache:start=5", "--skip-refused", "--device", "cpu"]
    found: list[str] = []
    for more in ((), ("--processes", 2)):
        out = tmp_path / f"out{len(found)}"
        assert evaluate(*words, "--out", out, *more) == 0
        found.append((out / "copying" / "refused.json").read_text())
        assert "svd:ratio=30,sinks=0 is refused" in capsys.readouterr().err
    assert found[0] == found[1]
    assert len(json.loads(found[0])["refused"]) >= 2


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("more", [(), ("--processes", 2)])
def test_a_spec_that_is_refused_is_an_error_only_if_no_other_is_left(evaluate, make_run, capsys, tmp_path, more):
    run = make_run("a")[0].path
    words = ["--run", run, "--suite", "copying:distances=6,samples=1", "--device", "cpu", *more]
    refused = ["--posthoc", "entropy:ratio=40"]
    assert parse(refused[1]).chooses_for_batch, "so it is a part of its own"
    assert evaluate(*words, "--posthoc", "none", *refused, "--out", tmp_path / "some") == 0
    out, error = capsys.readouterr()
    assert "a on copying: entropy:ratio=40 is refused: entropy: " in error
    assert out.startswith("copying: none\n")
    assert not list(tmp_path.rglob("refused.json"))
    assert not parts(tmp_path)
    assert evaluate(*words, "--posthoc", "svd:ratio=30,sinks=0", *refused, "--out", tmp_path / "none") == 2
    out, error = capsys.readouterr()
    assert '--posthoc "svd:ratio=30,sinks=0": svd: ' in error, "the first one"
    assert not out


def test_a_file_of_several_parts_has_the_content_of_the_last_one_in_the_command(tmp_path) -> None:
    store, results = Store(tmp_path / "parts"), tmp_path / "results"
    ended = []
    for key in ("first", "last"):
        part = Part(run="r", choice=0, set=None, specs=(), place_label="", cost=1.0, key=key)
        for name, content in (("a/all.json", key), ("a/refused.json", {"refused": {key: "why"}}), (f"{key}.json", key)):
            write_atomic(results_of(store.of(part)) / name, json.dumps(content))
        write_report(store.of(part), Report(results=str(results), records=[], files=["a/all.json"], messages=[]))
        report = store.report(part)
        assert report is not None
        ended.append((part, report))
    for part, report in reversed(ended):
        assert store.publish(part, report) == [results / "a" / "all.json"]
    assert contents(results)["a/all.json"] == "first", "the last one to end"
    store.settle(ended)
    refused = {"refused": {"first": "why", "last": "why"}}
    expected = {"a/all.json": "last", "a/refused.json": refused, "first.json": "first", "last.json": "last"}
    assert contents(results) == expected


def test_a_part_is_another_one_once_its_checkpoint_or_a_file_of_its_options_has_changed(make_run, tmp_path) -> None:
    run, _ = make_run("a")
    file = tmp_path / "a.txt"
    file.write_text("one")
    parser = options_parser("evaluate")

    def key(*more: str) -> str:
        words = ["--run", str(run.path), "--suite", f"wikitext:path={file}", *more]
        options = parser.parse_args(words)
        (part,) = parts_of(str(run.path), choose(parser, options), options, "cpu")
        return part.key

    keys = [key()]
    assert key("--processes", "2") == key("--devices", "0") == key("--out", "x") == keys[0]
    keys.append(key("--batch", "2"))
    file.write_text("one two")
    keys.append(key())
    os.utime(run.checkpoint_path(20), (1, 1))
    keys.append(key())
    assert len({*keys}) == 4

    def key_of_code() -> str:
        options = parser.parse_args(["--run", str(run.path), "--suite", f"code:folder={tmp_path / 'src'}"])
        (part,) = parts_of(str(run.path), choose(parser, options), options, "cpu")
        return part.key

    (tmp_path / "src" / "below").mkdir(parents=True)
    before = key_of_code()
    (tmp_path / "src" / "below" / "a.py").write_text("x = 1")
    assert key_of_code() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--per-device 2", "--per-device 2: needs --devices"),
        ("--devices all --processes 2", "--processes: does not go with --devices all"),
        ("--devices all --device cpu", "--device cpu: does not go with --devices all"),
        ("--processes 0", "--processes is 0; allowed: 1 or more"),
        ("--devices 0,7", "--devices 0,7: there is no GPU '7'; allowed: 0, 1, all"),
        ("--devices 1,1", "--devices 1,1: names GPU 1 twice"),
        ("--devices 1,", "--devices 1,: there is no GPU ''; allowed: 0, 1, all"),
    ],
)
def test_wrong_devices_are_one_line(evaluate, command, capsys, monkeypatch, words, message) -> None:
    monkeypatch.setattr("cllm.workers.find_gpus", lambda: ["0", "1"])
    first = command("copying:samples=1")[:-4]
    assert evaluate(*first, *words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_each_gpu_gets_as_many_processes_as_were_asked_for(evaluate, command, monkeypatch) -> None:
    monkeypatch.setattr("cllm.workers.find_gpus", lambda: ["4", "6"])
    seen: list[list[str]] = []
    monkeypatch.setattr("cllm.evaluate.parallel.launch.run_all", lambda commands, places, *_: seen.append(places))
    for words in ("--devices all", "--devices 6 --per-device 2", "--devices all --per-device 2"):
        evaluate(*command("copying:samples=1")[:-4], *words.split())
    assert seen == [["4", "6"], ["6", "6"], ["4", "6", "4", "6"]]


def test_gpus_are_named_as_in_the_environment(monkeypatch) -> None:
    count = {"is": 3}
    monkeypatch.setattr("torch.cuda.device_count", lambda: count["is"])
    for named, seen, expected in (
        (None, 3, ["0", "1", "2"]),
        ("2, GPU-5a,7", 3, ["2", "GPU-5a", "7"]),
        ("2,99,3", 1, ["2"]),  # CUDA stops at the first one that is not there
        ("", 0, []),
        ("-1", 0, []),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        count["is"] = seen
        assert find_gpus() == expected


def test_each_process_sees_its_gpu_alone_and_its_share_of_the_cores(evaluate, command, monkeypatch, tmp_path) -> None:
    """A process of each part writes what it sees, in place of measuring."""
    monkeypatch.setattr("cllm.workers.find_gpus", lambda: ["4", "GPU-6"])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")
    program = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1]).parent
seen = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
report = {"results": "out", "records": [seen], "files": [], "messages": []}
(folder / "report.json").write_text(json.dumps(report))
"""
    monkeypatch.setattr("cllm.commands.evaluate._command", lambda file: [sys.executable, "-c", program, str(file)])
    seen = []
    monkeypatch.setattr("cllm.commands.evaluate._Report.add", lambda *words: seen.extend(words[3]))
    words = command(*(f"copying:distances=6,samples={n}" for n in range(1, 7)))[:-4]
    assert evaluate(*words, "--devices", "all", "--per-device", 2) == 0
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"4", "GPU-6"}
    assert [one["OMP_NUM_THREADS"] for one in seen] == ["3"] * 6


def test_a_part_whose_process_is_killed_is_named_with_the_signal(evaluate, command, monkeypatch, capsys) -> None:
    program = "import os; print('copying: 1 of 2 samples', flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr("cllm.commands.evaluate._command", lambda file: [sys.executable, "-c", program])
    assert evaluate(*command("copying:distances=6,samples=1")) == 2
    assert "samples=1: killed by SIGKILL: copying: 1 of 2 samples; log: " in capsys.readouterr().err


@pytest.mark.usefixtures("warm_python")
def test_a_gpu_that_its_process_cannot_use_is_no_reason_for_the_cpu(evaluate, command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("cllm.workers.find_gpus", lambda: ["99"])
    words = command("copying:distances=6,samples=1")
    assert evaluate(*words[:-4], "--devices", "all") == 2
    error = capsys.readouterr().err
    assert "left out: " in error
    assert "--device cuda: there is no usable GPU" in error
    assert "nothing was measured; logs: " in error


def test_long_parts_start_first_and_a_run_that_is_missing_is_left_out(evaluate, make_run, capsys, monkeypatch) -> None:
    run, seen = make_run("a")[0].path, list[str]()

    def note(commands, *_) -> None:
        seen.extend(
            json.loads(Path(c.words[-1]).read_text())["part"]["place_label"].split("--suite ")[1] for c in commands
        )

    monkeypatch.setattr("cllm.evaluate.parallel.launch.run_all", note)
    short, long = "copying:distances=6,samples=1", "copying:distances=6,samples=9000"
    words = ("--suite", short, "--suite", long, "--suite", "mqar", "--processes", 2, "--device", "cpu")
    assert evaluate("--run", run, "--run", run / "missing", *words) == 2, "nothing was measured"
    assert seen == [long, "mqar", short]
    assert f"left out: {run / 'missing'}: no such run" in capsys.readouterr().err
