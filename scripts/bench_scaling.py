#!/usr/bin/env python
"""Train the same config under several strategies and numbers of GPUs, and compare tokens a second.

    python scripts/bench_scaling.py --config configs/bench/374m.yaml --runs single:1 ddp:2 zero1:2 --random-tokens
    python scripts/bench_scaling.py --config configs/model/4b.yaml --config configs/kv/fusedkv.yaml \\
      --runs zero2:1 zero3:2 --steps 50 --random-tokens --out 4b.json

Each run is train.py itself, one after another, without validation and checkpoints. Every device takes
`train.micro_batch` sequences at once, so a step of N devices has N times the tokens (weak scaling), and there is no
accumulation unless --accumulate asks for it. The first rows of metrics, in which blocks compile, are left out; the rest
gives the median. Settings such as --train.fp8 tensorwise go to every run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm import cli
from cllm.config import Config
from cllm.data.manifest import MANIFEST, TOKENIZER, Counts, Manifest, tokenizer_sha256
from cllm.data.prepare.shards import ShardWriter
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.runs import RunFolder
from cllm.train.breakdown import PARTS
from cllm.train.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RATE = "throughput/tokens_per_s"
EOS, DOCUMENT = 0, 2048


@dataclass(frozen=True)
class Case:
    """A strategy on a number of devices of this machine."""

    place: int
    """From 1 in the order given: a case may come twice."""
    strategy: str
    devices: int

    @property
    def name(self) -> str:
        return f"{self.place}-{self.strategy}-x{self.devices}"


def parse_case(place: int, word: str) -> Case:
    """`zero1:2` as a `Case`. Raises `UserError`; whether the strategy exists is the config's to say."""
    match = re.fullmatch(r"([a-z0-9]+):([1-9][0-9]*)", word)
    if match is None:
        raise UserError(f"--runs {word}: not of the form STRATEGY:DEVICES, as in zero1:2")
    return Case(place, match[1], int(match[2]))


def write_random_tokens(folder: Path, vocab_size: int, tokens: int) -> None:
    """A prepared folder of uniformly drawn tokens in documents of 2048, and a tokenizer that knows none of them."""
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


