"""Compare runs: one table and one figure of quality against KV cache.

    %(prog)s runs/* [--baseline NAME] [--set SET] [--out DIR]
    %(prog)s runs/* --score copying --heatmap ruler

Losses come from `evaluate --run ...` if it has been run, else from the last validation of the training. See
docs/evaluation.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser
from cllm.errors import one_line
from cllm.lock import locked
from cllm.signals import stoppable


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders; folders that are not runs are skipped")
    add("--baseline", metavar="NAME", help="run to compare with (default: the one with the largest resident cache)")
    add("--set", dest="set_name", metavar="SET", help="set to compare on (default: each run's main validation set)")
    add("--score", metavar="SUITE[/NUMBER]", help="compare by a number that evaluate --suite SUITE has measured, "
        "such as copying or ruler/score (default: by perplexity)")  # fmt: skip
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
    from cllm.evaluate.comparison import compare, find_runs
    from cllm.evaluate.heatmap import read_heatmap
    from cllm.evaluate.heatmap import write as write_heatmap
    from cllm.evaluate.quality import parse_score
    from cllm.evaluate.report import terminal, write
    from cllm.evaluate.result_folders import beside
    from cllm.evaluate.suites.registry import suites

    runs = find_runs(options.runs)
    heatmap = None
    if options.heatmap is not None:
        heatmap = read_heatmap(runs, *parse_score(options.heatmap, suites(), "--heatmap"))
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
