"""Errors a user can cause and mend.

`UserError` is raised for a mistake in a config, a path or a data set. Its message is one line that names the key or
file, the value seen and what is allowed. Command lines print that line to stderr and exit with status 2, and do the
same for faults of the machine such as a full disk (see `cllm/faults.py`); everything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import functools
import io
import sys
from collections.abc import Callable, Iterable

from cllm import faults

EXIT_MISTAKE = 2
"""Exit status of a command that was given something it cannot use; its one line on stderr says what."""
EXIT_STOPPED = 3
"""Exit status of a command that was stopped (by a signal, or its time limit) and saved what it needs to go on."""
EXIT_INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 and the number of SIGINT, as of any program in a shell."""
EXIT_BROKEN_PIPE = 141
"""Exit status of a command whose output nobody reads any more: 128 and the number of SIGPIPE."""
LONGEST_LINE = 1000
"""Characters of an error's line; the middle of a longer one is left out."""


class UserError(ValueError):
    """A mistake of the user's, told in one line."""


class PlanError(UserError):
    """A KV plan that cannot be built; the message names the layer."""


class DataError(UserError):
    """Prepared data, a recipe or a corpus that cannot be used; the message names the file."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`did you mean "cla"?`, or the nearest and the whole list where nothing is near. Ends an error message."""
    allowed = sorted(allowed)
    if close := difflib.get_close_matches(word, allowed, n=1, cutoff=0.6):
        return f'did you mean "{close[0]}"?'
    ranked = difflib.get_close_matches(word, allowed, n=1, cutoff=0.0)
    return f'nearest: "{ranked[0]}"; allowed: {", ".join(allowed)}' if ranked else "none is allowed here"


def one_line(command: Callable[..., int | None]) -> Callable[..., int]:
    """Make a command's main function answer mistakes and faults of the machine with one line on stderr.

    The function returned gives the exit status: 2 for a `UserError` and for what `faults.explain` knows, 130 for
    Ctrl-C, and 141 without a line where nobody reads the output any more, as in `command | head`. Other exceptions
    pass through.
    """

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
        try:
            try:
                status = command(*args, **kwargs) or 0
            except SystemExit:  # of --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's exit
            return status
        except UserError as error:
            return _say(faults.from_worker(error) or str(error))
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if faults.is_broken_pipe(error):
                faults.silence_output()
                return EXIT_BROKEN_PIPE
            line = faults.explain(error)
            if line is None:
                raise
            return _say(line)

    return run


def _say(message: str) -> int:
    """Print `message` as one line on stderr. The middle of a very long one is left out: its ends say most."""
    line = " ".join(message.split())
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE - 300]} [...] {line[-293:]}"
    print(f"error: {line}", file=sys.stderr)
    return EXIT_MISTAKE
