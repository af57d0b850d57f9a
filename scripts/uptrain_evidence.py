"""Pretrain a Llama with transformers, turn it into plans that share, train those a little, and tabulate what came out.

    python scripts/uptrain_evidence.py all --corpus FILES --validation FILES --out runs/evidence --minutes 9

Steps, in this order, each of which skips what is done, so that the same command goes on where time ran out:

    tokens    the corpus with a tokenizer trained on it
    base      LlamaForCausalLM of transformers, pretrained
    import    the same model read by cllm: logits compared
    starts    students before training: every plan, method and calibration seed
    steps     times of a distilled and of a plain step
    students  uptraining by train.py: plans, methods, losses, what is trained, shares of the pretraining tokens
    table     rows.json and table.md in OUT; every result is followed by it

Of the last three what answers most comes first, as `agenda` in uptraining/setup.py lists it. One that fails is written
down and stops no other. docs/uptraining.md says what was found. --tiny does all of it on a CPU in some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from uptraining import report
from uptraining.base import check_import, make_tokens, pretrain
from uptraining.setup import (
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
from uptraining.steptime import measure_steps
from uptraining.students import Runner, measure_start

from cllm.arguments import Parser
from cllm.data.manifest import Manifest
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.lock import locked
from cllm.signals import STOPPING, stoppable
from cllm.uptrain.teacher import load_teacher

STEPS = ("tokens", "base", "import", "starts", "steps", "students", "table")


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("step", nargs="+", choices=("all", *STEPS), metavar="STEP", help="all, or some of the steps above")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    add("--corpus", nargs="+", default=[], metavar="FILE", help="text or JSON lines to train on, folders, globs")
    add("--validation", nargs="+", default=[], metavar="FILE", help="held out (default: 2 %% of the corpus)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    sizes.add_argument("--small", action="store_true", help="2 million parameters, for two CPU cores")
    add("--base-seed", type=int, metavar="N", help="another base model (default: 0); needs an --out of its own")
    add("--results", type=Path, metavar="DIR", help="write rows.json and table.md there too, after every result")
    add("--tokens", type=int, metavar="N", help=f"pretraining tokens (default: {FULL.tokens:,})")
    add("--vocab-size", type=int, metavar="N", help=f"of the tokenizer (default: {FULL.vocab_size:,})")
    add("--seeds", type=int, default=3, metavar="N", help="calibration texts of starts (default: %(default)s)")
    add("--train-seeds", type=int, default=1, metavar="N", help="seeds of runs (default: %(default)s)")
    add("--percents", type=float, nargs="+", default=[1.0, 2.0, 5.0], metavar="P",
        help="shares of the pretraining tokens (default: 1 2 5)")  # fmt: skip
    add("--lr", type=float, help=f"peak rate of students (default: {FULL.uptrain_lr:g})")
    add("--kv-lr", type=float, help=f"the same where only K/V are trained (default: {FULL.uptrain_kv_lr:g})")
    add("--batch", type=int, metavar="N", help="sequences of a student's step (default: "
        f"{FULL.uptrain_batch}); needs an --out of its own")  # fmt: skip
    add("--only", default="", metavar="REGEX", help="starts and students whose name it matches from its beginning")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--no-compile", action="store_true", help="run blocks as they are; short runs do not earn compiling back")
    add("--compile-steps", action=argparse.BooleanOptionalAction, help="time compiled steps (default: on a GPU)")
    add("--parallel", type=int, default=1, metavar="N", help="students trained at once, each in a process of its own")
    add("--minutes", type=float, default=1e5, metavar="M",
        help="start nothing that may take longer than is left; students under way are saved then")  # fmt: skip
    return parser


def size_of(options: argparse.Namespace) -> Size:
    """The size that the arguments say."""
    size = TINY if options.tiny else SMALL if options.small else FULL
    said = {
        "tokens": options.tokens,
        "vocab_size": options.vocab_size,
        "base_seed": options.base_seed,
        "uptrain_batch": options.batch,
    }
    return dataclasses.replace(size, **{key: value for key, value in said.items() if value is not None})


class Experiment:
    """The steps, in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.size = options, size_of(options)
        self.folders = Folders(options.out, options.results)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no usable GPU; allowed here: cpu, auto")
        self.device = torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")
        gpu = self.device.type == "cuda"
        self.compiled = gpu and not options.no_compile
        said = {"all": options.lr, "kv": options.kv_lr}
        usual = {"all": self.size.uptrain_lr, "kv": self.size.uptrain_kv_lr}
        self.rates = {what: usual[what] if rate is None else rate for what, rate in said.items()}
        self.agenda = agenda(
            self.rates,
            seeds=options.seeds,
            train_seeds=options.train_seeds,
            percents=options.percents,
            compile_steps=gpu if options.compile_steps is None else options.compile_steps,
        )
        self.deadline = Deadline(60 * options.minutes)
        self.unfinished: list[str] = []
        claim(self.folders, self.size)

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: what is under way is saved, and nothing more begun. A second Ctrl-C interrupts at once."""
        self.deadline.at = 0.0
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _wanted(self, item: Item) -> bool:
        return bool(re.match(self.options.only, item.name)) and not self.folders.result(item.name).exists()

    def _late(self, step: str, needs: float = 0.0) -> bool:
        late = self.deadline.left < needs
        if late and step not in self.unfinished:
            self.unfinished.append(step)
        return late

    def tokens(self) -> None:
        if not self.folders.tokens.exists() and not self.options.corpus:
            raise UserError("--corpus is not given, and no tokens are prepared; name files of text or JSON lines")
        if self.options.corpus:
            manifest = make_tokens(self.folders, self.size, self.options.corpus, self.options.validation)
            print(f"tokens: {manifest.split('train').tokens:,} to train on, {manifest.vocab_size:,} in the vocabulary")

    def base(self) -> None:
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
        if not self.folders.result("import").exists():
            self._needs_base()
            report.write_result(self.folders, "import", check_import(self.folders, self.size, self.device))

    def starts(self, wanted: Sequence[Start]) -> None:
        """Measure students before training, all with one teacher."""
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
        """Time steps, alone on the device."""
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
                report.write_result(self.folders, item.name, first)  # last: with it, nothing is measured again
            torch._dynamo.reset()

    @contextlib.contextmanager
    def _recording(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever goes wrong with one is written down, and the others go on
            report.write_failure(self.folders, name, f"{type(error).__name__}: {error}")

    def students(self, wanted: Sequence[Student]) -> None:
        """Train students, those last that failed before."""
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
        """Do `steps`, until time is up."""
        for name, step in {"tokens": self.tokens, "base": self.base, "import": self.imported}.items():
            if ("all" in steps or name in steps) and not self.unfinished:
                step()
        do: dict[type[Item], tuple[str, Callable[[Any], None]]] = {
            Start: ("starts", self.starts),
            StepTime: ("steps", self.step_times),
            Student: ("students", self.students),
        }
        items = [item for item in self.agenda if "all" in steps or do[type(item)][0] in steps]
        for kind, group in itertools.groupby(filter(self._wanted, items), type):
            name, measure = do[kind]
            if self.unfinished or self._late(name):
                return
            self._needs_base()
            measure(list(group))


_COMPILING = 150
"""Seconds that timing compiled steps takes about."""


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 where time ran out, else 1 where something failed."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    with locked(options.out):
        experiment = Experiment(options)
        numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, experiment.stop) for number in numbers}
        try:
            experiment.run(options.step)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            text = report.publish(experiment.folders)
    print(text, end="")
    if experiment.unfinished:
        print(f"time is up: {', '.join(experiment.unfinished)} not finished; the same command goes on", file=sys.stderr)
        return EXIT_STOPPED
    rows = report.read_rows(experiment.folders)
    return int(any(row["kind"] == "failed" or not row.get("equal", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
