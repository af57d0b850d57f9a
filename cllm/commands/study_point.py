"""The evaluation of one point of a study, in a process of its own: several `cllm evaluate` that load torch once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cllm.commands import evaluate
from cllm.errors import UserError, one_line
from cllm.study.measuring import measure
from cllm.trust import read_object

_SIGNAL = 128
"""An exit status above it is that of a command that a signal has ended."""


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as a JSON file says: `run`, `out`, `commands` and `marks`.

    `commands` has the words of each evaluation without `--run`; records of the n-th go to `out/n/`. `marks` has the
    hashes by which one that has ended is skipped, see cllm/study/measuring.py. If one fails, the others are measured
    nevertheless. Returns the first exit status that is not 0.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        raise UserError(f"{' '.join(words) or 'no argument'}: allowed: the JSON file of one evaluation")
    job = read_object(Path(words[0]))
    failed = 0
    for n, (command, mark) in enumerate(zip(job["commands"], job["marks"], strict=True)):
        status = measure(Path(job["out"]), n, mark, partial(_evaluate, job["run"], command))
        if status > _SIGNAL:
            return status
        failed = failed or status
    return failed


def _evaluate(run: str, command: Sequence[str], out: Path) -> int:
    return evaluate.main(["--run", run, "--out", str(out), *command])


if __name__ == "__main__":
    sys.exit(main())
