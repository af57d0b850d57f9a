"""Pretrain a Llama with transformers, turn it into plans that share, train those a little, and tabulate what came out.

    python scripts/uptrain_evidence.py all --corpus FILES --validation FILES --out runs/evidence --minutes 9

Steps, in this order, each of which skips what is done, so that the same command goes on where time ran out:

    tokens    the corpus with a tokenizer trained on it
    base      LlamaForCausalLM of transformers, pretrained
    import    the same model read by cllm: logits compared
    starts    students before training: every plan, method and calibration seed
    steps     times of a distilled and of a plain step
    students  uptraining by train.py: plans, methods, losses, what is trained, shares of the pretraining tokens
    table     rows.json and table.md in OUT; every command ends with it

docs/uptraining.md says what was found. --tiny does all of it on a CPU in a minute or two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from uptraining import report
from uptraining.base import check_import, make_tokens, pretrain, write_result
from uptraining.setup import FULL, TINY, Folders, Size, Student, claim, starts, students
from uptraining.steptime import measure_steps
from uptraining.students import Runner, measure_start, read_rows

from cllm.data.manifest import Manifest
from cllm.errors import UserError, one_line
from cllm.runs import write_atomic
from cllm.train.environment import environment
from cllm.uptrain.teacher import load_teacher

STEPS = ("tokens", "base", "import", "starts", "steps", "students", "table")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("step", nargs="+", choices=("all", *STEPS), metavar="STEP", help="all, or some of the steps above")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    add("--corpus", nargs="+", default=[], metavar="FILE", help="text or JSON lines to train on, folders, globs")
    add("--validation", nargs="+", default=[], metavar="FILE", help="held out (default: 2 %% of the corpus)")
    add("--tiny", action="store_true", help="a model of a few thousand parameters")
    add("--tokens", type=int, metavar="N", help=f"pretraining tokens (default: {FULL.tokens:,})")
    add("--vocab-size", type=int, metavar="N", help=f"of the tokenizer (default: {FULL.vocab_size:,})")
    add("--seeds", type=int, default=3, metavar="N", help="calibration texts of starts (default: %(default)s)")
    add("--train-seeds", type=int, default=1, metavar="N", help="seeds of runs (default: %(default)s)")
    add("--percents", type=float, nargs="+", default=[1.0, 2.0, 5.0], metavar="P",
        help="shares of the pretraining tokens (default: 1 2 5)")  # fmt: skip
    add("--lr", type=float, default=5e-4, help="peak rate of students (default: %(default)s)")
    add("--kv-lr", type=float, default=1e-3, help="the same where only K/V are trained (default: %(default)s)")
    add("--only", default="", metavar="REGEX", help="starts and students whose name it matches from its beginning")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--no-compile", action="store_true", help="run blocks as they are; short runs do not earn compiling back")
    add("--parallel", type=int, default=1, metavar="N", help="students trained at once, each in a process of its own")
    add("--minutes", type=float, default=1e6, metavar="M", help="start nothing that may take longer than is left")
    return parser


def size_of(options: argparse.Namespace) -> Size:
    """The size that the arguments say."""
    size = TINY if options.tiny else FULL
    said = {"tokens": options.tokens, "vocab_size": options.vocab_size}
    return dataclasses.replace(size, **{key: value for key, value in said.items() if value is not None})


class Experiment:
    """The steps, in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.size, self.folders = options, size_of(options), Folders(options.out)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no usable GPU; allowed here: cpu, auto")
        self.device = torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")
        self.compiled = self.device.type == "cuda" and not options.no_compile
        self.deadline = time.time() + 60 * options.minutes
        self.unfinished: list[str] = []
        claim(self.folders, self.size)

    def _wanted(self, name: str) -> bool:
        return bool(re.match(self.options.only, name)) and not self.folders.result(name).exists()

    def _late(self, step: str) -> bool:
        late = time.time() > self.deadline
        if late:
            self.unfinished.append(step)
        return late

    def _needs_base(self) -> None:
        if not self.folders.result("base").exists():
            raise UserError(f"--out {self.folders.out}: holds no base model yet; run the steps tokens and base first")

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
            write_result(self.folders, "base", row)

    def imported(self) -> None:
        if not self.folders.result("import").exists():
            self._needs_base()
            write_result(self.folders, "import", check_import(self.folders, self.size, self.device))

    def starts(self) -> None:
        wanted = [start for start in starts(self.options.seeds) if self._wanted(start.name)]
        if not wanted:
            return
        self._needs_base()
        teacher = load_teacher(self.folders.base)
        for start in wanted:
            if self._late("starts"):
                return
            row = measure_start(self.folders, self.size, start, teacher, self.device)
            write_result(self.folders, start.name, row)
            print(f"{start.name}: loss {row['loss']:.4f}, {row['seconds']:.1f} s", flush=True)

    def step_times(self) -> None:
        names = {kind: f"steps-{kind}{'' if self.compiled else '-eager'}" for kind in ("all", "kv")}
        for trainable, name in names.items():
            if self.folders.result(f"{name}-0").exists() or self._late("steps"):
                continue
            self._needs_base()
            student = Student("fusedkv", "copy", "distilled", trainable, 1.0, self.options.lr)
            steps = 20 if self.device.type == "cuda" else 2
            rows = measure_steps(
                self.folders, self.size, student, device=self.device, compiled=self.compiled, steps=steps
            )
            for i, row in reversed(list(enumerate(rows))):
                write_result(self.folders, f"{name}-{i}", row)
            torch._dynamo.reset()

    def students(self) -> None:
        rates = {"all": self.options.lr, "kv": self.options.kv_lr}
        listed = students(rates, self.options.train_seeds, self.options.percents)
        wanted = [student for student in listed if self._wanted(student.name)]
        if not wanted or self._late("students"):
            return
        self._needs_base()
        runner = Runner(
            self.folders,
            self.size,
            device=self.device,
            compiled=self.compiled,
            parallel=self.options.parallel,
            deadline=self.deadline,
        )
        left = runner.run(wanted)
        if runner.failed:
            raise UserError("; ".join(runner.failed))
        if left:
            self.unfinished.append(f"students ({left} of {len(wanted)})")

    def table(self) -> str:
        rows = read_rows(self.folders)
        found = {"size": dataclasses.asdict(self.size), "environment": environment(), "rows": rows}
        write_atomic(self.folders.out / "rows.json", json.dumps(found, indent=1) + "\n")
        text = report.markdown(rows)
        write_atomic(self.folders.out / "table.md", text)
        return text

    def run(self, steps: Sequence[str]) -> None:
        do = {"tokens": self.tokens, "base": self.base, "import": self.imported, "starts": self.starts}
        do |= {"steps": self.step_times, "students": self.students}
        for name, step in do.items():
            if ("all" in steps or name in steps) and not self.unfinished:
                step()


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 where time ran out."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    experiment = Experiment(options)
    try:
        experiment.run(options.step)
    finally:
        text = experiment.table()
    print(text, end="")
    if experiment.unfinished:
        print(f"time is up: {', '.join(experiment.unfinished)} not finished; the same command goes on", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
