"""Students trained by train.py, some at a time on each device, until time is up; their results and table."""

from __future__ import annotations

import argparse
import json
import math
import queue
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cllm import processes
from cllm.cache.accounting import kv_bytes
from cllm.environment import environment
from cllm.errors import EXIT_STOPPED, UserError
from cllm.files import shorten, write_atomic
from cllm.runs import RunFolder
from cllm.study.schema import parse_duration
from cllm.uptrain.teacher import teacher_config
from cllm.workers import child_environment, find_gpus, last_line
from experiments.half_cache.configs import Setting, check_config, student_data
from experiments.half_cache.settings import check_same
from experiments.half_cache.students import ROOT, Shape, Student, check_bytes

RESULTS = "results.json"
_MOST_THREADS = 8
"""Threads of a student, at most. With 64 each, the least squares of two students at once took minutes, not seconds."""
_SAVING = 60.0
"""Seconds for a student to save when time is up."""
_NEWS = 30.0
"""Seconds between two lines about a step that runs."""


class Devices:
    """The devices of a command, its log, and the time at which it ends."""

    def __init__(self, out: Path, *, cpu: bool, stop_after: str | None, parallel: int):
        self.out, self.parallel = out, parallel
        self.deadline = time.time() + (math.inf if stop_after is None else parse_duration(stop_after))
        self._gpu_names = [] if cpu else find_gpus()
        self.gpus = len(self._gpu_names)
        self.failed: dict[str, str] = {}
        """Messages by student or step."""
        self._lock = threading.Lock()

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return time.time() >= self.deadline

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: save what is running and start nothing more."""
        self.deadline = 0.0

    def log(self, text: str) -> None:
        """Print a line, and append it to log.txt."""
        with self._lock:
            print(text, flush=True)
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def run(self, command: Sequence[str | Path], name: str, step: str, device: int | None) -> bool:
        """Run a command on one device, or on all for None, until it ends or time is up; returns whether it finished."""
        log = self.out / "logs" / f"{name}-{step}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        at_once = self.parallel * max(self.gpus, 1) if device is not None else max(self.gpus, 1)
        place = ",".join(self._gpu_names if device is None else self._gpu_names[device : device + 1]) or None
        environment = child_environment(place, at_once, most_threads=_MOST_THREADS)
        with log.open("a", encoding="utf-8") as output:
            process = processes.start(command, stdout=output, stderr=output, env=environment)
            news, said = time.monotonic() + _NEWS, ""
            while not processes.has_ended(process) and not self.late:
                time.sleep(0.2)
                if time.monotonic() > news:
                    line, news = last_line(log), time.monotonic() + _NEWS
                    if line not in ("", said):
                        self.log(shorten(line if line.startswith(f"{name}: ") else f"{name}: {line}", 150))
                    said = line
            in_time = processes.has_ended(process)
            if not in_time:
                processes.send(process, signal.SIGTERM)
            status = processes.reap(process, _SAVING)
        if in_time and status not in (0, EXIT_STOPPED):
            self.failed[name] = f"{step}: exit status {status}: {last_line(log)} ({log})"
        return in_time and status == 0


def config_of(student: Student, start: str, o: argparse.Namespace, shape: Shape, *, gpu: bool) -> dict[str, Any]:
    """The config of a student with the options `o` of a command, for a teacher of this shape."""
    overrides: dict[str, dict[str, Any]] = {
        "data": {"seq_len": o.seq_len, "validation_sequences": o.windows},
        "init": {"calibration_sequences": o.calibration},
        "optim": {"lr": o.lr},
        "train": {"global_batch": o.batch, "micro_batch": o.batch},
    }
    setting = Setting(
        o.teacher, o.data, o.out, shape, o.tokens, gpu=gpu, validations=o.validations, overrides=overrides
    )
    return student_data(student, start, setting)


class Experiment:
    """All students of a command."""

    def __init__(self, options: argparse.Namespace, devices: Devices, students: Sequence[Student]):
        self.options, self.devices, self.out = options, devices, options.out
        self.students = list(students)
        self.model = teacher_config(options.teacher)
        self.shape = Shape.of(self.model, options.teacher)
        self.shares = {s.kind: check_bytes(s, self.model, self.shape, options.teacher) for s in self.students}
        self.teacher_bytes = kv_bytes(self.model).resident
        """Of the teacher's cache for each token."""
        self.name: str | None = None
        """The teacher's name in tables of `cllm compare`; None: that of its folder."""
        self.finished: Callable[[RunFolder], None] | None = None
        """Called with the folder of each student that has finished."""
        self._earlier = _results(self.out)
        self._environment = environment()
        self._lock = threading.Lock()

    def config(self, student: Student, start: str) -> dict[str, Any]:
        """The config of a student."""
        return config_of(student, start, self.options, self.shape, gpu=self.devices.gpus > 0)

    def run(self) -> bool:
        """Run all students that have not failed, `parallel` at a time on each device; returns whether all are done.

        Raises `UserError` as `check` does.
        """
        self.check()
        waiting: queue.SimpleQueue[Student] = queue.SimpleQueue()
        for student in self.students:
            if student.name not in self.devices.failed:
                waiting.put(student)
        places = list(range(max(self.devices.gpus, 1))) * self.devices.parallel
        workers = [threading.Thread(target=self._work, args=(waiting, device)) for device in places]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            self.write()
            for worker in workers:
                worker.join(2.0 / len(workers))
        done = "loss" if self.options.tokens else "start_loss"
        return all(done in row and row.get("finished", not self.options.tokens) for row in self.write())

    def check(self) -> None:
        """Raise `UserError` for a student whose settings contradict each other, that none of the starts suits, or that
        has begun with other settings."""
        for student in self.students:
            self._check(student)

    def _check(self, student: Student) -> None:
        starts, file, spec = student.starts(self.options.starts), self._chosen(student), self._spec(student)
        for start in starts:
            check_config(student, self.config(student, start), self.model)
        if self.options.tokens and file.exists():
            check_same(yaml.safe_load(file.read_text(encoding="utf-8")), self.config(student, starts[0]), file)
        before = json.loads(spec.read_text(encoding="utf-8"))["configs"] if spec.exists() else {}
        for start in [s for s in starts if s in before and s in self.measured(student)["starts"]]:
            check_same(before[start], self.config(student, start), spec, start=True)

    def _work(self, waiting: queue.SimpleQueue[Student], device: int) -> None:
        while not self.devices.late:
            try:
                student = waiting.get_nowait()
            except queue.Empty:
                return
            failed, name = self.devices.failed, student.name
            try:
                self._student(student, device)
            except Exception as error:  # the other students go on
                failed[name] = str(error) if isinstance(error, UserError) else repr(error)
            if name in failed:
                self.devices.log(f"{name}: failed: {failed[name]}")

    def _student(self, student: Student, device: int) -> None:
        name, starts = student.name, student.starts(self.options.starts)
        configs = {start: self.config(student, start) for start in starts}
        measures = len(starts) > 1 or not self.options.tokens
        if measures and not self._measure(student, configs, device):
            return
        best = self.best(student) if measures else starts[0]
        if best is None:
            self.devices.failed[name] = f"no start of {', '.join(configs)} is possible: see {self._starts(student)}"
            return
        if not self.options.tokens:
            return
        folder = RunFolder(self.out / "runs" / name)
        chosen = self._chosen(student)
        if not chosen.exists():  # a run goes on from the start that it began with
            write_atomic(chosen, yaml.safe_dump(configs[best], sort_keys=False))
        data = yaml.safe_load(chosen.read_text(encoding="utf-8"))
        if folder.is_validated_at(data["train"]["steps"]):
            self._finish(folder)
            return
        command: list[str | Path] = [sys.executable, ROOT / "train.py", "--config", chosen, "--resume", "auto"]
        if self.devices.run(command, name, "train", device):
            row = self.row(student)
            self.devices.log(f"{name}: perplexity {row['start_ppl']:.2f} -> {row['ppl']:.2f}, {row['tokens']:,} tokens")
            self._finish(folder)

    def _finish(self, folder: RunFolder) -> None:
        if self.finished is not None:
            self.finished(folder)

    def _measure(self, student: Student, configs: dict[str, dict[str, Any]], device: int) -> bool:
        """Measure the starts of a student in a process; returns whether it finished."""
        name = student.name
        spec = {
            "configs": configs,
            "out": str(self._starts(student)),
            "device": "cuda" if self.devices.gpus else "cpu",
        }
        file = self._spec(student)
        write_atomic(file, json.dumps(spec, indent=2) + "\n")
        command: list[str | Path] = [sys.executable, "-m", "experiments.half_cache.starts", file]
        if not self.devices.run(command, name, "starts", device):
            return False
        losses = {k: v["loss"] for k, v in self.measured(student)["starts"].items() if "loss" in v}
        self.devices.log(f"{name}: starts " + ", ".join(f"{k} {math.exp(loss):.2f}" for k, loss in losses.items()))
        return True

    # ---- results -----------------------------------------------------------------------------------------------------

    def _starts(self, student: Student) -> Path:
        return self.out / "starts" / f"{student.name}.json"

    def _chosen(self, student: Student) -> Path:
        """The config with which a student is trained."""
        return self.out / "configs" / f"{student.name}.yaml"

    def _spec(self, student: Student) -> Path:
        """The configs with which the starts of a student are measured."""
        return self.out / "specs" / f"{student.name}.json"

    def measured(self, student: Student) -> dict[str, Any]:
        """The measured starts of a student, as its file has them; before there is a file, no starts."""
        file = self._starts(student)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"starts": {}}

    def best(self, student: Student) -> str | None:
        """The start with the lowest loss; None without one."""
        losses = {start: row["loss"] for start, row in self.measured(student)["starts"].items() if "loss" in row}
        return min(losses, key=lambda start: losses[start], default=None)

    def row(self, student: Student) -> dict[str, Any]:
        """The results of a student so far: starts, and the curve of its training."""
        name, measured, best = student.name, self.measured(student), self.best(student)
        share, whole = self.shares[student.kind], self.teacher_bytes
        row: dict[str, Any] = {"student": name, **asdict(student), "share": share}
        row |= {"bytes_per_token": share * whole, "teacher_bytes_per_token": whole, **measured}
        if best is not None:
            row |= {"start": best, "start_loss": measured["starts"][best]["loss"]}
        folder, config = RunFolder(self.out / "runs" / name), self._chosen(student)
        if config.exists() and folder.metrics_file.exists():
            data = yaml.safe_load(config.read_text(encoding="utf-8"))
            row |= _trained(folder, data)
        for key in ("start", "teacher"):
            if f"{key}_loss" in row:
                row[f"{key}_ppl"] = math.exp(row[f"{key}_loss"])
        if "loss" in row:
            row["above_teacher_percent"] = 100 * (row["loss"] / row["teacher_loss"] - 1)
        failed = self.devices.failed
        return row | ({"failed": failed[name]} if name in failed else {})

    def write(self) -> list[dict[str, Any]]:
        """Write results.json and table.md, also with students of earlier commands; returns the rows of this one's."""
        with self._lock:
            rows = [self.row(student) for student in self.students]
            own = {row["student"] for row in rows}
            every = [*(row for row in self._earlier if row["student"] not in own), *rows]
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
            named = {} if self.name is None else {"name": self.name}
            found = {**named, "environment": self._environment, "settings": settings, "students": every}
            write_atomic(self.out / RESULTS, json.dumps(found, indent=2) + "\n")
            write_atomic(self.out / "table.md", table(every))
        return rows


