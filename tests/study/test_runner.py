"""The runner: every point once whatever kills it, time limits, failures, sharing of GPUs, versions, rates, SLURM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cllm.commands.study import main
from cllm.runs import RunFolder
from cllm.study.busy import Intervals, Stepping, busy_shares, read_sessions
from cllm.study.children import Slot
from cllm.study.estimate import Estimates
from cllm.study.layout import Layout
from cllm.study.measuring import evaluation_intervals, mark_of
from cllm.study.points import Grid, Variant
from cllm.study.queue import Queue
from cllm.study.rates import search
from cllm.study.report import write_report
from cllm.study.results import read_results
from cllm.study.schema import Rates, Study, load_study
from cllm.study.sharing import wait_for_room
from cllm.study.slurm import array_script
from cllm.study.status import _counts, dry_run, status
from cllm.version import _file_hash, code_version
from cllm.workers import MOST_FAILURES, all_gpus, child_environment

ROOT = Path(__file__).resolve().parents[2]


def test_a_study_that_is_killed_loses_no_point_and_trains_none_twice(tmp_path: Path) -> None:
    """In a process of its own, since it forks: Python must have started no thread by then."""
    command = [sys.executable, "-m", "tests.study.chaos", "--kills", "20", "--seed", "3", "--work", str(tmp_path / "w")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    points, _, kills = (int(part.split()[0]) for part in done.stdout.split(",")[:3])
    assert points == 6
    assert kills >= 20


def test_the_search_takes_the_best_rate_and_is_not_repeated(finished: Path, chaos: ModuleType) -> None:
    study = chaos.study_of(finished / "base.yaml")
    queue = Queue(Grid(study, code_version()), Layout.at(finished), evaluation="e")
    assert {found.chosen for found in queue.searches().values()} == {(0.002,)}, "the trainer's loss is lowest there"
    started = (finished / "started").read_text().split()
    assert len(started) == len(set(started)) == 2 * 2 + 2 * 2
    assert chaos.runner_of(study, finished, chaos.FakeCommands(0, finished / "started")).run() == 0
    assert (finished / "started").read_text().split() == started


def test_a_search_halves_its_rates_on_growing_budgets(chaos: ModuleType, tmp_path: Path) -> None:
    rates = Rates(values=[1.0, 2.0, 3.0, 4.0, 5.0], tokens=800, keep=1)
    halving = rates.search_of("mha")
    assert (halving.sizes, halving.budgets) == ([5, 3, 2], [200, 400, 800])
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates.model_dump())
    grid = Grid(study, "code")
    losses = {(200, 3.0): 1.0, (200, 4.0): 2.0, (200, 1.0): 3.0, (200, 2.0): 9.0, (200, 5.0): float("inf")}
    found = search(grid, grid.variants[0], lambda p: losses.get((p.tokens, p.rate)))
    assert {(p.tokens, p.rate) for p in found.missing} == {(400, 1.0), (400, 3.0), (400, 4.0)}
    losses |= {(400, 3.0): 1.0, (400, 4.0): 0.5, (400, 1.0): 3.0, (800, 3.0): 0.1, (800, 4.0): 0.2}
    found = search(grid, grid.variants[0], lambda p: losses.get((p.tokens, p.rate)))
    assert (found.chosen, found.missing, found.at_edge) == ((3.0,), (), False)
    alone = Grid(study.model_copy(update={"rates": Rates(values=[1.0], tokens=800, keep=1)}), "code")
    found = search(alone, alone.variants[0], {}.get)
    assert (found.chosen, found.at_edge) == ((1.0,), False), "one rate is no search, and no edge of one"


def test_a_search_goes_on_beyond_an_edge(chaos: ModuleType, tmp_path: Path) -> None:
    rates = Rates(values=[2.0, 4.0, 8.0], tokens=800, keep=1, extend=2)
    grid = Grid(chaos.study_of(tmp_path / "base.yaml", rates=rates.model_dump(), seeds=[1]), "code")
    losses = {(400, 2.0): 1.0, (400, 4.0): 2.0, (400, 8.0): 3.0, (800, 2.0): 0.5, (800, 4.0): 0.6}

    def found() -> tuple[Any, ...]:
        now = search(grid, grid.variants[0], lambda point: losses.get((point.tokens, point.rate)))
        return now.chosen, [(point.tokens, point.rate, point.search) for point in now.missing], now.at_edge

    assert found() == ((), [(800, 1.0, True)], False), "2 is the smallest value"
    losses[800, 1.0] = 0.7
    assert found() == ((2.0,), [], False)
    losses[800, 1.0] = float("inf")
    assert found() == ((2.0,), [], False)
    losses[800, 1.0] = 0.4
    assert found() == ((), [(800, 0.5, True)], False)
    losses[800, 0.5] = 0.3
    assert found() == ((0.5,), [], True), "two were added"
    losses |= {(400, 8.0): 0.1, (800, 8.0): 0.2, (800, 2.0): 0.3}
    assert found() == ((), [(800, 16.0, True)], False)
    points = {(point.tokens, point.rate) for point in grid.all_points() if point.variant.design == "mha"}
    assert {(800, rate) for rate in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)} <= points
    assert {(160, rate) for rate in (0.5, 32.0)} <= points, "long runs at a rate beyond"
    assert not any(rate in (0.25, 64.0) for _, rate in points)


def test_a_study_trains_the_rates_beyond_an_edge(chaos: ModuleType, tmp_path: Path) -> None:
    """The trainer's loss is lowest at 0.002."""
    rates = {"values": [0.008, 0.016], "tokens": 64, "extend": 5}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates, evaluate={}, seeds=[1])
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert "up to 5 more for a design" in dry_run(Grid(study, "code"), runner.layout, Estimates(), 1)
    assert runner.run() == 0
    done = read_results(tmp_path / "results")
    tried = {result.rate for result in done if result.content["search"] and result.variant.design == "mha"}
    assert tried == {0.016, 0.008, 0.004, 0.002, 0.001}
    assert {result.rate for result in done if not result.content["search"]} == {0.002}
    write_report(study, runner.layout)
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.count("| 0.002 ") == 2
    assert "edge)" not in report


