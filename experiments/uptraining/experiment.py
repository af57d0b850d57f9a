"""The steps of the experiment in their order, until time is up."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cllm.data.manifest import Manifest
from cllm.environment import choose_device
from cllm.errors import UserError
from cllm.signals import raise_if_stopped
from cllm.uptrain.teacher import load_teacher
from experiments.uptraining import report
from experiments.uptraining.base import check_import, make_tokens, pretrain
from experiments.uptraining.setup import (
    FULL,
    SMALL,
    TINY,
    Deadline,
    Folders,
    Item,
    Size,
    Start,
    StepTime,
    Student,
    agenda,
    claim,
)
from experiments.uptraining.steptime import measure_steps
from experiments.uptraining.students import Runner, measure_start

_COMPILING = 150
"""Seconds that timing compiled steps takes."""


def size_of(options: argparse.Namespace) -> Size:
    """The size given by the arguments."""
    size = TINY if options.tiny else SMALL if options.small else FULL
    given = {
        "tokens": options.tokens,
        "vocab_size": options.vocab_size,
        "base_seed": options.base_seed,
        "uptrain_batch": options.batch,
    }
    return dataclasses.replace(size, **{key: value for key, value in given.items() if value is not None})


class Experiment:
    """The steps and the state of one command in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.size = options, size_of(options)
        self.folders = Folders(options.out, options.results)
        self.device = choose_device(options.device)
        gpu = self.device.type == "cuda"
        self.compiled = gpu and not options.no_compile
        given = {"all": options.lr, "kv": options.kv_lr}
        default = {"all": self.size.uptrain_lr, "kv": self.size.uptrain_kv_lr}
        self.rates = {what: default[what] if rate is None else rate for what, rate in given.items()}
        self.agenda = agenda(
            self.rates,
            seeds=options.seeds,
            train_seeds=options.train_seeds,
            percents=options.percents,
            compile_steps=gpu if options.compile_steps is None else options.compile_steps,
        )
        self.deadline = Deadline(60 * options.minutes)
        self.unfinished: list[str] = []
        self.second_interrupt: Any = signal.default_int_handler
        """The handler of Ctrl-C after a first signal."""
        claim(self.folders, self.size)

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: save what is running and start nothing more. A second Ctrl-C interrupts at once."""
        self.deadline.at = 0.0
        signal.signal(signal.SIGINT, self.second_interrupt)

    def _wanted(self, item: Item) -> bool:
        """Whether --only matches the item and it has no result yet."""
        return bool(re.match(self.options.only, item.name)) and not self.folders.result(item.name).exists()

    def _late(self, step: str, needs: float = 0.0) -> bool:
        """Whether less than `needs` seconds are left; `step` then counts as unfinished."""
        late = self.deadline.left < needs
        if late and step not in self.unfinished:
            self.unfinished.append(step)
        return late

    def tokens(self) -> None:
        """Prepare the corpus."""
        if not self.folders.tokens.exists() and not self.options.corpus:
            raise UserError("--corpus is not given, and no tokens are prepared; name files of text or JSON lines")
        if self.options.corpus:
            manifest = make_tokens(self.folders, self.size, self.options.corpus, self.options.validation)
            print(f"tokens: {manifest.split('train').tokens:,} to train on, {manifest.vocab_size:,} in the vocabulary")

    def base(self) -> None:
        """Pretrain the base model."""
        if self.folders.result("base").exists():
            return
        manifest = Manifest.load(self.folders.tokens)
        row = pretrain(
            self.folders, self.size, manifest, device=self.device, compiled=self.compiled, deadline=self.deadline
        )
        if row is None:
            self.unfinished.append("base")
        else:
            report.write_result(self.folders, "base", row)

    def _needs_base(self) -> None:
        if not self.folders.result("base").exists():
            raise UserError(f"--out {self.folders.out}: holds no base model yet; run the steps tokens and base first")

    def imported(self) -> None:
        """Compare the imported base model with the original."""
        if not self.folders.result("import").exists():
            self._needs_base()
            report.write_result(self.folders, "import", check_import(self.folders, self.size, self.device))

    def starts(self, wanted: Sequence[Start]) -> None:
        """Measure the losses of students before training; they share one teacher."""
        teacher, longest = load_teacher(self.folders.base), 0.0
        for start in wanted:
            if self._late("starts", longest):
                return
            with self._recording(start.name):
                row = measure_start(self.folders, self.size, start, teacher, self.device)
                longest = max(longest, row["took"])
                report.write_result(self.folders, start.name, row)
                print(f"{start.name}: loss {row['loss']:.4f}, {row['seconds']:.1f} s", flush=True)

    def step_times(self, wanted: Sequence[StepTime]) -> None:
        """Time steps; nothing else runs on the device."""
        gpu = self.device.type == "cuda"
        for item in wanted:
            if self._late("steps", _COMPILING if gpu and item.compiled else 0.0):
                return
            student = Student("fusedkv", "copy", "distilled", item.trainable, 1.0, self.rates["all"])
            steps = 20 if gpu else 2
            with self._recording(item.name):
                first, *rows = measure_steps(
                    self.folders, self.size, student, device=self.device, compiled=item.compiled, steps=steps
                )
                for i, row in enumerate(rows, 1):
                    report.write_result(self.folders, f"{item.name}-{i}", row)
                report.write_result(self.folders, item.name, first)  # last: this result marks the item as done
            torch._dynamo.reset()

    @contextlib.contextmanager
    def _recording(self, name: str) -> Iterator[None]:
        """Record any failure as a row, so that the other measurements continue."""
        try:
            yield
        except Exception as error:
            raise_if_stopped(error)
            report.write_failure(self.folders, name, f"{type(error).__name__}: {error}")

    def students(self, wanted: Sequence[Student]) -> None:
        """Train students; those that failed before come last."""
        runner = Runner(
            self.folders,
            self.size,
            device=self.device,
            compiled=self.compiled,
            parallel=self.options.parallel,
            deadline=self.deadline,
        )
        left = runner.run(sorted(wanted, key=lambda student: report.has_failed(self.folders, student.name)))
        if left:
            self.unfinished.append(f"students ({left} of {len(wanted)})")

    def run(self, steps: Sequence[str]) -> None:
        """Run `steps`, names of `STEPS` or "all", until time is up."""
        for name, step in {"tokens": self.tokens, "base": self.base, "import": self.imported}.items():
            if ("all" in steps or name in steps) and not self.unfinished:
                step()
        kinds: dict[type[Item], tuple[str, Callable[[Any], None]]] = {
            Start: ("starts", self.starts),
            StepTime: ("steps", self.step_times),
            Student: ("students", self.students),
        }
        items = [item for item in self.agenda if "all" in steps or kinds[type(item)][0] in steps]
        for kind, group in itertools.groupby(filter(self._wanted, items), type):
            name, measure = kinds[kind]
            if self.unfinished or self._late(name):
                return
            self._needs_base()
            measure(list(group))