def _results(out: Path) -> list[dict[str, Any]]:
    """The rows of the students of earlier commands in a folder."""
    file = out / RESULTS
    return json.loads(file.read_text(encoding="utf-8"))["students"] if file.exists() else []


def _trained(folder: RunFolder, data: dict[str, Any]) -> dict[str, Any]:
    """The curve of a run, from its folder and its config."""
    per_step, rows = data["train"]["global_batch"] * data["data"]["seq_len"], list(folder.metrics())
    curve = [
        {"tokens": r["step"] * per_step, "loss": r["val/loss"], "teacher_loss": r.get("val/teacher_loss")}
        for r in rows
        if "val/loss" in r
    ]
    found: dict[str, Any] = {
        "curve": curve,
        "tokens": max((r["step"] for r in rows), default=0) * per_step,
        "finished": folder.is_validated_at(data["train"]["steps"]),
        "lr": data["optim"]["lr"],
        "batch": data["train"]["global_batch"],
    }
    if curve:
        found |= {"loss": curve[-1]["loss"], "ppl": math.exp(curve[-1]["loss"])}
        found |= {"teacher_loss": curve[-1]["teacher_loss"], "start_loss": curve[0]["loss"]}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the finished students, a line for those that differ in their seed alone, by cache and loss.

    Percentages are of nats: how much higher the loss is than the teacher's, and than that of the control that has
    trained in the same way.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("finished"):
            groups.setdefault((row["kind"], tuple(row["recipes"])), []).append(row)
    controls = {recipes: found for (kind, recipes), found in groups.items() if kind == "control"}
    lines = []
    for (kind, recipes), found in groups.items():
        above = [row["above_teacher_percent"] for row in found]
        control = controls.get(recipes) or controls.get(())
        against = ""
        if control is not None and kind != "control":
            base = statistics.fmean(row["loss"] for row in control)
            against = f"{100 * (statistics.fmean(row['loss'] for row in found) / base - 1):.2f}"
        spread = f"{min(above):.2f} to {max(above):.2f}" if len(above) > 1 else ""
        start = 100 * (statistics.fmean(row["start_loss"] / row["teacher_loss"] for row in found) - 1)
        cells = [kind, " + ".join(recipes), f"{found[0]['share']:.3f}", str(len(found)), f"{start:.2f}"]
        lines.append((-found[0]["share"], statistics.fmean(above), cells, spread, against))
    header = ["student", "recipe", "cache", "seeds", "start", "end", "range", "above the control"]
    text = ["| " + " | ".join(header) + " |\n", "|---|---|---:|---:|---:|---:|---|---:|\n"]
    for _, mean, cells, spread, against in sorted(lines, key=lambda line: line[:2]):
        text.append("| " + " | ".join([*cells, f"{mean:.2f}", spread, against]) + " |\n")
    return "".join(text)