def test_designs_may_search_their_own_rates(chaos: ModuleType, tmp_path: Path) -> None:
    rates = {"values": {"default": [0.001, 0.002], "cla": [0.002, 0.004, 0.008, 0.016]}, "tokens": 64, "keep": 1}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates, evaluate={}, seeds=[1])
    grid = Grid(study, "code")
    searched = [(point.variant.design, point.tokens, point.rate) for point in grid.all_points() if point.search]
    of_cla = [("cla", tokens, rate) for tokens in (32, 64) for rate in (0.002, 0.004, 0.008, 0.016)]
    assert searched == [("mha", 64, 0.001), ("mha", 64, 0.002), *of_cla]
    assert _counts(grid) == [(4, 32), (2 + 2, 64), (2, 160)]
    assert chaos.runner_of(study, tmp_path, chaos.FakeCommands(0)).run() == 0
    done = [result for result in read_results(tmp_path / "results") if result.content["search"]]
    tried = Counter((result.variant.design, result.content["tokens"]) for result in done)
    assert tried == {("mha", 64): 2, ("cla", 32): 4, ("cla", 64): 2}


def test_rates_that_diverge_are_not_kept(chaos: ModuleType, tmp_path: Path) -> None:
    rates = Rates(values=[1.0, 2.0, 3.0, 4.0], tokens=400, keep=2)
    grid = Grid(chaos.study_of(tmp_path / "base.yaml", rates=rates.model_dump()), "code")

    def found(*losses: float) -> tuple[float, ...]:
        return search(grid, grid.variants[0], lambda p: losses[int(p.rate) - 1]).chosen

    inf, nan = float("inf"), float("nan")
    assert found(5, 5, 5, 4) == (4.0, 1.0), "of equal losses the first"
    assert found(inf, nan, 5, inf) == (3.0,), "fewer than two are left"
    assert found(5, inf, 6, 7) == (1.0, 3.0)
    ended = search(grid, grid.variants[0], lambda p: inf)
    assert (ended.chosen, ended.missing, ended.diverged) == ((), (), True)
    assert not search(grid, grid.variants[0], lambda p: None).diverged


def test_a_design_whose_rates_all_diverge_does_not_keep_a_study_from_its_end(chaos: ModuleType, tmp_path: Path) -> None:
    study = chaos.study_of(tmp_path / "base.yaml", evaluate={})
    line = "error: 11 steps up to step 12 had a gradient that was not finite and were skipped"

    class Diverging(chaos.FakeCommands):  # type: ignore[name-defined]
        def train(self, config: Path) -> list[str]:
            words = super().train(config)
            if not config.name.startswith("cla"):
                return words
            program = f"import subprocess, sys; subprocess.run(sys.argv[1:]); print({line!r}); sys.exit(2)"
            return [sys.executable, "-S", "-c", program, *words]

    runner = chaos.runner_of(study, tmp_path, Diverging(0))
    assert runner.run() == 0
    names = {file.name.partition("-")[0] for file in (tmp_path / "results").glob("*-160-*.json")}
    assert names == {"mha"}
    write_report(study, runner.layout)
    assert "none: all diverged" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
@pytest.mark.parametrize("lost", [("cla-",), ("cla-", "mha-")])
def test_the_report_names_runs_that_diverged(
    chaos: ModuleType, tmp_path: Path, seeds: list[int], lost: tuple[str, ...]
) -> None:
    """Without it a design, or a seed of one, would be missing and the others look as if they were all."""
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, seeds=seeds)
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert runner.run() == 0
    for file in (tmp_path / "results").glob("*-s1-*.json"):
        if file.name.startswith(lost):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"loss": None}))
    write_report(study, runner.layout)
    text = (tmp_path / "report" / "report.md").read_text()
    named = [line for line in text.split("## Diverged")[1].splitlines() if line.startswith("- ")]
    assert named[: len(lost)] == [f"- {name[:-1]}, 160, seed 1, learning rate 0.001" for name in lost]
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["diverged"]) == len(lost)
    assert ("No run of full length has ended with a finite loss." in text) == (len(seeds) == 1 and len(lost) == 2)


