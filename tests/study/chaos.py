"""Kill and interrupt studies at seeded moments, run them again, and compare their results with undisturbed ones.

    python -m tests.study.chaos                  # 200 disturbances, about a minute on two cores
    python -m tests.study.chaos --kills 24 --seed 3

Two processes share each study, as two tasks of a SLURM array. Training is that of `fake_trainer.py`. A study is right
if each point has one result, equal to the undisturbed one, and no lock is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from cllm.study.children import Slot
from cllm.study.estimate import Estimates
from cllm.study.layout import Layout
from cllm.study.points import Grid
from cllm.study.queue import Queue
from cllm.study.runner import Options, Runner
from cllm.study.schema import Study
from cllm.version import code_version

TRAINER = Path(__file__).with_name("fake_trainer.py")
TIMED = ("seconds", "finished", "evaluation_seconds", "tokens_per_s")
LIMIT = 300.0
"""Seconds after which a study counts as hung."""


def study_of(base: Path, **settings: Any) -> Study:
    """A study of two designs, two rates and two seeds on a tiny base config, which is written to `base`."""
    model = {"d_model": 8, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "vocab_size": 32}
    train = {"global_batch": 2, "micro_batch": 2, "log_every": 1, "checkpoint_every": 4}
    optim = {"lr": 0.001, "min_lr": 0.0001}
    base.write_text(yaml.safe_dump({"model": model, "data": {"seq_len": 8}, "train": train, "optim": optim}))
    content = {
        "name": "tiny",
        "base": [str(base)],
        "designs": {"mha": {}, "cla": {"model": {"kv": {"preset": "cla"}}}},
        "rates": {"values": [0.001, 0.002], "tokens": 64},
        "seeds": [1, 2],
        "tokens": 160,
        "evaluate": {"suites": ["perplexity"]},
        **settings,
    }
    return Study.model_validate(content)


class FakeCommands:
    """The commands of `fake_trainer.py`; each start of a training is a line of `started`."""

    def __init__(self, seconds: float = 0.002, started: Path | None = None, together: int | None = None):
        self.seconds, self.started = seconds, started
        self.waits = [] if together is None else [str(started), str(together)]
        """With `together`, the number of all runs, each waits at its last step until the next one was started."""

    def train(self, config: Path) -> list[str]:
        data = yaml.load(config.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if self.started is not None:
            with self.started.open("a") as file:
                file.write(f"{data['name']}\n")
        train, run = data["train"], f"{data['runs_dir']}/{data['name']}"
        numbers = [train["steps"], train["global_batch"] * data["data"]["seq_len"], train["seed"], data["optim"]["lr"]]
        return [
            sys.executable,
            "-S",
            str(TRAINER),
            "train",
            run,
            str(config),
            *map(str, (*numbers, self.seconds)),
            *self.waits,
        ]

    def evaluate(self, job: Path) -> list[str]:
        data = json.loads(job.read_text())
        return [sys.executable, "-S", str(TRAINER), "evaluate", data["run"], data["out"], *data["marks"]]


def runner_of(study: Study, out: Path, commands: FakeCommands, slots: int = 2, **options: Any) -> Runner:
    """A runner with slots that look like GPUs."""
    queue = Queue(Grid(study, code_version()), Layout.at(out), evaluation="e")
    devices = [Slot(str(n)) for n in range(slots)]
    return Runner(queue, commands, devices, Estimates(), Options(poll=0.004, **options))


def results_of(out: Path) -> dict[str, Any]:
    """The results without times, by name."""
    found = {}
    for file in sorted((out / "results").glob("*.json")):
        content = json.loads(file.read_text())
        found[file.name] = {key: value for key, value in content.items() if key not in TIMED}
    return found


def fork(study: Study, out: Path, log: Path) -> int:
    """Run the study in a fork. Returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = runner_of(study, out, FakeCommands(0.004), slots=1).run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(children: list[int]) -> list[int]:
    """Exit statuses; -9 for those that hang, which are killed."""
    deadline, statuses = time.monotonic() + LIMIT, []
    for child in children:
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        statuses.append(os.waitstatus_to_exitcode(found[1]))
    return statuses


def trial(study: Study, out: Path, draw: random.Random, seconds: float) -> int:
    """Run a study that is disturbed a few times, then to its end. Returns the number of disturbances."""
    log, kills = out.parent / "log.txt", 0
    log.unlink(missing_ok=True)
    for _ in range(draw.randint(4, 9)):
        children = [fork(study, out, log) for _ in range(2)]
        time.sleep(draw.uniform(0.01, seconds / 4))
        number = signal.SIGKILL if draw.random() < 0.75 else signal.SIGTERM
        for child in children if draw.random() < 0.5 else children[:1]:
            os.kill(child, number)
        statuses = wait(children)
        kills += any(status != 0 for status in statuses)
    for _ in range(2):  # a process may leave the last points to the other one
        status = wait([fork(study, out, log)])
        if status == [0]:
            return kills
    raise AssertionError(f"status {status}\n{log.read_text()[-3000:]}")


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a point was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp") / f"cllm-study-chaos-{os.getpid()}")
    options = parser.parse_args(words)
    os.fsync = os.fstat  # type: ignore[assignment] # no test cuts the power
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    study = study_of(work / "base.yaml", seeds=[1])
    code_version()  # reads every module: once here instead of in every fork
    begin = time.monotonic()
    if (statuses := wait([fork(study, work / "whole", work / "log.txt")])) != [0]:
        print(f"undisturbed: {statuses}\n{(work / 'log.txt').read_text()}")
        return 1
    seconds, expected = time.monotonic() - begin, results_of(work / "whole")
    draw, kills, trials = random.Random(options.seed), 0, 0
    while kills < options.kills:
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        kills, trials = kills + trial(study, out, draw, seconds), trials + 1
        found = results_of(out)
        left = [path.name for path in (out / "state").glob("*.lock")]
        twice = [file.name for file in (out / "state").glob("*.log") if "is in use by" in file.read_text()]
        if found != expected or left or twice:
            different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            print(f"trial {trials}: results differ: {different}, locks left: {left}, twice: {twice}")
            print((work / "log.txt").read_text())
            return 1
    print(f"{len(expected)} points, {trials} trials, {kills} disturbances, 0 faults")
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
