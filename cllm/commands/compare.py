"""Compare runs: one table and one figure of quality against KV cache.

    %(prog)s runs/* [--baseline NAME] [--set SET] [--out DIR]
    %(prog)s runs/* --score copying --heatmap ruler
    %(prog)s runs/* --posthoc '*' --score copying --score mqar
    %(prog)s studies/NAME --score copying:distance=512 --score piqa

With --posthoc, and for a study or files of results, the table has a row for each design and each way to compress its
cache, with bytes, perplexity, scores and their changes. It is printed in Markdown.

Losses come from `evaluate --run ...` if it has been run, else from the last validation of the training. See
docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import Parser
from cllm.errors import UserError, one_line
from cllm.lock import locked
from cllm.signals import stoppable

if TYPE_CHECKING:
    from cllm.evaluate.heatmap import HeatMap
    from cllm.evaluate.suites.suite import Number, Suite


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders, of which those that are not runs are skipped; or "
        "folders of studies, JSON files of results and CSV tables of sweeps",
    )
    add("--baseline", metavar="NAME", help="run to compare with (default: the one with the largest resident cache)")
    add("--set", dest="set_name", metavar="SET", help="set to compare on (default: each run's main validation set)")
    add("--score", action="append", default=[], metavar="SUITE[:TASK][/NUMBER]", help="compare by a number that "
        "evaluate --suite SUITE has measured, such as copying, ruler/score, copying:distance=512 or ruler:length=4096, "
        "an option of the evaluation (default: by perplexity); repeatable: the first decides")  # fmt: skip
    add("--posthoc", action="append", default=[], metavar="PATTERN", help="one table with a row for each run and each "
        "evaluate --posthoc SPEC that matches, such as 'xkv*' or '*'; repeatable")  # fmt: skip
    add("--heatmap", metavar="SUITE[/NUMBER]", help="also draw this number by needle depth and length, for each run "
        "and --posthoc of evaluate --suite SUITE, such as ruler")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder of the files (default: comparison/ next to the runs, "
        "runs/comparison if they lie in different folders)")  # fmt: skip
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm compare") -> int:
    """Run the command line; returns its exit status: 1 if a run was left out because its files cannot be read."""
    options = make_parser(program).parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    # Imported late: --help and mistakes in arguments answer without loading torch and plots.
    from cllm.evaluate.measured import are_results

    if options.posthoc or are_results(options.runs):
        return _answer(options)
    return _compare(options)


def _compare(options: argparse.Namespace) -> int:
    """A row for each run."""
    from cllm.evaluate.comparison import compare, find_runs
    from cllm.evaluate.heatmap import read_heatmap
    from cllm.evaluate.heatmap import write as write_heatmap
    from cllm.evaluate.report import terminal, write
    from cllm.evaluate.result_folders import beside

    runs = find_runs(options.runs)
    heatmap = _heatmap(options.heatmap, partial(read_heatmap, runs))
    comparison = compare(runs, baseline=options.baseline, set_name=options.set_name, score=options.score)
    print(terminal(comparison))
    folder = options.out or beside([run.path for run in runs], "comparison")
    print(f"table and figure go to {folder}", file=sys.stderr, flush=True)
    with locked(folder):
        paths = write(comparison, folder)
        if heatmap is not None:
            paths += write_heatmap(heatmap, folder)
        for path in paths:
            print(f"written: {path}")
    return 1 if comparison.left_out else 0


def _answer(options: argparse.Namespace) -> int:
    """A row for each design and each way to compress its cache."""
    from cllm.evaluate.answers import answers
    from cllm.evaluate.answers_table import markdown, write
    from cllm.evaluate.heatmap import heatmap_of
    from cllm.evaluate.heatmap import write as write_heatmap
    from cllm.evaluate.measured import read_measured
    from cllm.evaluate.result_folders import without_results
    from cllm.evaluate.score_choice import parse_score_choice
    from cllm.evaluate.suites.registry import suites

    if options.heatmap is not None and options.out is None:
        raise UserError("--heatmap of results, or with --posthoc, needs --out, the folder of the maps")
    scores = [parse_score_choice(text, suites()) for text in dict.fromkeys(options.score)]
    models, left_out = read_measured(without_results(options.runs) or options.runs)
    found = answers(
        models,
        scores,
        specs=options.posthoc or ["*"],
        baseline=options.baseline,
        set_name=options.set_name,
    )
    heatmap = _heatmap(options.heatmap, partial(heatmap_of, models))
    print(markdown(found), end="")
    if options.out is not None:
        with locked(options.out):
            paths = write(found, options.out) + (write_heatmap(heatmap, options.out) if heatmap else [])
            for path in paths:
                print(f"written: {path}", file=sys.stderr)
    return 1 if left_out else 0


def _heatmap(text: str | None, read: Callable[[Suite, Number], HeatMap]) -> HeatMap | None:
    """The maps of the suite and number that --heatmap names, by `read`; None without the option."""
    from cllm.evaluate.score_choice import parse_score_choice
    from cllm.evaluate.suites.registry import suites

    if text is None:
        return None
    choice = parse_score_choice(text, suites(), "--heatmap")
    return read(choice.suite, choice.number)