def test_points_of_known_rates_come_first_then_searches_then_seeds(chaos: ModuleType, tmp_path: Path) -> None:
    rates = {"values": [0.001, 0.002], "tokens": 64, "known": {"default": 0.002}}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates)
    queue = Queue(Grid(study, "code"), Layout.at(tmp_path), evaluation="e")
    assert [point.short_name for point in queue.wanted()] == [
        "mha, lr 0.002, 160, seed 1",
        "cla, lr 0.002, 160, seed 1",
        "mha, lr 0.001, 64, seed 1",
        "cla, lr 0.001, 64, seed 1",
        "mha, lr 0.002, 64, seed 1",
        "cla, lr 0.002, 64, seed 1",
    ]
    config = queue.grid.config(queue.wanted()[0], tmp_path)
    assert (config.optim.lr, config.optim.min_lr) == (0.002, 0.0002), "the end of the schedule keeps its share"
    assert config.train.steps == 10


def test_a_search_on_a_budget_of_the_study_trains_runs_of_full_length(chaos: ModuleType, tmp_path: Path) -> None:
    """They are evaluated as all others, and the report counts them."""
    study = chaos.study_of(tmp_path / "base.yaml", tokens=[64, 160], seeds=[1])
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert runner.run() == 0
    results = read_results(runner.layout.results)
    assert {r.name.rpartition("-")[0] for r in results if r.evaluated} == {r.name.rpartition("-")[0] for r in results}
    assert not any(r.content["search"] for r in results)
    assert len(results) == sum(runs for runs, _ in _counts(runner.queue.grid)) == 6
    write_report(study, runner.layout)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "6 runs of full length and 0 of the search" in report


@pytest.mark.parametrize(
    ("known", "tokens", "runs"),
    [(None, 160, 8), (0.002, 160, 8), (0.004, 160, 10), ({"mha": 0.004}, 160, 9), (0.004, [64, 160], 14)],
)
def test_the_dry_run_counts_the_runs(chaos: ModuleType, tmp_path: Path, known: Any, tokens: Any, runs: int) -> None:
    rates = {"values": [0.001, 0.002], "tokens": 64, "known": known}
    study = chaos.study_of(tmp_path / "base.yaml", rates=rates, tokens=tokens)
    assert sum(n for n, _ in _counts(Grid(study, "code"))) == runs
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0))
    assert runner.run() == 0
    assert len(read_results(runner.layout.results)) == runs


def test_results_of_other_versions_and_settings_are_not_used(finished: Path, chaos: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    study = chaos.study_of(finished / "base.yaml")
    layout = Layout.at(tmp_path)
    same = Queue(Grid(study, code_version()), layout, evaluation="e")
    assert [work for _, work in same.left()] == []
    other_code = Queue(Grid(study, "another code"), layout, evaluation="e")
    assert len(other_code.left()) == 4, "all runs of the search, and none of the long ones yet"
    changed = study.model_copy(update={"overrides": {"optim": {"weight_decay": 0.2}}})
    assert len(Queue(Grid(changed, code_version()), layout, evaluation="e").left()) == 4
    moved = study.model_copy(update={"overrides": {"data": {"path": "elsewhere", "num_workers": 7}}})
    assert Queue(Grid(moved, code_version()), layout, evaluation="e").left() == []
    text = status(other_code, Estimates(1000.0), 1)
    assert text.count("other version") == 8 + 1
    assert "4 waiting, 8 other version" in text
    assert text.count(f"other code, {code_version()}, commit ") == 8
    text = status(Queue(Grid(changed, code_version()), layout, evaluation="e"), Estimates(1000.0), 1)
    assert text.count("other settings, commit ") == 8


def test_the_status_names_evaluations_that_are_missing_without_a_checkpoint(
    finished: Path, chaos: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(finished / "results", tmp_path / "results")
    study, layout = chaos.study_of(finished / "base.yaml"), Layout.at(tmp_path)

    def written(evaluation: str) -> str:
        queue = Queue(Grid(study, code_version()), layout, evaluation=evaluation)
        assert queue.left() == []
        return status(queue, Estimates(1000.0), 1)

    long = [result for result in read_results(layout.results) if not result.content["search"]]
    assert "checkpoint" not in written("e")
    assert written("other").count("; evaluated by other code or suites, and its checkpoint is gone") == len(long) > 1
    long[0].file.write_text(json.dumps({**long[0].content, "evaluated": None}))
    assert written("e").count("; not evaluated to the end, and its checkpoint is gone") == 1


def test_a_version_is_that_of_code_and_not_of_comments(tmp_path: Path) -> None:
    texts = ['"""A."""\nx = 1  # one\n', '"""B."""\n\nx = 1\n', "x = 2\n"]
    hashes = []
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.py").write_text(text)
        hashes.append(_file_hash(str(tmp_path / f"{n}.py"), 0, 0))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_version_does_not_depend_on_that_of_python(tmp_path: Path) -> None:
    """Python 3.12 gave functions and classes a field `type_params`, and 3.13 others; they are empty in this code."""
    source = "class A:\n    def f(self, x: int = 1, *y) -> None:\n        return f'{{{x:>{y}}}} a' 'b' if x else None\n"
    file = tmp_path / "a.py"
    file.write_text(source)
    assert _file_hash(str(file), 0, 0) == "7132334fc46d52b76f1c1b5f647929905639a68867d622ce6866c82cac789e77"


def test_no_point_starts_that_would_not_end_in_time(
    chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={})
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(), seconds=100.0)
    (point, _), *_ = runner.queue.left()  # 160 tokens, and 30 s of start

    def fits(speed: float, left: float, waits: float = 0.0) -> bool:
        runner.estimates = Estimates(speed)
        runner._deadline = time.monotonic() + left
        return runner._fits(point, waits)

    assert fits(16.0, left=45)
    assert not fits(16.0, left=35)
    assert not fits(16.0, left=45, waits=10)
    assert fits(2.0, left=50), "it would not end in any session of 100 s, so it goes on in the next"
    folder = runner.layout.run(point).checkpoint_folder
    folder.mkdir(parents=True)
    (folder / "step-00000001.ckpt").touch()
    assert fits(16.0, left=1), "a run that was begun loses nothing"


def test_a_study_stops_in_time_and_goes_on(chaos: ModuleType, tmp_path: Path) -> None:
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={}, tokens=16 * 4000)
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0.5), seconds=3600.0)  # a run takes 2,000 s
    turn = runner._turn

    def time_is_up_after_a_step(received: list[int]) -> bool:
        if any((tmp_path / "runs").glob("*/metrics.jsonl")):
            runner._deadline = min(runner._deadline, time.monotonic())
        return turn(received)

    runner._turn = time_is_up_after_a_step
    assert runner.run() == 3
    assert list((tmp_path / "runs").glob("*/checkpoints/*.ckpt"))
    assert not list((tmp_path / "results").glob("*.json"))
    assert chaos.runner_of(study, tmp_path, chaos.FakeCommands(0), seconds=3600.0).run() == 0


