"""Kill and interrupt commands at seeded moments, run them again, and compare what they leave with undisturbed runs.

    python -m tests.chaos                         # 200 disturbances of all commands, about ten minutes on two cores
    python -m tests.chaos --disturbances 30 --only train --seed 7

A moment is either an operation on a file of the working folder (the k-th open, rename, removal ...), at which the
process sends itself the signal, or a time. Each command starts in a fork of this process, which has imported all it
needs, so that a trial costs what the command computes and no more. Equal means: prepared data, exports and tables byte
by byte; of a run every row of metrics but times, every weight and every number of the optimizer's state.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.listdir"}
TIMED = re.compile(r"time|throughput/|memory/|.*seconds|compression_share_of_prefill")
DESTRUCTOR = re.compile(r"^Exception ignored in: <function \w+\.__del__ .*\nTraceback .*\n(?: .*\n)*.*\n?", re.M)
"""Python's report of a destructor that fails because a signal ended the constructor, as that of zipfile."""
LIMIT = 600.0
"""Seconds after which a command counts as hung."""


@dataclass(frozen=True)
class Job:
    """A command that can be given again after it was disturbed."""

    name: str
    command: Callable[[], int]
    result: Callable[[], Any]
    """The output in a form that can be compared."""
    output: Path
    """The folder that it writes; each trial starts with a new one."""


@dataclass
class Attempt:
    """How one start of a command ended."""

    status: int
    seconds: float
    events: int
    log: str


@dataclass
class Outcome:
    """What came of a job's trials."""

    trials: int = 0
    disturbances: int = 0
    faults: list[str] = field(default_factory=list)


def run(
    job: Job, work: Path, number: int | None = None, event: int | None = None, after: float | None = None
) -> Attempt:
    """Run a job's command in a fork, with signal `number` at its `event`-th file operation or `after` seconds."""
    log_file, count_file = work / "log.txt", work / "events.txt"
    begin = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_child(job, work, log_file, count_file, number, event)
    status = _wait(child, begin, number if event is None else None, after)
    events = int(count_file.read_text() or 0) if count_file.exists() else 0
    return Attempt(status, time.monotonic() - begin, events, log_file.read_text(errors="replace"))


def _be_child(job: Job, work: Path, log_file: Path, count_file: Path, number: int | None, event: int | None) -> None:
    """Run the command and leave the process, whatever happens."""
    status = 70
    try:
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seen = 0
        place = str(job.output.parent)

        def watch(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name not in EVENTS or not any(isinstance(a, str | Path) and str(a).startswith(place) for a in arguments):
                return
            seen += 1
            if number is not None and event is not None and seen == event:
                os.kill(os.getpid(), number)

        sys.addaudithook(watch)
        status = job.command()
        count_file.write_text(str(seen))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, begin: float, number: int | None, after: float | None) -> int:
    """The child's exit status, -N where signal N ended it."""
    sent = number is None or after is None
    while True:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(raw)
        now = time.monotonic() - begin
        if not sent and after is not None and number is not None and now > after:
            os.kill(child, number)
            sent = True
        if now > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.002)


