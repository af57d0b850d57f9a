r"""Train a teacher from scratch, convert it to students with half and a quarter of its cache, and train those.

    python -m experiments.half_cache.scratch --corpus corpus/train-*.jsonl.xz --validation corpus/valid.jsonl.xz \
        --out runs/shares --stop-after 9m

Steps, in this order:

    tokens    a tokenizer trained on the corpus, and the corpus prepared with it; left out with --data
    teacher   mha, trained by train.py on all GPUs together
    students  those of `--students` on 5 % of the teacher's tokens, some at a time on each GPU
    seeds     more seeds of the best student at half of the cache and of the best at a quarter, and of the control

Work that is done is skipped. After `--stop-after`, and on SIGTERM, SIGHUP or Ctrl-C, everything that runs saves and the
command ends with status 3; the same command continues. OUT/results.json and OUT/table.md are written all the time.
Checkpoints of finished students are deleted, unless `--keep-checkpoints`. --tiny runs all of it on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cllm.arguments import Parser, number, whole_number
from cllm.config import ModelConfig
from cllm.counts import count_text
from cllm.data.manifest import Manifest
from cllm.errors import UserError, one_line
from cllm.files import check_replaceable, write_atomic
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.runs import RUN, RunFolder
from cllm.signals import stoppable
from experiments.half_cache.command import add_running, add_students, run_until_stopped
from experiments.half_cache.configs import check_config
from experiments.half_cache.runner import Devices, Experiment, config_of
from experiments.half_cache.settings import check_same
from experiments.half_cache.students import (
    HALF,
    KINDS,
    QUARTER,
    ROOT,
    Shape,
    Student,
    check_bytes,
    chosen_students,
)
from experiments.uptraining.base import make_tokens
from experiments.uptraining.setup import FULL, TINY, Folders, Size, claim

AGENDA = (
    *("control", "mla_4+fast_attention+attention_4", "gqa_4+fast_attention+attention_4"),
    *("kv_tie_gqa+slow_attention+attention_4", "kv_tie+slow_attention+attention", "gqa+fast_attention+attention"),
    *("mla+fast_attention+attention", "mla_4+fast_attention", "cla4+fast_attention+attention"),
    *("cla2+fast_attention+attention", "cla2_gqa+fast_attention+attention", "kv_tie_8+slow_attention+attention"),
    *("xmla_4+fast_attention+attention", "fusedkv+fast_attention+attention", "fusedkv_gqa+fast_attention+attention"),
    "acrosskv_4+fast_attention+attention",
)
"""Students of the default command, the most informative first, because time may run out."""
SIZES: dict[str, Size] = {
    "110m": dataclasses.replace(FULL, tokens=490_000_000, batch=128),
    "tiny": dataclasses.replace(TINY, uptrain_batch=2),
}
"""Teachers by name: shape, tokens, sequences of a step and rates; 110m is that of experiments.uptraining."""
_MICRO_BATCH = 32
"""Sequences that one GPU processes at once for the teacher, at most."""


def teacher_data(size: Size, out: Path, data: Path, *, gpus: int) -> dict[str, Any]:
    """A config of train.py for the teacher on prepared `data`, as plain data."""
    devices = max(gpus, 1)
    per_device = size.batch // devices
    micro = max(n for n in range(1, min(per_device, _MICRO_BATCH) + 1) if per_device % n == 0)
    return {
        "name": "teacher",
        "runs_dir": str(out),
        "model": {
            "d_model": size.d_model,
            "n_layers": size.n_layers,
            "n_heads": size.n_heads,
            "d_ff": size.d_ff,
            "max_seq_len": size.seq_len,
            "kv": {"preset": "mha"},
        },
        "data": {
            "path": str(data),
            "seq_len": size.seq_len,
            "num_workers": 4 if gpus else 0,
            "validation_sequences": size.validation_sequences,
        },
        "optim": {"lr": size.lr, "min_lr": size.lr / 10, "warmup_steps": max(size.steps // 20, 1)},
        "train": {
            "steps": size.steps,
            "global_batch": size.batch,
            "micro_batch": micro,
            "seed": size.base_seed,
            "accelerator": "gpu" if gpus else "cpu",
            "devices": devices,
            "validate_every": max(size.steps // 8, 1),
            "checkpoint_every": max(size.steps // 4, 1),
            "keep_checkpoints": 1,
        },
    }


class Scratch:
    """The steps of a command in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.size = options, size_of(options)
        self.folders = Folders(options.out)
        self.data: Path = options.data or self.folders.tokens
        self._check_steps()
        self.devices = Devices(
            options.out, cpu=options.device == "cpu", stop_after=options.stop_after, parallel=options.parallel
        )
        if self.size.batch % max(self.devices.gpus, 1):
            raise UserError(
                f"{self.devices.gpus} GPUs: they do not divide the teacher's {self.size.batch} sequences a step; set "
                "CUDA_VISIBLE_DEVICES to 1, 2, 4 or 8 of them"
            )
        model = ModelConfig.model_validate(self._teacher_data()["model"])
        teacher = options.out / "teacher"
        shape = Shape.of(model, teacher)
        for student in map(Student.parse, options.students or ()):
            check_bytes(student, model, shape, teacher)
            for start in student.starts(options.starts):
                config = config_of(student, start, self._student_options(), shape, gpu=self.devices.gpus > 0)
                check_config(student, config, model)
        if options.data and options.corpus:
            raise UserError("--data and --corpus: text is prepared already or is to be prepared; give one of them")
        if options.data:
            Manifest.read(options.data)
        elif not options.corpus and not self.folders.tokens.exists():
            raise UserError(
                "neither --corpus nor --data is given, and no tokens are prepared; name files of text or JSON lines, "
                "or a folder of prepared text"
            )

    def run(self) -> bool:
        """Run all steps until time is up; returns whether all are done."""
        if self.folders.size.exists():
            claim(self.folders, self.size)
        self._tokens()
        claim(self.folders, self.size)
        return not self.devices.late and self._teacher() and self._students()

    def _check_steps(self) -> None:
        """Raise `UserError` for a teacher or students with fewer tokens than those of one step."""
        size, students = self.size, self._student_options()
        step = size.batch * size.seq_len
        if size.tokens < step:
            raise UserError(
                f"--tokens {size.tokens}: less than a step of {size.batch} x {size.seq_len}; allowed: {step} or more"
            )
        if students.tokens < (step := students.batch * students.seq_len):
            raise UserError(
                f"--percent {students.percent:g}: of {size.tokens:,} tokens that is {students.tokens:,}, less than a "
                f"student's step of {students.batch} x {students.seq_len}; allowed: {100 * step / size.tokens:.2g} or "
                "more"
            )

    def _teacher_data(self) -> dict[str, Any]:
        return teacher_data(self.size, self.folders.out, self.data, gpus=self.devices.gpus)

    def _tokens(self) -> None:
        if not self.options.corpus:
            return
        manifest = make_tokens(self.folders, self.size, self.options.corpus, self.options.validation)
        tokens = manifest.split("train").tokens
        self.devices.log(
            f"tokens: {tokens:,} to train on, which the teacher reads {self.size.tokens / tokens:.1f} times; "
            f"{manifest.vocab_size:,} different ones"
        )

    def _teacher(self) -> bool:
        """Train the teacher; returns whether it is trained."""
        folder = RunFolder(self.folders.out / "teacher")
        if not folder.is_validated_at(self.size.steps):
            file = self.folders.out / "configs" / "teacher.yaml"
            data = self._teacher_data()
            if file.exists():  # the rest of `train` follows from the size, which is checked, and from the devices
                begun = yaml.safe_load(file.read_text(encoding="utf-8"))
                check_same(begun, data | {"train": begun["train"]}, file)
            else:
                write_atomic(file, yaml.safe_dump(data, sort_keys=False))
            self.devices.log(f"teacher: {self.size.steps:,} steps, the log is {self.folders.out / 'logs'}")
            command: list[str | Path] = [sys.executable, ROOT / "train.py", "--config", file, "--resume", "auto"]
            if not self.devices.run(command, "teacher", "train", None):
                return False
        loss = [row["val/loss"] for row in folder.metrics() if "val/loss" in row][-1]
        self.devices.log(f"teacher: loss {loss:.4f}")
        return True

    def _students(self) -> bool:
        options = self._student_options()
        students = chosen_students(self.options.students, AGENDA, options.teacher, self.devices.log)
        experiment = Experiment(options, self.devices, students)
        experiment.finished = None if self.options.keep_checkpoints else delete_checkpoints
        size = count_parameters(meta_decoder(experiment.model))
        experiment.name = f"mha of {count_text(float(f'{size:.3g}'))}, {count_text(self.size.tokens)} tokens"
        done = experiment.run()
        if self.devices.late:
            return False
        best = [best_of(experiment.write(), share) for share in (HALF, QUARTER)]
        chosen = [student for student in best if student is not None]
        controls = [s for s in students if s.kind == "control"]
        same = [s for s in controls if s.recipes in {c.recipes for c in chosen}]
        for seed in range(1, self.options.seeds):
            more = [dataclasses.replace(s, seed=seed) for s in (*chosen, *(same or controls))]
            experiment.students += [s for s in more if s not in experiment.students]
        return experiment.run() and done

    def _student_options(self) -> argparse.Namespace:
        size, o = self.size, self.options
        return argparse.Namespace(
            teacher=self.folders.out / "teacher",
            data=self.data,
            out=o.out,
            tokens=round(size.tokens * o.percent / 100),
            starts=o.starts,
            lr=size.uptrain_lr if o.lr is None else o.lr,
            batch=size.uptrain_batch if o.batch is None else o.batch,
            seq_len=size.seq_len,
            windows=size.validation_sequences,
            calibration=size.calibration_sequences,
            validations=4,
            percent=o.percent,
        )


