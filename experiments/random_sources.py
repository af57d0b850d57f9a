r"""Train models with and without random sources, and measure each at 100, 50 and 25 % of its cache.

    python -m experiments.random_sources --corpus corpus/train-00.jsonl.xz --validation corpus/valid.jsonl.xz \
        --out runs/random_sources

For each seed this trains an mha model of 8 layers, the teacher, and continues it on a few percent of its tokens with
next-token loss: without random sources, with those of R-CLA (arXiv 2604.22782), and with those of cllm's default.
Another model has random sources from its first step. Every model then starts a run for each share of the cache
(`init.method: copy`), in which a layer without keys and values reads the nearest lower owner: its loss before any
training, and after a short adaptation. OUT/results.json and OUT/table.md are written after every run. After Ctrl-C,
SIGTERM or SIGHUP the same command continues. docs/plans.md has results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from cllm.arguments import Parser, number, whole_number
from cllm.commands.tradeoff import is_finished
from cllm.config import Config
from cllm.config.load import validate
from cllm.environment import versions
from cllm.errors import EXIT_STOPPED, one_line
from cllm.files import write_atomic
from cllm.lock import locked
from cllm.runs import RunFolder
from cllm.signals import stoppable
from cllm.train.run import train
from cllm.uptrain.complete import complete
from experiments.half_cache.scratch import teacher_data
from experiments.half_cache.settings import check_same
from experiments.uptraining.base import make_tokens
from experiments.uptraining.setup import SMALL, TINY, Folders, claim

METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "plain": {},
    "all": {"random_sources": 0.6, "random_sources_from": "all"},
    "owners": {"random_sources": 0.6, "random_sources_from": "owners"},
    "scratch": {"random_sources": 0.5, "random_sources_from": "all"},
}
"""`uptrain` of further training; `none` is the teacher itself, `scratch` starts from the teacher's first weights."""
FACTORS = (1, 2, 4)
"""Layers that read one slot: 100, 50 and 25 % of the cache."""
SIZES = {
    "1m": dataclasses.replace(
        SMALL,
        **{"d_model": 96, "d_ff": 256, "vocab_size": 1024, "seq_len": 128, "tokens": 1_500_000},
        **{"uptrain_batch": 2, "validation_sequences": 128},
        lr=4e-3,
    ),
    "tiny": dataclasses.replace(TINY, tokens=2_048, uptrain_batch=2),
}
"""Teachers by name: shape, tokens, sequences of a step and rates."""


