"""Pretrain a Llama with transformers, convert it to plans that share keys and values, uptrain those, and tabulate.

    python -m experiments.uptraining all --corpus FILES --validation FILES --out runs/evidence --minutes 9

Steps, in this order. Each skips what is done, so that the same command continues after time ran out:

    tokens    the corpus with a tokenizer trained on it
    base      LlamaForCausalLM of transformers, pretrained
    import    the same model read by cllm: logits compared
    starts    students before training: every plan, method and calibration seed
    steps     times of a distilled and of a plain step
    students  uptraining by train.py: plans, methods, losses, what is trained, shares of the pretraining tokens
    table     rows.json and table.md in OUT, also written after every result

Measurements of the steps starts, steps and students come in the order of `agenda` in experiments/uptraining/setup.py,
the most informative first. A failed one becomes a row and does not stop the others. docs/uptraining.md has the results.
--tiny runs all of it on a CPU in some minutes.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser
from cllm.errors import EXIT_STOPPED, one_line
from cllm.lock import locked
from cllm.signals import STOPPING, interrupting, stoppable
from experiments.uptraining import report
from experiments.uptraining.experiment import Experiment
from experiments.uptraining.setup import FULL

STEPS = ("tokens", "base", "import", "starts", "steps", "students", "table")


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.uptraining", description=__doc__)
    add = parser.add_argument
    add("step", nargs="+", choices=("all", *STEPS), metavar="STEP", help="all, or some of the steps above")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for everything that is made")
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
    add("--kv-lr", type=float, help=f"the same if only K/V are trained (default: {FULL.uptrain_kv_lr:g})")
    add("--batch", type=int, metavar="N", help="sequences of a student's step (default: "
        f"{FULL.uptrain_batch}); needs an --out of its own")  # fmt: skip
    add("--only", default="", metavar="REGEX", help="only starts and students whose name matches from its beginning")
    parser.add_device()
    add(
        "--no-compile",
        action="store_true",
        help="do not compile blocks, which does not pay off in short runs",
    )
    add("--compile-steps", action=argparse.BooleanOptionalAction, help="time compiled steps (default: on a GPU)")
    add(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="students trained at once, each in its own process",
    )
    add("--minutes", type=float, default=1e5, metavar="M",
        help="start nothing that may take longer than is left; running students are saved then")  # fmt: skip
    return parser


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 if time ran out, else 1 if something failed."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    with locked(options.out):
        experiment = Experiment(options)
        experiment.second_interrupt = interrupting(signal.getsignal(signal.SIGINT))
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
