"""The evaluation of one point of a study, in a process of its own: several `cllm evaluate` that load torch once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.commands import evaluate
from cllm.errors import UserError, one_line
from cllm.trust import read_object

_SIGNAL = 128
"""An exit status above it is that of a command that a signal has ended."""


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as a JSON file says: `run`, `out`, and `commands`, the words of each evaluation without `--run`.

    Records of the n-th command go to `out/n/`. If one fails, the others are measured nevertheless. Returns the first
    exit status that is not 0.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        raise UserError(f"{' '.join(words) or 'no argument'}: allowed: the JSON file of one evaluation")
    job = read_object(Path(words[0]))
    failed = 0
    for n, command in enumerate(job["commands"]):
        status = evaluate.main(["--run", job["run"], "--out", f"{job['out']}/{n:02d}", *command])
        if status > _SIGNAL:
            return status
        failed = failed or status
    return failed


if __name__ == "__main__":
    sys.exit(main())
