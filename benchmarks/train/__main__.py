"""Time training steps on random tokens: designs of this project and, with --peers, other trainers at the same shape.

    python -m benchmarks.train --config configs/bench/374m.yaml --designs mha fusedkv --peers --out bench.json

All contenders live on one GPU and take turns, round after round, so that clocks and heat are the same for all. If they
do not fit in its memory together, --swap keeps those that are not being measured in CPU memory. Each does the same
work: bf16 autocast over fp32 weights, forward, backward, clipping at norm 1, the optimizer of `optim:`; with
--accumulate, several micro-batches a step. Times of steps are those between device events. Prints a table (median,
spread over rounds, tokens a second, MFU, peak memory, time as a multiple of the first contender's) and writes JSON with
versions, commit, clocks, and the kernels that were chosen. --fp8 adds the first design with fp8 products. That is other
arithmetic, so it has its own table, with MFU against the bf16 peak as elsewhere.

--one-by-one builds, measures and frees each design beside the first one, for more designs than memory has room for: the
file has a row after each, a design that fails does not end the others, and none starts after --time-limit.

--train.accelerator cpu tries everything out on a CPU; times there mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import KEPT, Record
from benchmarks.train.contender import Batches, Contender, on_device
from benchmarks.train.designs import design, device_of, random_batches, with_documents
from benchmarks.train.measure import measure, profile, warm_up
from benchmarks.train.one_by_one import OneByOne
from benchmarks.train.peers import check_peers, hf_liger, litgpt_compiled
from benchmarks.train.report import print_rows, rows_of
from cllm.config import Config
from cllm.config.designs import parse_plan
from cllm.config.load import ConfigParser, config_parser
from cllm.environment import clocks, environment
from cllm.errors import UserError, one_line
from cllm.signals import stoppable
from cllm.train.float8 import check_float8
from cllm.uptrain.complete import load_config


class Choices(logging.Handler):
    """Prints and stores the log lines about what was chosen: attention backends, the loss, and why."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        print(self.lines[-1], file=sys.stderr, flush=True)

    @classmethod
    def collect(cls) -> Choices:
        """Receive all log lines of cllm from now on."""
        choices, logger = cls(), logging.getLogger("cllm")
        logger.handlers, logger.propagate = [choices], False
        logger.setLevel(logging.INFO)
        return choices


def make_parser() -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "")
    parser.prog = "python -m benchmarks.train"
    add = parser.add_argument
    add("--designs", nargs="+", default=["mha"], metavar="NAME[:KEY=VALUE,...]", help="files of configs/kv/, and "
        "settings of model.kv on top of them")  # fmt: skip
    add("--peers", action="store_true", help="also litgpt compiled and Hugging Face + Liger")
    add("--documents", type=int, metavar="TOKENS", help="also the first design on packed documents of this mean length")
    add(
        "--fp8",
        nargs="?",
        const="tensorwise",
        metavar="SCALES",
        help="also the first design with train.fp8 set to this (tensorwise)",
    )
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (default 1)")
    add("--swap", action="store_true", help="keep contenders in CPU memory while another one is measured")
    add("--one-by-one", action="store_true", help="only the first design and one other in memory at a time")
    add(
        "--time-limit", type=float, default=math.inf, metavar="SECONDS", help="with --one-by-one: start no design after"
    )
    add("--rounds", type=int, default=4, help="turns of each contender (default 4)")
    add("--steps", type=int, default=6, help="timed steps of a turn (default 6)")
    add("--warmup", type=int, default=4, help="steps before the first turn (default 4)")
    add("--profile", action="store_true", help="print where the kernel time of each contender goes")
    add("--out", metavar="FILE", help="write the numbers as JSON")
    return parser