def test_a_failed_point_is_named_with_the_last_line_of_its_log(chaos: ModuleType, tmp_path: Path) -> None:
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={}, seeds=[1])

    class Failing(chaos.FakeCommands):  # type: ignore[name-defined]
        def train(self, config: Path) -> list[str]:
            if config.name.startswith("cla"):
                return [sys.executable, "-S", "-c", "print('error: no such data'); raise SystemExit(2)"]
            return super().train(config)

    runner = chaos.runner_of(study, tmp_path, Failing(0))
    assert runner.run() == 1
    text = status(runner.queue, Estimates(), 1)
    assert "failed  error: no such data" in text
    assert "1 done, 1 failed" in text


def test_a_gpu_on_which_every_point_fails_leaves_the_others_to_a_healthy_one(
    chaos: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={}, seeds=[1, 2, 3, 4])
    failures = tmp_path / "failures"
    failures.mkdir()
    on_gpu_1 = "os.environ['CUDA_VISIBLE_DEVICES'] == '1'"
    program = f"""
import os, pathlib, sys, time
failures = pathlib.Path({str(failures)!r})
if {on_gpu_1}:
    (failures / str(os.getpid())).touch()
    sys.exit(1)
deadline = time.monotonic() + 300
while len(list(failures.iterdir())) < {MOST_FAILURES} and time.monotonic() < deadline:
    time.sleep(0.01)
os.execv(sys.argv[1], sys.argv[1:])
"""

    class Broken(chaos.FakeCommands):  # type: ignore[name-defined]
        def train(self, config: Path) -> list[str]:
            return [sys.executable, "-S", "-c", program, *super().train(config)]

    runner = chaos.runner_of(study, tmp_path, Broken(0), share=False)
    assert runner.run() == 1
    assert len(runner.failed) == MOST_FAILURES
    assert len(list((tmp_path / "results").glob("*.json"))) == 8 - MOST_FAILURES
    assert "GPU 1 gets no more work: 3 processes in a row have failed on it" in capsys.readouterr().err
    assert chaos.runner_of(study, tmp_path, chaos.FakeCommands(0)).run() == 0, "the same command repeats what failed"


@pytest.mark.parametrize(
    ("share", "measured", "together"),
    [
        (True, {}, {("train", "train")}),
        ("evaluations", {}, set()),
        (False, {"suites": ["perplexity"]}, set()),
        ("evaluations", {"suites": ["perplexity"]}, {("evaluate", "train")}),
        ("trainings", {"suites": ["perplexity"]}, {("train", "train")}),
    ],
)
def test_what_may_run_together_on_a_gpu(
    share: bool | str, measured: dict[str, Any], together: set[tuple[str, ...]], chaos: ModuleType, tmp_path: Path
) -> None:
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate=measured, seeds=[1, 2])
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0), slots=1, share=share)
    runner.estimates = Estimates(1e9, overridden=True)  # each run is expected to end as soon as the next can step
    seen, fill = set[tuple[str, ...]](), runner._fill

    def start_all(slot: Slot) -> bool:
        """Start all that may start before any job is seen to have ended."""
        started = False
        while fill(slot):
            started = True
            if len(slot.jobs) == 2:
                seen.add(tuple(sorted(job.work for job in slot.jobs)))
        return started

    runner._fill = start_all
    assert runner.run() == 0
    assert seen == together


