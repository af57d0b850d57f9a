"""Errors a user can cause and mend.

`UserError` is raised for a mistake in a config, a path or a data set. Its message is one line that names the key or
file, the value seen and what is allowed. Command lines print that line to stderr and exit with status 2; everything
else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable

_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*^[\w.]*Error: (.*)", re.DOTALL | re.MULTILINE)

EXIT_MISTAKE = 2
"""Exit status of a command that was given something it cannot use; its one line on stderr says what."""
EXIT_STOPPED = 3
"""Exit status of a command that was stopped (by a signal, or its time limit) and saved what it needs to go on."""


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


def _message(error: UserError) -> str:
    """The error's message; of one in a data loader's process, without the traceback that torch puts around it."""
    match = _IN_WORKER.match(str(error))
    return str(error) if match is None else match[1]


def one_line(command: Callable[..., int | None]) -> Callable[..., int]:
    """Make a command's main function print a `UserError` as one line on stderr and return 2."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        try:
            return command(*args, **kwargs) or 0
        except UserError as error:
            print("error: " + " ".join(_message(error).split()), file=sys.stderr)
            return EXIT_MISTAKE

    return run