def check(config: Config) -> None:
    """Refuse settings that this benchmark would ignore.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    train, device = config.train, device_of(config)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmarks.train times a GPU, and torch sees none here")
    if train.precision == "fp32":
        raise UserError("train.precision is fp32, and benchmarks.train times bf16 autocast; allowed: auto, bf16")
    if train.strategy not in ("auto", "single"):
        raise UserError(
            f"train.strategy is {train.strategy}, and benchmarks.train times one device; allowed: auto, single; "
            "benchmarks.scaling compares strategies"
        )
    if config.data.document_mask:
        raise UserError(
            "data.document_mask is true, and benchmarks.train draws its tokens; allowed: false; see --documents"
        )
    check_float8(config, "cpu" if device.type == "cpu" else "gpu")


@dataclass
class TrainBenchmark:
    """Contenders on their batches, and the record of their times."""

    contenders: list[Contender]
    """Those in bf16; the others are compared with the first one."""
    in_fp8: list[Contender]
    batches: Batches
    swap: bool
    record: Record
    choices: Choices

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return sum(ids.numel() for ids, _ in self.batches[0])

    def warm_up(self, steps: int) -> list[Contender]:
        """Warm all contenders up; those that do not fit in memory are removed and returned.

        Raises:
            UserError: if the first contender does not fit.
        """
        dropped: list[Contender] = []
        for contender in (*self.contenders, *self.in_fp8):
            with on_device(contender, self.swap):
                if not warm_up(contender, self.batches, steps):
                    dropped.append(contender)
            print(f"warm: {contender.name}", file=sys.stderr, flush=True)
            if self.contenders[0] in dropped:
                raise UserError(
                    f"{self.contenders[0].name}, which the others are compared with, does not fit in memory beside "
                    "them; give fewer --designs or a smaller --train.micro_batch"
                )
        self.contenders = [c for c in self.contenders if c not in dropped]
        self.in_fp8 = [c for c in self.in_fp8 if c not in dropped]
        self.record.results["out_of_memory"] = [c.name for c in dropped]
        return dropped

    def measure(self, rounds: int, steps: int) -> None:
        """Give every contender a turn of `steps` steps in each round; the record is written after every round."""
        before, results = clocks(), self.record.results
        device = self.batches[0][0][0].device
        for turn in range(rounds):
            for contender in (*self.contenders, *self.in_fp8):
                with on_device(contender, self.swap):
                    if self.swap:
                        warm_up(contender, self.batches, 1)
                    measure(contender, self.batches, steps)
            results["clocks"] = [before, clocks()]
            results["chosen"] = self.choices.lines
            results["rows"] = rows_of(self.contenders, self.contenders[0], self.tokens, device)
            results["rows_fp8"] = rows_of(self.in_fp8, self.contenders[0], self.tokens, device)
            self.record.write()
            print(f"turn {turn + 1} of {rounds}", file=sys.stderr, flush=True)

    def profile(self) -> None:
        """Profile a step of every contender."""
        profiles: dict[str, dict[str, float]] = {}
        self.record.results["profile_ms"] = profiles
        for contender in (*self.contenders, *self.in_fp8):
            print(contender.name)
            with on_device(contender, self.swap):
                profiles[contender.name] = profile(contender, self.batches)
        self.record.write()


def build_contenders(
    options: argparse.Namespace, configs: dict[str, Config], fp8_configs: dict[str, Config]
) -> tuple[list[Contender], list[Contender]]:
    """The contenders in bf16 and in fp8; with --swap in CPU memory."""

    def placed(contender: Contender) -> Contender:
        if options.swap:
            contender.move_to_cpu()
        return contender

    contenders = [placed(design(name, config)) for name, config in configs.items()]
    first = next(iter(configs.values()))
    if options.peers:
        flops = contenders[0].flops_per_token
        contenders += [placed(build(first, flops)) for build in (litgpt_compiled, hf_liger)]
    if options.documents:
        contenders.insert(1, with_documents(contenders[0], first, options.documents))
    return contenders, [placed(design(name, config)) for name, config in fp8_configs.items()]


def design_config(word: str, files: Sequence[str], overrides: Sequence[str]) -> Config:
    """The config of a word of --designs.

    Raises:
        UserError: for an unknown name, and for settings that its plan does not have.
    """
    file, settings = parse_plan(word)
    plan = [part for key, value in settings.items() for part in (f"--model.kv.{key}", value)]
    return load_config([*files, file], [*overrides, *plan])


def check_one_by_one(options: argparse.Namespace) -> None:
    """Refuse options that do not go with --one-by-one, and a time limit without it."""
    if not options.one_by_one:
        if options.time_limit != math.inf:
            raise UserError(f"--time-limit is {options.time_limit:g} without --one-by-one; allowed: both")
        return
    for name in ("peers", "documents", "fp8", "swap", "profile"):
        if getattr(options, name):
            raise UserError(f"--one-by-one and --{name}: allowed: one of them")


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options, overrides = make_parser().parse_settings(argv)
    files = options.config or ["configs/bench/374m.yaml"]
    configs = {word: design_config(word, files, overrides) for word in options.designs}
    fp8_configs: dict[str, Config] = {}
    if options.fp8:
        name = options.designs[0]
        fp8_configs[f"{name}, fp8"] = design_config(name, files, [*overrides, "--train.fp8", options.fp8])
    first = next(iter(configs.values()))
    for config in (*configs.values(), *fp8_configs.values()):
        check(config)
    if options.accumulate < 1:
        raise UserError(f"--accumulate is {options.accumulate}; allowed: 1 or more")
    if options.swap and device_of(first).type == "cpu":
        raise UserError("--swap moves contenders out of a GPU's memory, and train.accelerator is cpu")
    if options.peers:
        check_peers(first)
    check_one_by_one(options)
    choices = Choices.collect()
    if options.one_by_one:
        return measure_one_by_one(options, configs, choices)
    contenders, in_fp8 = build_contenders(options, configs, fp8_configs)
    batches = random_batches(first, options.accumulate)
    record = new_record(options, configs | fp8_configs)
    benchmark = TrainBenchmark(contenders, in_fp8, batches, options.swap, record, choices)
    record.results["tokens_per_step"] = benchmark.tokens
    dropped = benchmark.warm_up(options.warmup)
    benchmark.measure(options.rounds, options.steps)
    if options.profile:
        benchmark.profile()
    print_rows(record.results["rows"])
    if benchmark.in_fp8:
        print("\nfp8 products, MFU against the bf16 peak:")
        print_rows(record.results["rows_fp8"])
    for contender in dropped:
        print(f"{contender.name}: out of memory beside the others; run it with fewer of them")
    return 0


def new_record(options: argparse.Namespace, configs: dict[str, Config]) -> Record:
    """The record before the first measurement."""
    known: dict[str, Any] = {"environment": environment()}
    known["settings"] = {"micro_batches": options.accumulate, "swap": options.swap}
    known["configs"] = {name: config.as_yaml_data() for name, config in configs.items()}
    return Record(known, Path(options.out) if options.out else None)


def measure_one_by_one(options: argparse.Namespace, configs: dict[str, Config], choices: Choices) -> int:
    """Measure, print the table and what is missing; returns the exit status: 1 if a design is missing."""
    record = new_record(options, configs)
    record.results["settings"]["one_by_one"] = True
    record.results["chosen"] = choices.lines
    batches = random_batches(next(iter(configs.values())), options.accumulate)
    benchmark = OneByOne(
        configs, batches, record, options.time_limit, warmup=options.warmup, rounds=options.rounds, steps=options.steps
    )
    record.results["tokens_per_step"] = benchmark.tokens
    benchmark.run()
    print_rows(record.rows)
    results = record.results
    for name, text in results["failed"].items():
        print(f"{name} failed: {text}")
    for name in results["out_of_memory"]:
        print(f"{name}: out of memory beside {next(iter(configs))}")
    if results["not_measured"]:
        print(f"not measured, the time limit came first: {' '.join(results['not_measured'])}")
    return int(bool(results["failed"] or results["out_of_memory"] or results["not_measured"]))


if __name__ == "__main__":
    sys.exit(main())