class Experiment:
    """All runs of a command."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.size = SIZES["tiny" if options.tiny else "1m"]
        self.folders = Folders(options.out)

    def run(self) -> bool:
        """Train and measure what is missing; returns whether all is done, False after a signal."""
        make_tokens(self.folders, self.size, self.options.corpus, self.options.validation)
        claim(self.folders, self.size)
        agenda = sorted(product(range(self.options.seeds), METHODS), key=lambda pair: pair[1] == "scratch")
        runs = [data for seed, method in agenda for data in self.runs(method, seed)]
        for i, data in enumerate(runs, 1):
            file = self.options.out / "configs" / f"{data['name']}.yaml"
            if file.exists():
                check_same(yaml.safe_load(file.read_text(encoding="utf-8")), data, file)
            else:
                write_atomic(file, yaml.safe_dump(data, sort_keys=False))
            if not is_finished(RunFolder(self.options.out / data["name"])):
                print(f"run {i} of {len(runs)}: {data['name']}", flush=True)
                if not is_finished(train(validate(Config, complete(data)[0]), resume="auto")):
                    return False
                self.write()
        self.write()
        return True

    def runs(self, method: str, seed: int) -> list[dict[str, Any]]:
        """The configs that lead to the losses of one method, in order. Each reads text in an order of its own."""
        settings, trained = METHODS[method], f"{method}-s{seed}"
        teacher = self._teacher(f"none-s{seed}", seed)
        if settings is None:
            found = [teacher]
        elif method == "scratch":
            first = self._teacher(f"first-s{seed}", seed)  # the teacher's first weights: a step that moves nothing
            first["optim"] |= {"lr": 1e-12, "min_lr": 0.0, "warmup_steps": 0}
            first["train"] |= {"steps": 1, "validate_every": None, "checkpoint_every": 1}
            own = {"name": trained, "init": {"from": str(self.options.out / first["name"])}, "uptrain": settings}
            found = [first, teacher | own]
        else:
            further = self._continued(trained, teacher["name"], self.options.percent, 3 * seed + 1)
            found = [further | {"uptrain": settings}]
        for factor in FACTORS:
            name = f"{trained}-{100 // factor}"
            data = self._continued(name, trained, self.options.adapt_percent, 3 * seed + 2)
            data["model"] = {"kv": {"preset": "cla", "factor": factor, "kv_norm": False}} if factor > 1 else {}
            found.append(data)
        return found

    def _teacher(self, name: str, seed: int) -> dict[str, Any]:
        size = dataclasses.replace(self.size, base_seed=3 * seed)
        data = teacher_data(size, self.options.out, self.folders.tokens, gpus=0) | {"name": name}
        data["train"] |= {"validate_every": size.steps, "log_every": 10}
        return data

    def _continued(self, name: str, start: str, percent: float, seed: int) -> dict[str, Any]:
        """A run from another one, on `percent` of the teacher's tokens."""
        size, data = self.size, self._teacher(name, 0)
        steps = size.uptrain_steps(percent)
        data |= {"model": {}, "init": {"from": str(self.options.out / start), "method": "copy"}}
        data["optim"] = {"lr": size.uptrain_lr, "min_lr": size.uptrain_lr / 10, "warmup_steps": max(steps // 10, 1)}
        data["train"] |= {"steps": steps, "global_batch": size.uptrain_batch, "micro_batch": size.uptrain_batch}
        data["train"] |= {"seed": seed, "validate_every": steps, "checkpoint_every": steps}
        return data

    def write(self) -> None:
        """Write results.json and table.md with what is measured so far."""
        rows = []
        for method, seed, factor in product(METHODS, range(self.options.seeds), FACTORS):
            folder = RunFolder(self.options.out / f"{method}-s{seed}-{100 // factor}")
            if is_finished(folder):
                losses = [row["val/loss"] for row in folder.metrics() if "val/loss" in row]
                row = {"method": method, "seed": seed, "cache_percent": 100 // factor}
                rows.append(row | {"loss": losses[0], "adapted_loss": losses[-1]})
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        settings |= {"size": dataclasses.asdict(self.size), "methods": METHODS}
        found = {"environment": versions(), "settings": settings, "results": rows}
        write_atomic(self.options.out / "results.json", json.dumps(found, indent=1) + "\n")
        write_atomic(self.options.out / "table.md", table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: mean and range of losses in nats. A rise is that above the same model with its entire cache."""
    lines = ["trained | cache | seeds | loss | rise | adapted | rise, adapted", "---|---:|---:|---|---|---|---"]
    full = {(row["method"], row["seed"]): row for row in rows if row["cache_percent"] == 100}
    for method, percent in dict.fromkeys((row["method"], row["cache_percent"]) for row in rows):
        group = [row for row in rows if (row["method"], row["cache_percent"]) == (method, percent)]
        cells = [method, str(percent), str(len(group))]
        for key in ("loss", "adapted_loss"):
            rises = [row[key] - full[method, row["seed"]][key] for row in group if percent < 100]
            cells += [spread([row[key] for row in group]), spread(rises)]
        lines.append(" | ".join(cells))
    return "".join(f"|{line}|\n" if line.startswith("---") else f"| {line} |\n" for line in lines)


def spread(values: Sequence[float]) -> str:
    """`3.950 (3.940 to 3.970)`: the mean and the range; empty without values."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.random_sources", description=__doc__)
    add = parser.add_argument
    add("--corpus", nargs="+", required=True, metavar="FILE", help="text or JSON lines to train on, folders, globs")
    add("--validation", nargs="+", default=[], metavar="FILE", help="held out (default: 2 %% of the corpus)")
    add("--out", type=Path, default=Path("runs/random_sources"), metavar="DIR", help="default: %(default)s")
    add("--tiny", action="store_true", help="a teacher of a few thousand parameters")
    add("--seeds", type=whole_number(1), default=3, metavar="N", help="of teachers (default: %(default)s)")
    for name, default, of in (("--percent", 5.0, "further training"), ("--adapt-percent", 1.0, "adaptation")):
        add(name, type=number(above=0, up_to=100), default=default, metavar="P",
            help=f"of the teacher's tokens for {of} (default: %(default)s)")  # fmt: skip
    return parser


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 if a signal stopped it."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        done = Experiment(options).run()
    print((options.out / "table.md").read_text(encoding="utf-8") if done else "stopped: the same command goes on")
    return 0 if done else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