def settings(case: Case, config: Config, work: Path, steps: int, log_every: int, accumulate: int) -> list[str]:
    """What a case adds to the command line of train.py."""
    values = {
        "name": case.name,
        "runs_dir": work,
        "train.strategy": case.strategy,
        "train.devices": case.devices,
        "train.global_batch": config.train.micro_batch * case.devices * accumulate,
        "train.steps": steps,
        "optim.warmup_steps": min(config.optim.warmup(steps), steps),
        "train.log_every": log_every,
        "train.validate_every": "null",
        "train.checkpoint_every": "null",
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def run(arguments: list[str], log_file: Path, timeout: float) -> int:
    """train.py with its output in a file; its exit status, 124 after `timeout` seconds. Leaves no process behind."""
    with log_file.open("w", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the other devices' processes, if the first one failed
            process.wait()


def summarise(case: Case, rows: list[dict[str, Any]], skip: int) -> dict[str, Any]:
    """A line of the table from a run's metrics, of which the first `skip` rows are left out."""
    kept = [row for row in rows if RATE in row][skip:]

    def median(tag: str) -> float | None:
        values = [row[tag] for row in kept if row.get(tag) is not None]
        return statistics.median(values) if values else None

    rates = [row[RATE] for row in kept]
    return {
        "strategy": case.strategy,
        "devices": case.devices,
        "rows": len(kept),
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "mfu": median("throughput/mfu"),
        "peak_gib": max(row["memory/peak_gib"] for row in kept),
        "data_wait": median("throughput/data_wait"),
        "parts_ms": {part: median(f"time/{part}_ms") for part in PARTS},
        "loss": kept[-1]["train/loss"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The lines that succeeded, each against the first of them."""
    head = f"{'strategy':<10}{'devices':>7}{'tokens/s':>11}{'spread':>20}{'ratio':>7}{'a device':>9}"
    head += f"{'MFU':>7}{'GiB':>7}"
    lines = [head + "".join(f"{part.replace('_', ' '):>11}" for part in PARTS) + f"{'loss':>9}"]
    for row in found:
        ratio = row["tokens_per_s"] / found[0]["tokens_per_s"]
        low, high = row["tokens_per_s_range"]
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        lines.append(
            f"{row['strategy']:<10}{row['devices']:>7}{row['tokens_per_s']:>11,.0f}{f'{low:,.0f}..{high:,.0f}':>20}"
            f"{ratio:>7.3f}{ratio * found[0]['devices'] / row['devices']:>9.3f}{mfu:>7}{row['peak_gib']:>7.1f}"
            + "".join(f"{row['parts_ms'][part]:>8.1f} ms" for part in PARTS)
            + f"{loss:>9}"
        )
    return "\n".join(lines)


@one_line
def main(argv: list[str] | None = None) -> int:
    parser = cli.config_parser(Config, __doc__ or "")
    parser.add_argument("--runs", nargs="+", default=["single:1", "ddp:2"], metavar="STRATEGY:DEVICES")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (default 40)")
    parser.add_argument("--log-every", type=int, default=5, help="steps of a row of metrics (default 5)")
    parser.add_argument("--skip-rows", type=int, default=2, help="first rows to leave out (default 2)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step (default 1)")
    parser.add_argument("--random-tokens", action="store_true", help="train on drawn tokens and not on data.path")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), metavar="DIR", help="for runs, logs, tokens")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds a run may take (default 900)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    arguments, overrides = parser.parse_known_args(argv)
    files = arguments.config or ["configs/bench/374m.yaml"]
    work = arguments.work.resolve()
    if -(-arguments.steps // arguments.log_every) <= arguments.skip_rows:
        raise UserError(
            f"--steps {arguments.steps} with --log-every {arguments.log_every} gives no more rows than --skip-rows "
            f"{arguments.skip_rows} leaves out; raise --steps"
        )
    base = cli.load(Config, files, overrides)
    if arguments.random_tokens:
        if base.model.vocab_size is None:
            raise UserError("model.vocab_size is null, and --random-tokens draws from it; allowed here: a number")
        overrides = [*overrides, "--data.path", str(work / "random-tokens")]
    given = [word for file in files for word in ("--config", str(Path(file).resolve()))]
    lines = {}
    for case in itertools.starmap(parse_case, enumerate(arguments.runs, start=1)):
        added = settings(case, base, work, arguments.steps, arguments.log_every, arguments.accumulate)
        cli.load(Config, files, [*overrides, *added])  # told before the first run starts
        lines[case] = [*given, *overrides, *added]
    work.mkdir(parents=True, exist_ok=True)
    if arguments.random_tokens:
        sequences = arguments.steps * arguments.accumulate * base.train.micro_batch * max(c.devices for c in lines)
        assert base.model.vocab_size is not None
        write_random_tokens(work / "random-tokens", base.model.vocab_size, (sequences + 1) * base.data.seq_len)
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for case, words in lines.items():
        log_file = work / f"{case.name}.log"
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        status = run([*words, "--overwrite"], log_file, arguments.timeout)
        if status == 0:
            found.append(summarise(case, list(RunFolder(work / case.name).metrics()), arguments.skip_rows))
            continue
        tail = "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        failed[case.name] = f"status {status}\n{tail}"
        print(f"{case.name} failed, {failed[case.name]}\n", file=sys.stderr, flush=True)
    if found:
        print(table(found))
    if arguments.out:
        told: dict[str, Any] = {"environment": environment(), "config": base.as_yaml_data(), "settings": overrides}
        told |= {"steps": arguments.steps, "accumulate": arguments.accumulate, "rows": found, "failed": failed}
        write_atomic(arguments.out, json.dumps(told, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