def test_a_run_starts_before_the_one_before_it_ends_and_a_stop_in_between_loses_nothing(
    chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimates, "started", lambda *_: None)  # a start always takes longer than the last step
    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={})
    out, started = tmp_path / "out", tmp_path / "started"
    assert chaos.runner_of(study, tmp_path / "undisturbed", chaos.FakeCommands(0)).run() == 0

    def next_runner() -> Any:
        commands = chaos.FakeCommands(0.002, started, together=4)
        runner = chaos.runner_of(study, out, commands, slots=1, check=0.0)
        runner.estimates = Estimates(16 / 0.002)  # also of a run that is resumed before its last step
        return runner

    for _ in range(2):
        runner = next_runner()
        fill = runner._fill

        def stop(slot: Slot, fill: Callable[[Slot], bool] = fill) -> bool:
            if (began := fill(slot)) and len(slot.jobs) > 1:
                raise KeyboardInterrupt
            return began

        runner._fill = stop
        with pytest.raises(KeyboardInterrupt):
            runner.run()
    runner = next_runner()
    assert runner.run() == 0, "no run takes its last step until the next one was started"
    assert chaos.results_of(out) == chaos.results_of(tmp_path / "undisturbed")
    sessions = read_sessions(runner.layout.sessions, code_version())
    shares = {share.device: share for share in busy_shares(sessions)}
    assert shares["GPU 0"].sessions == len(sessions) >= 1
    assert 0 < shares["GPU 0"].busy <= shares["GPU 0"].seconds
    assert f"GPU 0: busy {shares['GPU 0'].text}" in status(runner.queue, Estimates(), 1)
    assert busy_shares(read_sessions(runner.layout.sessions, "another code")) == []


def test_a_session_of_several_devices_counts_once() -> None:
    devices = [{"device": f"GPU {i}", "busy": 6.0 + i, "busy_queued": 3.0} for i in range(2)]
    sessions = [{"seconds": 10.0, "queued_seconds": 4.0, "devices": devices}]
    first, _, every = busy_shares([*sessions, {**sessions[0]}])
    assert (first.sessions, first.seconds, first.busy) == (2, 20.0, 12.0)
    assert (every.sessions, every.seconds, every.busy) == (2, 40.0, 26.0)


def test_a_short_run_has_several_successors_on_their_way_and_a_long_one_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    estimates = Estimates(100.0)  # tokens a second; a start takes 30 s

    def job(tokens: int, began: float, *, stepping: bool) -> Any:
        found = SimpleNamespace(work="train", tokens=tokens, stepping=stepping, started=now - began)
        return SimpleNamespace(**vars(found), point=SimpleNamespace(variant=Variant("mha"), name=f"{tokens}-{began}"))

    layout = Layout.at(tmp_path)

    def waits(*jobs: Any, share: Any = True) -> float | None:
        return wait_for_room(jobs, share, estimates, layout)

    def steps(found: Any, tokens: int) -> Any:
        rows = layout.run(found.point).metrics_file
        rows.parent.mkdir(parents=True)
        rows.write_text(json.dumps({"step": 1, "tokens": tokens, "throughput/tokens_per_s": 50.0}) + "\n")
        return found

    long, short = steps(job(2000, 99, stepping=True), 1000), steps(job(1000, 98, stepping=True), 900)
    assert waits() == 0
    assert waits(long) == pytest.approx(20)  # 1000 tokens at 50 a second
    assert waits(steps(job(3000, 97, stepping=True), 1000)) is None, "40 s are longer than a start"
    assert waits(short, job(1000, 29, stepping=False)) == pytest.approx(2 + 10)
    assert waits(short, job(9000, 29, stepping=False)) is None
    assert waits(short, job(1000, 5, stepping=False)) is None, "it steps in 25 s, for 10 s"
    assert waits(short, job(500, 29, stepping=False), job(500, 28, stepping=False)) is None, "at most three"
    assert waits(short, share="evaluations") is None
    estimates = Estimates()
    assert waits(job(1, 0, stepping=False)) is None, "without a speed"


def test_a_device_is_busy_from_the_first_step_to_the_last_row_and_common_seconds_count_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()

    def log(*rows: tuple[int, float, str, float]) -> None:
        with run.metrics_file.open("a") as file:
            file.writelines(json.dumps({"step": n, "tokens": n, "time": t, key: v}) + "\n" for n, t, key, v in rows)

    speed = "throughput/tokens_per_s"
    log((50, 90.0, speed, 10.0))  # of an earlier process
    stepping = Stepping(run, started=100.0)
    assert stepping.look() is None
    log((150, 140.0, speed, 2.5))  # with 30 s of imports and compilation
    assert stepping.look() is None, "its steps are not known yet"
    log((250, 145.0, speed, 20.0), (250, 146.0, "val/loss", 3.0))
    assert stepping.look() == (135.0, 146.0)  # 100 tokens at 20 a second
    log((350, 150.0, speed, 25.0))
    assert stepping.look() == (135.0, 150.0)
    busy = Intervals([(135.0, 150.0), (160.0, 170.0), (148.0, 152.0), (152.0, 155.0)])
    assert (busy.parts, busy.seconds) == ([(135.0, 155.0), (160.0, 170.0)], 30.0)
    assert busy.common(Intervals([(140.0, 165.0)])).parts == [(140.0, 155.0), (160.0, 165.0)]
    folder = tmp_path / "evaluation"
    for n, records in enumerate(([{"set": "a", "seconds": 2.0}] * 3, [{"set": "b", "spec": "x", "seconds": 9.0}])):
        for place, record in enumerate(records):
            file = folder / f"0{n}" / f"{place}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record))
        mark_of(folder, n).write_text("mark")
        os.utime(mark_of(folder, n), (200 + 10 * n, 200 + 10 * n))
    assert evaluation_intervals(folder, ["mark", "mark"], since=150.0) == [(198.0, 200.0), (201.0, 210.0)]
    assert evaluation_intervals(folder, ["mark", "other"], since=205.0) == []