def disturb(job: Job, work: Path, draw: random.Random, wanted: int) -> Outcome:
    """Trials of a job until it was disturbed `wanted` times."""
    outcome = Outcome()
    shutil.rmtree(job.output.parent, ignore_errors=True)
    job.output.parent.mkdir(parents=True)
    whole = run(job, work)
    if whole.status != 0:
        return Outcome(faults=[f"{job.name}: undisturbed: status {whole.status}\n{whole.log[-2000:]}"])
    expected = job.result()
    while outcome.disturbances < wanted:
        outcome.trials += 1
        shutil.rmtree(job.output.parent)
        job.output.parent.mkdir()
        said = []
        for _ in range(draw.randint(1, 4)):
            number = draw.choice(SIGNALS)
            if draw.random() < 0.6:
                attempt = run(job, work, number, event=draw.randint(1, max(whole.events, 1)))
            else:
                attempt = run(job, work, number, after=draw.random() * whole.seconds)
            said.append(f"{signal.Signals(number).name} -> {attempt.status}")
            # Python cannot raise in a weak reference's callback: it prints a traceback there and goes on to the end.
            log = DESTRUCTOR.sub("", attempt.log)
            shown = "Traceback" in log and not (attempt.status == 0 and "Exception ignored in" in log)
            if attempt.status == 124 or shown:
                outcome.faults.append(f"{job.name} trial {outcome.trials}: {said}\n{attempt.log[-3000:]}")
            if attempt.status != 0:
                outcome.disturbances += 1
        last = run(job, work)
        if last.status != 0:
            outcome.faults.append(
                f"{job.name} trial {outcome.trials}: {said}: then status {last.status}\n{last.log[-2000:]}"
            )
            continue
        if (found := job.result()) != expected:
            outcome.faults.append(f"{job.name} trial {outcome.trials}: {said}: {difference(expected, found)}")
        if rest := [p.name for p in job.output.parent.iterdir() if p != job.output]:
            outcome.faults.append(f"{job.name} trial {outcome.trials}: {said}: left {rest}")
    return outcome


