#!/usr/bin/env python
"""Train designs, compress the caches of the trained models as well, and put both into one table and one figure.

    python scripts/tradeoff.py --config configs/tradeoff/98m.yaml --data.path data/prepared/NAME --out runs/tradeoff
    python scripts/tradeoff.py ... --designs mha gqa:n_kv_heads=4 fusedkv --ratio 2 4 --minutes 9

A design is NAME[:KEY=VALUE,...]: a file of configs/kv/ and settings of `model.kv` on top of it. Each is trained by
train.py and measured as it was trained and with every --spec, as scripts/sweep_posthoc.py does. Run it again and it
goes on: finished runs are kept, a broken one is resumed, what was measured is not measured again. Settings such as
--train.steps 500 go to every run. docs/posthoc.md tells how to read the table.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_bench.designs import parse_plan

from cllm import processes
from cllm.arguments import number, whole_number
from cllm.config import Config
from cllm.config.load import config_parser
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.lock import locked
from cllm.runs import RunFolder
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[1]
DESIGNS = ("mha", "fusedkv", "fusedkv_lite", "cla", "yoco", "gqa")


def run_name(design: str) -> str:
    """`gqa:n_kv_heads=4` as a run's name, gqa-n_kv_heads-4."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", design)


def is_finished(folder: RunFolder) -> bool:
    """Whether the run has a checkpoint of its last step."""
    return folder.config_file.exists() and folder.config().train.steps in dict(folder.checkpoints())


def train(words: list[str], seconds: float) -> None:
    """Train in a process of its own; after `seconds`, and on a signal to this one, it saves and stops.

    Raises:
        UserError: when it fails.
    """
    command = [sys.executable, ROOT / "train.py", *words, "--resume", "auto"]
    status = processes.run(command, seconds=seconds, cwd=ROOT)
    if status not in (0, EXIT_STOPPED):
        raise UserError(f"train.py {' '.join(words)} ended with status {status}; its output is above")


@one_line
@stoppable("the same command goes on")
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 where time ran out or a signal stopped it."""
    parser = config_parser(Config, __doc__ or "")
    add, count, ratio = parser.add_argument, whole_number(1), number(above=0)
    add("--designs", nargs="+", default=list(DESIGNS), metavar="DESIGN", help=f"default: {' '.join(DESIGNS)}")
    add("--out", type=Path, default=Path("runs/tradeoff"), metavar="DIR", help="for runs, table, figure and events "
        "(default: %(default)s)")  # fmt: skip
    add("--minutes", type=number(least=0), default=1e6, metavar="M",
        help="stop training after so many; the same command goes on")  # fmt: skip
    add("--spec", action="append", default=[], help="as in scripts/sweep_posthoc.py, sinks=N included")
    add("--group", type=count, nargs="+", default=[4], help="values of {group} (default: 4)")
    add("--ratio", type=ratio, nargs="+", default=[2.0, 4.0, 8.0], help="values of {ratio} (default: 2 4 8)")
    add(
        "--prefix",
        type=count,
        metavar="N",
        help="tokens of a window to compress (default: half of the training length)",
    )
    add("--batch", type=count, metavar="N", help="windows computed together")
    add("--max-tokens", type=count, metavar="N", help="score only the first N tokens of the validation set")
    options, overrides = parser.parse_settings(argv)
    if not options.config:
        raise UserError(
            "--config: missing; for example --config configs/tradeoff/98m.yaml --data.path data/prepared/NAME"
        )
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from cllm.evaluate.pareto import expand
    from cllm.posthoc.registry import parse

    deadline = time.monotonic() + 60 * options.minutes
    for spec in expand(options.spec, options.group, options.ratio):
        parse(spec)
    files = [str(Path(file).resolve()) for file in options.config]
    out = options.out.resolve()
    lines: dict[str, list[str]] = {}
    for design in options.designs:
        plan, settings = parse_plan(design)
        own = {"name": run_name(design), "runs_dir": out} | {f"model.kv.{key}": text for key, text in settings.items()}
        added = [*overrides, *(word for key, text in own.items() for word in (f"--{key}", str(text)))]
        load_config([*files, plan], added)  # told before the first run starts
        lines[run_name(design)] = [*(word for file in (*files, plan) for word in ("--config", str(file))), *added]
    with locked(out):
        return train_and_sweep(options, lines, out, deadline)


def train_and_sweep(options: argparse.Namespace, lines: dict[str, list[str]], out: Path, deadline: float) -> int:
    """Train the runs of `lines`, then measure all of them; returns the exit status."""
    print(f"runs, table and figure go to {out}", file=sys.stderr, flush=True)
    for name, words in lines.items():
        if is_finished(RunFolder(out / name)):
            continue
        left = deadline - time.monotonic()
        if left > 0:
            print(f"== {name}", file=sys.stderr, flush=True)
            train(words, left)
        if not is_finished(RunFolder(out / name)):
            print(f"stopped: {name} is not finished; the same command goes on", file=sys.stderr)
            return EXIT_STOPPED
    import sweep_posthoc  # late, as above

    sweep = [str(out / name) for name in lines] + ["--out", str(out / "posthoc")]
    for option in ("prefix", "batch", "max_tokens"):
        if (value := getattr(options, option)) is not None:
            sweep += [f"--{option.replace('_', '-')}", str(value)]
    sweep += [word for spec in options.spec for word in ("--spec", spec)]
    sweep += ["--group", *map(str, options.group), "--ratio", *map(str, options.ratio)]
    return sweep_posthoc.main(sweep)


if __name__ == "__main__":
    sys.exit(main())