def size_of(options: argparse.Namespace) -> Size:
    """The size that the arguments give."""
    size = dataclasses.replace(SIZES["tiny" if options.tiny else "110m"], base_seed=options.seed)
    return size if options.tokens is None else dataclasses.replace(size, tokens=options.tokens)


def best_of(rows: Sequence[dict[str, Any]], share: Any) -> Student | None:
    """The student with the lowest loss among those at `share` of the cache; None without one."""
    own = [row for row in rows if KINDS[row["kind"]].share == share and row.get("finished")]
    best = min(own, key=lambda row: row["loss"], default=None)
    return None if best is None else Student(best["kind"], tuple(best["recipes"]), best["seed"])


def delete_checkpoints(folder: RunFolder) -> None:
    """Delete the checkpoints of a finished run; its metrics and configs stay."""
    check_replaceable(folder.path, RUN)
    shutil.rmtree(folder.checkpoint_folder, ignore_errors=True)


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.half_cache.scratch", description=__doc__)
    add = parser.add_argument
    add("--corpus", nargs="+", default=[], metavar="FILE", help="text or JSON lines to train on, folders, globs")
    add("--validation", nargs="+", default=[], metavar="FILE", help="held out (default: 2 %% of the corpus)")
    add("--data", type=Path, metavar="PREPARED", help="prepared text, in place of --corpus")
    add("--out", type=Path, default=Path("runs/shares"), metavar="DIR", help="default: %(default)s")
    add_students(
        parser,
        defaults=" ".join(AGENDA),
        starts=("fit",),
        lr=f"{FULL.uptrain_lr:g}",
        batch=str(FULL.uptrain_batch),
    )
    add("--tiny", action="store_true", help="a teacher of a few thousand parameters")
    add("--tokens", type=whole_number(1), metavar="N", help="tokens of the teacher (default: 490,000,000)")
    add("--seed", type=whole_number(0), default=0, metavar="N",
        help="of the teacher's first weights and order of the text (default: %(default)s)")  # fmt: skip
    add("--percent", type=number(above=0, up_to=100), default=5.0, metavar="P",
        help="of them for each student (default: %(default)s)")  # fmt: skip
    add("--seeds", type=whole_number(1), default=3, metavar="N", help="of the best students (default: %(default)s)")
    add("--keep-checkpoints", action="store_true", help="of finished students")
    add_running(parser)
    return parser


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 after a failure, 3 if time ran out."""
    options = parser().parse_args(arguments)
    scratch = Scratch(options)
    return run_until_stopped(options.out, scratch.devices, scratch.run)


if __name__ == "__main__":
    sys.exit(main())