def difference(expected: Any, found: Any) -> str:
    """The first place in which two results differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys(), key=str):
            if expected.get(key) != found.get(key):
                return f"{key}: {difference(expected.get(key), found.get(key))}"
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{len(expected)} entries expected, {len(found)} found"
        for n, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a != b:
                return f"entry {n}: {difference(a, b)}"
    return f"{str(expected)[:300]} expected, {str(found)[:300]} found"


def untimed(value: Any) -> Any:
    """JSON without what depends on the clock or the machine's load."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not TIMED.match(str(k))}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def tree(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """A hash of every file under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state_of(value: Any) -> Any:
    """Tensors as hashes of their bytes; the rest as it is, so that states can be compared."""
    import torch

    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().view(-1)
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(content.numpy().tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return {str(k): state_of(v) for k, v in value.items()}
    return [state_of(v) for v in value] if isinstance(value, list | tuple) else str(value)


def run_of(folder: Path) -> dict[str, Any]:
    """A run's rows, weights and optimizer."""
    import torch

    from cllm.runs import RunFolder

    run_folder = RunFolder(folder)
    step, newest = run_folder.checkpoints()[-1]  # a signal leaves one of its own step beside it
    content = torch.load(newest, weights_only=True)
    state = state_of({key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")})
    return {"rows": [untimed(row) for row in run_folder.metrics()], "step": step, "state": state}


def table_of(folder: Path) -> dict[str, Any]:
    """JSON and CSV files of a folder, without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            found[name] = path.read_text()
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what is printed meanwhile, also to the descriptors themselves, nowhere."""
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    try:
        for n in (1, 2):
            os.dup2(nowhere, n)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for n, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, n)
        for descriptor in (nowhere, *kept):
            os.close(descriptor)


def write_base(folder: Path) -> Path:
    """Texts, prepared data, a config and a finished run that the jobs need; gives the config."""
    import yaml

    import train
    from data import prepare as prepare_command

    draw = random.Random(0)
    words = [
        "the",
        "plan",
        "says",
        "where",
        "keys",
        "and",
        "values",
        "come",
        "from",
        "and",
        "every",
        "layer",
        "reads",
        "what",
        "an",
        "owner",
        "wrote",
    ]
    (folder / "text").mkdir(parents=True)
    for n in range(60):
        text = f"{n} " + " ".join(draw.choices(words, k=draw.randint(30, 120)))
        (folder / "text" / f"{n}.txt").write_text(text, encoding="utf-8")
    recipe = {
        "name": "tiny", "source": {"kind": "files", "paths": [str(folder / "text")]}, "shard_tokens": 1000,
        "tokenizer": {"train": {"vocab_size": 280}}, "validation": {"fraction": 0.2}, "workers": 1,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = {
        "name": "run",
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32, "kv": {"preset": "fusedkv"}},
        "data": {"path": str(folder / "prepared"), "seq_len": 32, "num_workers": 0, "validation_sequences": 4},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "train": {
            "steps": 12, "global_batch": 4, "micro_batch": 2, "log_every": 2, "validate_every": 3,
            "checkpoint_every": 3, "keep_checkpoints": 2, "accelerator": "cpu",
        },
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with quiet():
        prepared = prepare_command.main(["--config", str(folder / "recipe.yaml"), "--out", str(folder / "prepared")])
        trained = train.main(["--config", str(file), "--runs_dir", str(folder / "runs"), "--name", "base"])
    if prepared or trained:
        raise RuntimeError(f"the base could not be made: status {prepared}, {trained}")
    return file


def jobs_of(base: Path, config: Path, place: Path) -> list[Job]:
    """Every command that can be given again."""
    import evaluate
    import train
    from data import prepare as prepare_command
    from experiments import sweep_posthoc
    from scripts import convert

    out = {name: place / name / "out" for name in ("prepare", "train", "evaluate", "export", "sweep")}
    done = base / "runs" / "base"
    recipe = str(base / "recipe.yaml")
    return [
        Job("prepare", lambda: prepare_command.main(["--config", recipe, "--out", str(out["prepare"])]),
            lambda: tree(out["prepare"]), out["prepare"]),
        Job("train", lambda: train.main(["--config", str(config), "--resume", "auto", "--name", "out",
            "--runs_dir", str(out["train"].parent)]), lambda: run_of(out["train"]), out["train"]),
        Job("evaluate", lambda: evaluate.main(["--run", str(done), "--out", str(out["evaluate"]), "--posthoc", "none",
            "--posthoc", "svd:rank_k=2,rank_v=2"]), lambda: table_of(out["evaluate"]), out["evaluate"]),
        Job("export", lambda: convert.main(["export", str(done), str(out["export"]), "--force"]),
            lambda: tree(out["export"]), out["export"]),
        Job("sweep", lambda: sweep_posthoc.main([str(done), "--out", str(out["sweep"]), "--spec", "none", "--spec",
            "xkv:group=2,ratio={ratio}", "--ratio", "2"]), lambda: table_of(out["sweep"]), out["sweep"]),
    ]  # fmt: skip


SHARES = {"prepare": 0.2, "train": 0.5, "evaluate": 0.1, "export": 0.1, "sweep": 0.1}


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturbances", type=int, default=200, help="over all commands (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES), help="only these commands")
    parser.add_argument("--work", type=Path, default=Path("/tmp") / f"cllm-chaos-{os.getpid()}", help="an empty folder")
    options = parser.parse_args(words)
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    work = options.work.resolve()
    if work.exists() and any(work.iterdir()):
        parser.error(f"--work {work}: is not empty")
    config = write_base(work / "base")
    chosen = [job for job in jobs_of(work / "base", config, work / "out") if job.name in options.only]
    total = sum(SHARES[job.name] for job in chosen)
    faults = []
    print(f"{'command':<10}{'trials':>8}{'disturbances':>14}{'faults':>8}{'seconds':>9}", flush=True)
    for job in chosen:
        begin = time.monotonic()
        wanted = max(1, round(options.disturbances * SHARES[job.name] / total))
        outcome = disturb(job, work, random.Random(f"{options.seed} {job.name}"), wanted)
        faults += outcome.faults
        row = f"{job.name:<10}{outcome.trials:>8}{outcome.disturbances:>14}{len(outcome.faults):>8}"
        print(f"{row}{time.monotonic() - begin:>9.0f}", flush=True)
    for fault in faults:
        print(f"\n{fault}")
    if not faults:
        shutil.rmtree(work)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