def test_a_run_sees_its_gpus_and_no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launchers = ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK")
    for name in (*launchers, "RANKING"):
        monkeypatch.setenv(name, "4")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = child_environment("3", 4, tmp_path)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert not found.keys() & set(launchers)
    assert "RANKING" in found
    assert child_environment(None, 1, tmp_path)["CUDA_VISIBLE_DEVICES"] == ""
    assert child_environment("0,3", 1)["CUDA_VISIBLE_DEVICES"] == "0,3"


def test_a_run_uses_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """More processes than any machine has cores, then a limit below the share of one process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child_environment(None, 10**9)["OMP_NUM_THREADS"] == "1"
    assert child_environment(None, 1, most_threads=1)["OMP_NUM_THREADS"] == "1"
    assert int(child_environment(None, 1, most_threads=10**9)["OMP_NUM_THREADS"]) <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(None, 10**9, most_threads=2)["OMP_NUM_THREADS"] == "7"


def test_all_gpus_are_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert all_gpus() == "4,6"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert all_gpus() is None


def test_the_script_of_an_array() -> None:
    slurm = {
        "tasks": 8,
        "time": "02:00:00",
        "cpus": 4,
        "options": ["--partition=gpu"],
        "setup": [". .venv/bin/activate"],
    }
    study = Study(name="s", base=["x"], designs={"mha": {}}, tokens=1, slurm=slurm)
    command = ["cllm", "study", "my study.yaml", "--out", "/data/s"]
    assert array_script(study, command, Path("/data/s/state")) == (
        """\
