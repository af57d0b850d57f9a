"""Train under several strategies and numbers of GPUs; compare tokens a second and the cost of communication.

    python -m benchmarks.scaling --cases benchmarks/scaling/node.yaml --text data/prepared/stdlib \\
      --minutes 9 --out node.json
    python -m benchmarks.scaling --config configs/bench/374m.yaml --runs single:1 ddp:2 zero1:2
    python -m benchmarks.scaling --config configs/model/4b.yaml --config configs/kv/fusedkv.yaml \\
      --runs zero2:1 zero3:2 --steps 50 --out 4b.json

Each run is an ordinary training run without validation and checkpoints. Every device takes the same micro-batches in a
step, so a step of N devices has N times the tokens (weak scaling). Times are medians without the first rows of metrics,
in which blocks compile. The last steps of each run are profiled and not timed. Runs that need fewer GPUs than the
machine has run side by side on different GPUs. With --minutes, the same command goes on with the runs that are left,
if it has the same --out. Settings such as --train.fp8 tensorwise go to every run.
"""

from __future__ import annotations

import argparse
import json
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
from benchmarks.scaling.launch import Launched, start, startable
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


def earlier_results(known: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """`known` with the rows that an earlier command has written to `out`, whose runs are not repeated.

    Raises:
        UserError: if these are of another machine, version of torch, configs or settings.
    """
    known = json.loads(json.dumps(known)) | {"rows": [], "commands": []}  # as it is read from the file
    if out is not None and out.exists():
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
            before = {key: found["environment"].get(key) for key in ("torch", "gpus")} | {"settings": found["settings"]}
            groups = {group["name"]: group for group in found["groups"]}
            configs, rows, commands = found["configs"], found["rows"], found["commands"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--out {out}: not results of this command ({error!r}); choose another file") from None
        now = {key: known["environment"].get(key) for key in ("torch", "gpus")} | {"settings": known["settings"]}
        for group in known["groups"]:
            name = group["name"]
            before |= {f"the group {name}": (groups.get(name, group), configs.get(name, known["configs"][name]))}
            now |= {f"the group {name}": (group, known["configs"][name])}
        if differ := [key for key in now if before[key] != now[key]]:
            raise UserError(f"--out {out}: has results with another value of {differ[0]}; choose another file")
        known["groups"] = list((groups | {group["name"]: group for group in known["groups"]}).values())
        known |= {"configs": configs | known["configs"], "rows": rows, "commands": commands}
    known["commands"] = [*known["commands"], known["environment"]["command"]]
    return known


def run_all(jobs: list[Job], options: argparse.Namespace, devices: int, record: Record, deadline: float) -> list[str]:
    """Run jobs, side by side if the GPUs allow it. Runs under way at the deadline are ended.

    `record` gets the rows of runs that succeeded, and under `failed` the errors of the others. It is written after each
    run.

    Returns:
        The names of the runs for which time was up.
    """
    waiting, running = list(jobs), list[tuple[Job, Launched]]()
    free = list(range(devices))
    late_ones: list[str] = []
    failed: dict[str, str] = {}
    record.results |= {"failed": failed}
    order = {job.case.name: n for n, job in enumerate(jobs)}
    try:
        while waiting or running:
            chosen = startable([job.case.devices for job in waiting], len(free), idle=not running)
            if options.alone:
                chosen = [] if running else chosen[:1]
            for job in [waiting[position] for position in chosen]:
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
                name = job.case.name
                running.remove((job, launched))
                free += launched.gpus
                if status == 0:
                    row = summarise(job.case, job.config, RunFolder(Path(job.config.runs_dir) / name))
                    record.rows.append(row | {"seconds": round(launched.seconds, 1)})
                    record.rows.sort(key=lambda row: order.get(row["name"], -1))
                else:
                    late_ones += [name] if late else []
                    failed[name] = f"{'time was up' if late else f'status {status}'}\n{launched.tail()}"
                    print(f"{name} failed, {failed[name]}\n", file=sys.stderr, flush=True)
                record.write()
            if late:
                late_ones += [job.case.name for job in waiting]
                failed |= {job.case.name: "time was up" for job in waiting}
                waiting = []
                record.write()
    finally:
        for _, launched in running:
            launched.poll(end=True)
    return late_ones


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
    add("--out", type=Path, metavar="FILE", help="write the numbers as JSON, after every run; runs that a file of an "
        "earlier command has are not repeated")  # fmt: skip
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
@stoppable(kept="with the same --out, the same command makes the runs that are left")
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a run failed."""
    begun = time.monotonic()
    options, overrides = make_parser().parse_known_args(argv)
    groups = groups_of(options)
    devices = torch.cuda.device_count() or 8  # without a GPU, processes on the CPU
    jobs = plan_jobs(groups, overrides, options, devices)
    if not jobs:
        raise UserError(f"no run to make: none of the cases fits on {devices} GPUs, or --text is missing")
    configs = {group.name: load_config(group.config, [*group.settings, *overrides]) for group in groups}
    known: dict[str, Any] = {"environment": environment(), "settings": overrides}
    known["groups"] = [group.model_dump() for group in groups]
    known["configs"] = {name: config.as_yaml_data() for name, config in configs.items()}
    record = Record(earlier_results(known, options.out), options.out)
    done = {row["name"] for row in record.rows}
    left = [job for job in jobs if job.case.name not in done]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs are in {options.out} already", file=sys.stderr, flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    write_data(left, options.profile)
    late = run_all(left, options, devices, record, begun + 60 * options.minutes)
    for group in groups:
        if rows := [row for row in record.rows if row["group"] == group.name]:
            print(f"\n{group.name}")
            print(loss_table(rows) if group.micro_batches is None else table(rows))
    if late:
        more = (
            "; the same command makes them" if options.out else "; with --out, the same command could make them later"
        )
        print(f"time was up for {len(late)} of {len(jobs)} runs{more}", file=sys.stderr)
    return 1 if record.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
