"""Train under several strategies and numbers of GPUs; compare tokens a second and the cost of communication.

    python -m benchmarks.scaling --cases benchmarks/scaling/node.yaml --text data/prepared/stdlib \\
      --minutes 9 --out node.json
    python -m benchmarks.scaling --config configs/bench/374m.yaml --runs single:1 ddp:2 zero1:2
    python -m benchmarks.scaling --config configs/model/4b.yaml --config configs/kv/fusedkv.yaml \\
      --runs zero2:1 zero3:2 --steps 50 --out 4b.json

Each run is an ordinary training run without validation and checkpoints. Every device takes the same micro-batches in a
step, so a step of N devices has N times the tokens (weak scaling). Times are medians without the first rows of metrics,
in which blocks compile. The last steps of each run are profiled and not timed. Runs that need fewer GPUs than the
machine has run side by side on different GPUs. Settings such as --train.fp8 tensorwise go to every run.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.record import Record
from benchmarks.scaling.cases import Case, Cases, Group, cases_of, load_case
from benchmarks.scaling.launch import Launched, start
from benchmarks.scaling.table import loss_table, summarise, table
from cllm.config import Config
from cllm.config.load import ConfigParser, config_parser, read_yaml, validate
from cllm.data.manifest import MANIFEST, TOKENIZER, Counts, Manifest, tokenizer_sha256
from cllm.data.prepare.shards import ShardWriter
from cllm.environment import environment
from cllm.errors import UserError, one_line
from cllm.runs import RunFolder
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config

EOS, DOCUMENT = 0, 2048


def write_random_tokens(folder: Path, vocab_size: int, tokens: int) -> None:
    """Write a prepared folder of uniformly random tokens in documents of 2048, with a placeholder tokenizer."""
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    Tokenizer(WordLevel({"<eos>": EOS}, unk_token="<eos>")).save(str(folder / TOKENIZER / "tokenizer.json"))
    draw = np.random.default_rng(0)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 2**16 else "uint32"
    splits = {}
    for split, size in (("train", tokens), ("validation", DOCUMENT)):
        writer = ShardWriter(folder, split, dtype, shard_tokens=2**28)
        for _ in range(-(-size // DOCUMENT)):
            document = draw.integers(1, vocab_size, DOCUMENT)
            document[-1] = EOS
            writer.add(document, 4 * DOCUMENT)
        splits[split] = writer.finish()
    Manifest(
        name="random",
        dtype=dtype,
        vocab_size=vocab_size,
        eos_id=EOS,
        tokenizer_sha256=tokenizer_sha256(folder / TOKENIZER),
        splits=splits,
        counts=Counts(),
        recipe={"random_tokens": tokens},
        source_sha256="",
        versions={name: version(name) for name in ("tokenizers", "numpy")},
    ).save(folder)


@dataclass(frozen=True)
class Job:
    """A case with the config of its run."""

    case: Case
    config: Config


def write_data(jobs: list[Job], profiled: int) -> None:
    """Write random tokens for the runs that train on them, one folder per vocabulary."""
    most: dict[Path, tuple[int, int]] = {}
    for job in jobs:
        config = job.config
        if job.case.group.data == "random":
            assert config.model.vocab_size is not None
            sequences = (job.case.group.steps + profiled) * config.train.global_batch + 1
            path = Path(config.data.main_folder)
            most[path] = (config.model.vocab_size, max(most.get(path, (0, 0))[1], sequences * config.data.seq_len))
    for path, (vocab_size, tokens) in most.items():
        # 12 million tokens are enough: a run that needs more reads them again, which takes the same time.
        write_random_tokens(path, vocab_size, min(tokens, 12_000_000))


def plan_jobs(groups: list[Group], overrides: list[str], options: argparse.Namespace, devices: int) -> list[Job]:
    """Every case with its config, checked before the first run starts.

    Raises:
        UserError: for invalid settings.
    """
    work = options.work.resolve()
    jobs = []
    for case in cases_of(groups, devices):
        group = case.group
        if -(-group.steps // group.log_every) <= group.skip_rows:
            raise UserError(
                f"{group.name}: {group.steps} steps with a row every {group.log_every} give no more rows than the "
                f"{group.skip_rows} that are left out; raise --steps"
            )
        base = load_config(group.config, [*group.settings, *overrides])
        if base.model.vocab_size is None:
            raise UserError(f"{group.name}: model.vocab_size is null, and tokens are drawn from it; allowed: a number")
        if group.data == "text" and options.text is None:
            continue
        data = options.text.resolve() if group.data == "text" else work / f"tokens-{base.model.vocab_size}"
        jobs.append(Job(case, load_case(case, overrides, runs_dir=work, data=data, profiled=options.profile)))
    return jobs


def run_all(jobs: list[Job], options: argparse.Namespace, devices: int, record: Record) -> None:
    """Run jobs, side by side if the GPUs allow it. Runs under way when --minutes are over are ended.

    `record` gets the rows of runs that succeeded, and under `failed` the errors of the others. It is written after each
    run.
    """
    deadline = time.monotonic() + 60 * options.minutes
    waiting, running = list(jobs), list[tuple[Job, Launched]]()
    free = list(range(devices))
    failed: dict[str, str] = {}
    record.results |= {"rows": [], "failed": failed}
    order = {job.case.name: n for n, job in enumerate(jobs)}
    try:
        while waiting or running:
            for job in [job for job in waiting if not options.alone or not running]:
                if job.case.devices > len(free) or (options.alone and running):
                    continue
                gpus, free = free[: job.case.devices], free[job.case.devices :]
                print(f"{job.case.name} on {', '.join(map(str, gpus))} ...", file=sys.stderr, flush=True)
                running.append((job, start(job.config, gpus, options.profile, options.timeout)))
                waiting.remove(job)
            time.sleep(0.2)
            late = time.monotonic() > deadline
            for job, launched in list(running):
                status = launched.poll(end=late)
                if status is None:
                    continue
                running.remove((job, launched))
                free += launched.gpus
                if status == 0:
                    folder = RunFolder(Path(job.config.runs_dir) / job.case.name)
                    record.rows.append(summarise(job.case, job.config, folder))
                    record.rows.sort(key=lambda row: order[row["name"]])
                else:
                    why = "time was up" if late else f"status {status}"
                    failed[job.case.name] = f"{why}\n{launched.tail()}"
                    print(f"{job.case.name} failed, {failed[job.case.name]}\n", file=sys.stderr, flush=True)
                record.write()
            if late:
                failed |= {job.case.name: "time was up" for job in waiting}
                waiting = []
    finally:
        for _, launched in running:
            launched.poll(end=True)


def make_parser() -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "")
    parser.prog = "python -m benchmarks.scaling"
    add = parser.add_argument
    add(
        "--cases", type=Path, metavar="FILE", help="groups of runs, as in benchmarks/scaling/node.yaml; replaces --runs"
    )
    add("--only", nargs="+", metavar="GROUP", help="of --cases, only these groups")
    add("--runs", nargs="+", default=["single:1", "ddp:2"], metavar="STRATEGY:DEVICES", help="(default: %(default)s)")
    add("--steps", type=int, default=40, help="timed optimizer steps of a run (default %(default)s)")
    add("--log-every", type=int, default=5, help="steps of a row of metrics (default %(default)s)")
    add("--skip-rows", type=int, default=2, help="first rows to leave out (default %(default)s)")
    add("--accumulate", type=int, default=1, help="micro-batches of a step (default %(default)s)")
    add("--profile", type=int, default=2, metavar="N", help="profile N further steps of each run (default %(default)s)")
    add("--alone", action="store_true", help="one run at a time, even if several fit on the machine")
    add("--text", type=Path, metavar="FOLDER", help="prepared data for the groups that train on text; they are left "
        "out without it")  # fmt: skip
    add("--work", type=Path, default=Path("runs/scaling"), metavar="DIR", help="for runs, logs, random tokens")
    add("--timeout", type=float, default=900, metavar="S", help="seconds a run may take (default %(default)s)")
    add("--minutes", type=float, default=1e6, metavar="M", help="end after M minutes with the results so far")
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON, after every run")
    return parser


def groups_of(options: argparse.Namespace) -> list[Group]:
    """The groups of --cases, or one group of --runs."""
    if options.cases:
        groups = validate(Cases, read_yaml(options.cases)).groups
        return [group for group in groups if not options.only or group.name in options.only]
    files = options.config or ["configs/bench/374m.yaml"]
    return [
        Group(
            name="runs",
            config=[str(Path(file).resolve()) for file in files],
            runs=options.runs,
            steps=options.steps,
            log_every=options.log_every,
            skip_rows=options.skip_rows,
            micro_batches=options.accumulate,
        )
    ]


@one_line
@stoppable()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a run failed."""
    options, overrides = make_parser().parse_known_args(argv)
    groups = groups_of(options)
    devices = torch.cuda.device_count() or 8  # without a GPU, processes on the CPU
    jobs = plan_jobs(groups, overrides, options, devices)
    if not jobs:
        raise UserError(f"no run to make: none of the cases fits on {devices} GPUs, or --text is missing")
    options.work.mkdir(parents=True, exist_ok=True)
    write_data(jobs, options.profile)
    configs = {group.name: load_config(group.config, [*group.settings, *overrides]) for group in groups}
    known: dict[str, Any] = {"environment": environment(), "settings": overrides}
    known["groups"] = [group.model_dump() for group in groups]
    known["configs"] = {name: config.as_yaml_data() for name, config in configs.items()}
    record = Record(known, options.out)
    run_all(jobs, options, devices, record)
    for group in groups:
        if rows := [row for row in record.rows if row["group"] == group.name]:
            print(f"\n{group.name}")
            print(loss_table(rows) if group.micro_batches is None else table(rows))
    return 1 if record.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
