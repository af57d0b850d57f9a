"""Convert a pretrained model to plans with half of its cache, measure their starts, and train each by distillation.

    python -m experiments.half_cache --teacher FOLDER --data PREPARED --out DIR --tokens 20000000 --stop-after 9m

Each student first gets a perplexity for every start (`--starts`), then trains from the best of them. One student at a
time runs on each GPU, in a process of its own. DIR/results.json and DIR/log.txt are written every few seconds. After
`--stop-after`, and on SIGTERM, SIGHUP or Ctrl-C, running students save and the command ends with status 3; the same
command continues. docs/uptraining.md has results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from cllm import processes
from cllm.arguments import Parser, whole_number
from cllm.environment import environment
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.files import write_atomic
from cllm.lock import locked
from cllm.runs import RunFolder
from cllm.signals import STOPPING, stoppable
from cllm.study.schema import parse_duration
from cllm.uptrain.teacher import teacher_config
from experiments.half_cache.students import DEFAULT, PLANS, ROOT, STARTS, check_names, starts_of, student_data

_MOST_THREADS = 8
"""Threads of a student, at most. With 64 each, the least squares of two students at once took minutes, not seconds."""
_SAVING = 60.0
"""Seconds for a student to save when time is up."""


class Experiment:
    """All students of a command."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        seconds = math.inf if options.stop_after is None else parse_duration(options.stop_after)
        self.deadline = time.time() + seconds
        self.gpus = torch.cuda.device_count() if options.device == "auto" else 0
        model = teacher_config(options.teacher)
        heads = model.plan().source(0).kv_heads
        if heads is None:
            raise UserError(f"--teacher {options.teacher}: layer 0 has no keys and values; allowed: mha, gqa, mqa")
        self.n_heads, self.kv_heads = model.n_heads, heads
        self.failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._environment = environment()

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: save what is running and start nothing more."""
        self.deadline = 0.0

    def log(self, text: str) -> None:
        """Print a line, and append it to log.txt."""
        with self._lock:
            print(text, flush=True)
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def config(self, name: str, start: str) -> dict[str, Any]:
        """The config of a student."""
        o = self.options
        overrides: dict[str, dict[str, Any]] = {
            "data": {"seq_len": o.seq_len, "validation_sequences": o.windows},
            "init": {"calibration_sequences": o.calibration},
            "optim": {"lr": o.lr},
            "train": {"global_batch": o.batch, "micro_batch": o.batch},
        }
        return student_data(
            name,
            start,
            teacher=o.teacher,
            data=o.data,
            n_heads=self.n_heads,
            kv_heads=self.kv_heads,
            out=self.out,
            gpu=self.gpus > 0,
            tokens=o.tokens,
            overrides=overrides,
        )

    def run(self) -> bool:
        """Run all students, one at a time on each device; returns whether all are done."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in self.options.students:
            waiting.put(name)
        workers = [threading.Thread(target=self._work, args=(waiting, device)) for device in range(max(self.gpus, 1))]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            self.write()
            for worker in workers:
                worker.join(2.0 / len(workers))
        rows = self.write()
        write_atomic(self.out / "table.md", table(rows))
        done = "loss" if self.options.tokens else "start_loss"
        return all(done in row and row.get("finished", not self.options.tokens) for row in rows)

    def _work(self, waiting: queue.SimpleQueue[str], device: int) -> None:
        while time.time() < self.deadline:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._student(name, device)
            except Exception as error:  # the other students go on
                self.failed[name] = str(error) if isinstance(error, UserError) else repr(error)
            if name in self.failed:
                self.log(f"{name}: failed: {self.failed[name]}")

    def _student(self, name: str, device: int) -> None:
        configs = {start: self.config(name, start) for start in starts_of(name, self.options.starts)}
        spec = {"configs": configs, "out": str(self._starts(name)), "device": "cuda" if self.gpus else "cpu"}
        file = self.out / "specs" / f"{name}.json"
        write_atomic(file, json.dumps(spec, indent=2) + "\n")
        if not self._process([sys.executable, "-m", "experiments.half_cache.starts", file], name, "starts", device):
            return
        best = self.best(name)
        if best is None:
            self.failed[name] = f"no start of {', '.join(configs)} is possible: see {self._starts(name)}"
            return
        losses = {k: v["loss"] for k, v in self.measured(name)["starts"].items() if "loss" in v}
        self.log(f"{name}: starts " + ", ".join(f"{k} {math.exp(loss):.2f}" for k, loss in losses.items()))
        if not self.options.tokens:
            return
        folder = RunFolder(self.out / "runs" / name)
        chosen = self.out / "configs" / f"{name}.yaml"
        if not chosen.exists():  # a run goes on from the start that it began with
            write_atomic(chosen, yaml.safe_dump(configs[best], sort_keys=False))
        data = yaml.safe_load(chosen.read_text(encoding="utf-8"))
        if folder.is_validated_at(data["train"]["steps"]):
            return
        command = [sys.executable, ROOT / "train.py", "--config", chosen, "--resume", "auto"]
        if self._process(command, name, "train", device):
            row = self.row(name)
            self.log(f"{name}: perplexity {row['start_ppl']:.2f} -> {row['ppl']:.2f}, {row['tokens']:,} tokens")

    def _process(self, command: list[str | Path], name: str, step: str, device: int) -> bool:
        """Run a command on a device until it ends or time is up; returns whether it finished."""
        log = self.out / "logs" / f"{name}-{step}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(min(max((os.cpu_count() or 1) // max(self.gpus, 1), 1), _MOST_THREADS))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        with log.open("a", encoding="utf-8") as output:
            process = processes.start(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
            while not processes.has_ended(process) and time.time() < self.deadline:
                time.sleep(0.2)
            in_time = processes.has_ended(process)
            if not in_time:
                processes.send(process, signal.SIGTERM)
            status = processes.reap(process, _SAVING)
        if in_time and status not in (0, EXIT_STOPPED):
            last = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:])
            self.failed[name] = f"{step}: exit status {status}: {last} ({log})"
        return in_time and status == 0

    # ---- results -----------------------------------------------------------------------------------------------------

    def _starts(self, name: str) -> Path:
        return self.out / "starts" / f"{name}.json"

    def measured(self, name: str) -> dict[str, Any]:
        """The measured starts of a student, as its file has them; before there is a file, no starts."""
        file = self._starts(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"starts": {}}

    def best(self, name: str) -> str | None:
        """The start with the lowest loss; None without one."""
        losses = {start: row["loss"] for start, row in self.measured(name)["starts"].items() if "loss" in row}
        return min(losses, key=lambda start: losses[start], default=None)

    def row(self, name: str) -> dict[str, Any]:
        """The results of a student so far: starts, and the curve of its training."""
        measured, best = self.measured(name), self.best(name)
        row: dict[str, Any] = {"student": name, "start": best, **measured}
        if best is not None:
            row["start_loss"] = measured["starts"][best]["loss"]
            row["start_ppl"], row["teacher_ppl"] = math.exp(row["start_loss"]), math.exp(row["teacher_loss"])
        folder, config = RunFolder(self.out / "runs" / name), self.out / "configs" / f"{name}.yaml"
        if config.exists() and folder.metrics_file.exists():
            data = yaml.safe_load(config.read_text(encoding="utf-8"))
            rows = list(folder.metrics())
            per_step = data["train"]["global_batch"] * data["data"]["seq_len"]
            row["curve"] = [
                {"tokens": r["step"] * per_step, "loss": r["val/loss"], "teacher_loss": r.get("val/teacher_loss")}
                for r in rows
                if "val/loss" in r
            ]
            row["tokens"] = max((r["step"] for r in rows), default=0) * per_step
            row["finished"] = folder.is_validated_at(data["train"]["steps"])
            if row["curve"]:
                last = row["curve"][-1]
                row |= {"loss": last["loss"], "ppl": math.exp(last["loss"]), "run_teacher_loss": last["teacher_loss"]}
        return row | ({"failed": self.failed[name]} if name in self.failed else {})

    def write(self) -> list[dict[str, Any]]:
        """Write results.json; returns the rows of the students."""
        rows = [self.row(name) for name in self.options.students]
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        found = {"environment": self._environment, "settings": settings, "students": rows}
        write_atomic(self.out / "results.json", json.dumps(found, indent=2) + "\n")
        return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the students, perplexities on held-out text."""
    starts = [start for start in STARTS if any(start in row["starts"] for row in rows)]
    body = []
    for row in rows:
        share = row["bytes_per_token"] / row["teacher_bytes_per_token"] if "bytes_per_token" in row else math.nan
        losses = [row["starts"].get(start, {}).get("loss") for start in starts]
        words = ["" if loss is None else f"{math.exp(loss):,.1f}" for loss in losses]
        end = f"{row['ppl']:.2f}" if "ppl" in row else ""
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        teacher = f"{row['teacher_ppl']:.2f}" if "teacher_ppl" in row else ""
        body.append([row["student"], f"{share:.3f}", teacher, *words, end, tokens])
    header = ["student", "cache", "teacher", *starts, "trained", "tokens"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.half_cache", description=__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="FOLDER", help="checkpoint folder or run to start from")
    add("--data", type=Path, required=True, metavar="PREPARED", help="text prepared with the teacher's tokenizer")
    add("--out", type=Path, default=Path("runs/half_cache"), metavar="DIR", help="default: %(default)s")
    add("--students", nargs="+", default=DEFAULT, metavar="NAME",
        help=f"of {', '.join(PLANS)} (default: {' '.join(DEFAULT)})")  # fmt: skip
    add("--starts", nargs="+", default=["fit", "fit+outputs"], metavar="START",
        help=f"of {', '.join(STARTS)} (default: fit fit+outputs); latents have svd alone")  # fmt: skip
    add("--tokens", type=whole_number(0), default=20_000_000, metavar="N",
        help="tokens to train each student on; 0: starts alone (default: %(default)s)")  # fmt: skip
    add("--stop-after", metavar="TIME", help="save and end after this time, such as 9m")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: all visible GPUs")
    add("--lr", type=float, help="peak rate (default: that of the config)")
    add("--batch", type=whole_number(1), metavar="N", help="sequences of a step (default: that of the config)")
    add("--seq-len", type=whole_number(2), metavar="N", help="tokens of a sequence (default: that of the config)")
    add("--windows", type=whole_number(1), metavar="N", help="validation sequences (default: that of the config)")
    add("--calibration", type=whole_number(1), metavar="N",
        help="calibration sequences (default: that of the config)")  # fmt: skip
    return parser


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 after a failure, 3 if time ran out."""
    options = parser().parse_args(arguments)
    check_names(options.students, PLANS, "--students")
    check_names(options.starts, STARTS, "--starts")
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        experiment = Experiment(options)
        numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, experiment.stop) for number in numbers}
        try:
            done = experiment.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print((options.out / "table.md").read_text(encoding="utf-8"), end="")
    if experiment.failed:
        return 1
    if not done:
        print("time is up; the same command goes on", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