#!/usr/bin/env bash
#SBATCH --job-name=study-s
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/data/s/state/slurm-%A-%a.log
#SBATCH --partition=gpu
# Every task takes points from the same queue; their files must be on storage that all tasks see.
. .venv/bin/activate
study=
trap 'if [ -n "$study" ]; then kill -TERM "$study"; fi' TERM
cllm study 'my study.yaml' --out /data/s &
study=$!
wait "$study"
status=$?
if [ "$status" -gt 128 ]; then wait "$study"; status=$?; fi  # a signal ends the first wait
# 3: time was up, and the same command goes on. 4: other tasks work on all that is left.
if [ "$status" -eq 3 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
"""
    )


@pytest.mark.parametrize(
    ("code", "options", "stop", "requeued"),
    [
        (3, [], True, True),
        (4, [], False, False),  # other tasks work on the rest
        (4, ["--stop-after", "25m"], False, False),
        (3, ["--stop-after", "25m"], False, True),
        (0, [], True, False),  # it had just finished
        (1, [], True, False),
    ],
)
def test_a_task_of_an_array_is_queued_again_if_its_time_was_up(
    tmp_path: Path, code: int, options: list[str], stop: bool, requeued: bool
) -> None:
    fakes = {
        "cllm": f"trap 'exit {code}' TERM\ntouch ready\n"
        + ("while :; do sleep 0.05; done" if stop else f"exit {code}"),
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    study = Study(name="s", base=["x"], designs={"mha": {}}, tokens=1)
    script = tmp_path / "study.sbatch"
    script.write_text(array_script(study, ["cllm", "study", "s.yaml", *options], tmp_path))
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    task = subprocess.Popen(["bash", script], cwd=tmp_path, env={**os.environ, **variables}, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if stop:
        task.terminate()
    out, _ = task.communicate(timeout=300)
    assert task.returncode == code
    assert out.decode().splitlines() == ["scontrol requeue 7_2"] * requeued


def test_the_folder_of_an_arrays_logs_exists_before_it_starts(tmp_path: Path, capsys: Any) -> None:
    assert main([str(ROOT / "configs/studies/cpu.yaml"), "--slurm", "--out", str(tmp_path / "my study")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "--output=" in line)
    assert line == f'#SBATCH --output="{tmp_path}/my study/state/slurm-%A-%a.log"'
    assert (tmp_path / "my study" / "state").is_dir()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--stop-after", "soon"], "--stop-after is 'soon'; allowed: a time such as 25m"),
        (["--stop-after", "0m"], "--stop-after is '0m', in which nothing could run"),
        (["--devices", "7"], "--devices 7 has no effect with --slurm"),
        (["--workers", "2"], "--workers 2 has no effect with --slurm"),
    ],
)
def test_a_mistake_is_an_error_before_an_array_has_it(
    tmp_path: Path, capsys: Any, words: list[str], error: str
) -> None:
    """Every task would fail at night, or end at once and be queued again."""
    study = str(ROOT / "configs/studies/cpu.yaml")
    assert main([study, "--slurm", "--out", str(tmp_path / "study"), *words]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_the_suites_of_an_array_are_checked_before_it_starts(tmp_path: Path, capsys: Any) -> None:
    text = (ROOT / "configs/studies/cpu.yaml").read_text()
    study = tmp_path / "s.yaml"
    study.write_text(text.split("\nevaluate:")[0] + "\nevaluate: {suites: [copyng]}\n")
    assert main([str(study), "--slurm", "--out", str(tmp_path / "study")]) == 2
    assert "evaluate: --suite copyng: " in capsys.readouterr().err


def test_files_for_the_report_that_are_missing_are_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the data are missing too, which is an error."""
    (tmp_path / "there.json").write_text("{}")
    study = {"name": "s", "base": "quickstart", "tokens": "1M", "designs": {"mha": {}}}
    study |= {"beside": {"results": ["there.json", "gone.json"]}}
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    words = ["--out", str(tmp_path / "out"), "--data.path", str(tmp_path / "nosuch")]
    assert main([str(tmp_path / "s.yaml"), *words]) == 2
    errors = capsys.readouterr().err
    assert f"study s: beside: {tmp_path / 'gone.json'}: no such file; --report will need it" in errors
    assert "there.json" not in errors
    assert "no such folder of prepared data" in errors


def test_a_design_with_an_empty_list_of_seeds_is_named() -> None:
    with pytest.raises(ValueError, match=r"seeds of mha are \[\]; allowed: at least one"):
        Study(name="s", base=["x"], designs={"mha": {}}, tokens=1, seeds={"default": []})


# ---- the shipped studies


def test_the_study_of_45m_has_designs_of_half_the_cache_and_equal_size() -> None:
    from cllm.model.sizes import count_parameters, meta_decoder
    from cllm.study.matching import cache_share

    study = load_study(ROOT / "configs/studies/45m.yaml", ["--model.vocab_size", "16384", "--data.path", "p"])
    grid = Grid(study, "code")
    configs = {v.label: grid.config(grid.point(v, study.tokens[0], 1, 3e-3), Path("r")) for v in grid.variants}
    first = ["mha", "gqa", "cla-2", "yoco", "fusedkv", "fusedkv_lite", "mla", "swiftkv", "kv_tie", "svformer"]
    assert list(configs) == [*first, "yoco_pp", "resformer", "gqa-quarter", "cla-4", "mla-quarter"]
    shares = {name: cache_share(config.model) for name, config in configs.items()}
    others = {
        "yoco": (6 / 4 + 1) / 12,
        "svformer": (12 + 1) / 24,
        **dict.fromkeys(("mha", "swiftkv", "resformer"), 1.0),
    }
    others |= dict.fromkeys(("gqa-quarter", "cla-4", "mla-quarter"), 0.25)
    assert shares == pytest.approx({**dict.fromkeys(configs, 0.5), **others})
    keys = {grid.point(v, study.tokens[0], 1, 3e-3).key for v in grid.variants}
    assert len(keys) == len(configs), "a share is a part of a point's settings"
    sizes = [count_parameters(meta_decoder(config.model)) for config in configs.values()]
    assert max(sizes) / min(sizes) < 1.01
    for config in configs.values():
        assert config.train.steps == round(490e6 / (8 * 4096))
        assert (config.model.qk_norm, config.optim.min_lr, config.data.path) == (True, 3e-4, "p")
    # The key has no folder of data in it.
    other = load_study(ROOT / "configs/studies/45m.yaml", ["--model.vocab_size", "16384", "--data.path", "q"])
    assert next(Grid(other, "code").all_points()).key == next(grid.all_points()).key


def test_the_study_of_equal_bytes_has_all_designs_at_exactly_half_and_a_quarter() -> None:
    from cllm.model.sizes import count_parameters, meta_decoder
    from cllm.study.matching import cache_share

    words = ["--model.vocab_size", "16384", "--data.path", "p"]
    study = load_study(ROOT / "configs/studies/equal_bytes.yaml", words)
    both = [
        "gqa",
        "mla",
        "cla",
        "yoco",
        "fusedkv",
        "fusedkv_rich",
        "fusedkv_lite",
        "swiftkv",
        "ced",
        "kv_tie",
        "svformer",
    ]
    assert sorted(study.designs) == sorted(
        ["mha", "xmla-quarter", *(f"{d}-{s}" for d in both for s in ("half", "quarter"))]
    )
    assert study.match.parameters
    bare = load_study(ROOT / "configs/studies/equal_bytes.yaml", [*words, "--model.match_params", "false"])
    grid = Grid(bare.model_copy(update={"match": bare.match.model_copy(update={"parameters": False})}), "code")
    shares = {v.design: cache_share(grid.config(grid.point(v, 1, 1, 3e-3), Path("r")).model) for v in grid.variants}
    wanted = {"half": 0.5, "quarter": 0.25, "mha": 1.0}
    assert shares == pytest.approx({name: wanted[name.rpartition("-")[2]] for name in study.designs}, abs=1e-9)
    sized = Grid(study, "code", ["mha", "svformer-half", "ced-quarter"])
    models = [sized.config(sized.point(v, 1, 1, 3e-3), Path("r")).model for v in sized.variants]
    sizes = [count_parameters(meta_decoder(model)) for model in models]
    assert max(sizes) / min(sizes) < 1.005
    found = dry_run(Grid(study, "code", ["mha", "mla-half"]), Layout.at(Path("r")), Estimates(), 1).splitlines()
    assert [line for line in found if "without effect" in line] == [
        "mla-half: model.qk_norm is true, without effect: it needs a layer that reads keys and values, not latents"
    ]


@pytest.mark.parametrize(("wanted", "reached"), [("1/2", 0.5), ("1/4", 0.25), ("1/3", 0.375)])
def test_cache_bytes_are_matched_as_near_as_integers_allow(
    wanted: str, reached: float, chaos: ModuleType, tmp_path: Path
) -> None:
    model = {"n_layers": 8, "n_heads": 4, "d_model": 32}
    designs = {
        "mha": {},
        "gqa": {"model": {"kv": {"preset": "gqa"}}},
        "cla": {"model": {"kv": {"preset": "cla"}}},
        "mla": {"model": {"kv": {"preset": "mla", "qk_rope_head_dim": 2}}},
    }
    study = chaos.study_of(
        tmp_path / "base.yaml", designs=designs, match={"cache_bytes": wanted}, overrides={"model": model}
    )
    grid = Grid(study, "code")
    matches = {variant.design: grid.cache_match(variant) for variant in grid.variants}
    assert matches["mha"] is None, "the baseline stays"
    assert matches["cla"].reached == pytest.approx(reached)
    assert matches["gqa"].reached == pytest.approx(0.25 if wanted == "1/3" else reached)
    assert matches["mla"].reached == pytest.approx(float(Fraction(wanted)), abs=0.01)


def test_a_share_for_all_other_designs_leaves_the_baseline_and_one_out_of_reach_is_named(
    chaos: ModuleType, tmp_path: Path
) -> None:
    gqa = {"model": {"kv": {"preset": "gqa"}}}
    study = chaos.study_of(
        tmp_path / "base.yaml",
        designs={"mha": {}, "one": gqa, "two": gqa, "far": gqa},
        match={"cache_bytes": {"default": "1/2", "two": "1", "far": "1/1000"}},
        overrides={"model": {"n_heads": 4}},
    )
    grid = Grid(study, "code")
    matches = {variant.design: grid.cache_match(variant) for variant in grid.variants}
    assert matches["mha"] is None
    assert [matches[name].reached for name in ("one", "two", "far")] == [0.5, 1.0, 0.25]
    assert study.match.rule.startswith("other designs: 1/2 of mha's cache bytes, two: 1 of ")
    lines = dry_run(grid, Layout.at(tmp_path), Estimates(), 1).splitlines()
    assert "far: 1/1000 of mha's cache cannot be reached; the nearest is 0.250" in lines
    assert not any("two: " in line and "reached" in line for line in lines)


def test_an_axis_may_have_lists_and_names_of_files_stay_short(chaos: ModuleType, tmp_path: Path) -> None:
    values = [[0.9, 0.95], [0.9, 0.99]]
    long = {"data.path": ["/".join("a" * 300), "/".join("a" * 301)]}
    study = chaos.study_of(tmp_path / "base.yaml", settings={"optim.betas": values})
    grid = Grid(study, "code")
    points = list(grid.all_points())
    assert len({point.name for point in points}) == len({point.key for point in points}) == 4 * (2 * 2 + 2)
    configs = [grid.config(grid.point(variant, 160, 1, None), tmp_path) for variant in grid.variants]
    assert [list(config.optim.betas) for config in configs] == values * 2
    grid = Grid(chaos.study_of(tmp_path / "base.yaml", settings=long), "code")
    points = list(grid.all_points())
    assert len({point.name for point in points}) == len({point.key for point in points})
    assert max(len(point.name) for point in points) < 200 < max(len(point.short_name) for point in points)


def test_designs_of_equal_flops_train_on_more_or_fewer_tokens(chaos: ModuleType, tmp_path: Path) -> None:
    from cllm.model.sizes import meta_decoder, training_flops_per_token

    study = chaos.study_of(tmp_path / "base.yaml", match="flops", tokens=160_000)
    grid = Grid(study, "code")
    configs = [grid.config(grid.point(v, 160_000, 1, None), tmp_path) for v in grid.variants]
    flops = [c.train.steps * training_flops_per_token(meta_decoder(c.model), c.data.seq_len) for c in configs]
    assert configs[0].train.steps == 10_000 < configs[1].train.steps
    assert flops[1] == pytest.approx(flops[0], rel=1e-4)


@pytest.mark.parametrize("seconds", [None, 3600.0])
def test_a_task_of_an_array_leaves_points_to_others(chaos: ModuleType, tmp_path: Path, seconds: float | None) -> None:
    from cllm.lock import locked

    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={}, seeds=[1])
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0), seconds=seconds)
    held = runner.queue.wanted()[0]
    with locked(runner.layout.lock(held)):
        assert runner.run() == 4
    assert [point.variant.design for point, _ in runner.queue.left()] == ["mha"]
    assert json.loads(next((tmp_path / "results").glob("*.json")).read_text())["design"] == "cla"


def test_a_task_whose_time_is_too_short_for_what_is_left_is_no_task_without_work(
    chaos: ModuleType, tmp_path: Path
) -> None:
    from cllm.lock import locked

    study = chaos.study_of(tmp_path / "base.yaml", rates=None, evaluate={}, seeds=[1])
    runner = chaos.runner_of(study, tmp_path, chaos.FakeCommands(0), seconds=100.0)
    runner.estimates = Estimates(16.0)  # 160 tokens take 10 s, and the start 30
    runner._deadline = time.monotonic() + 35
    with locked(runner.layout.lock(runner.queue.wanted()[0])):
        assert runner.run() == 3
    assert not list((tmp_path / "results").glob("*.json"))
