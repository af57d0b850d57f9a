"""Options behind a name on the command line: the `KEY=VALUE,KEY=VALUE` of `copying:length=64,seed=1`."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from cllm.errors import UserError

_LIST = r"(?<==)\s*\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
_PIECE = re.compile(rf"""{_LIST}|(?<![^=|])"[^"]*"|(?<![^=|])'[^']*'|.""", re.DOTALL)
"""A value that may have commas, a list or a text in quotes; else one character."""


def split_options(text: str) -> list[str]:
    """The options, which commas separate, without the spaces around them.

    >>> split_options("tasks=[a, b],path='c, d',length=4|8")
    ['tasks=[a, b]', "path='c, d'", 'length=4|8']
    """
    options = [""]
    for piece in _PIECE.findall(text):
        if piece == ",":
            options.append("")
        else:
            options[-1] += piece
    return [option.strip() for option in options]


def read_options(
    text: str, where: str, *, allowed: str = "", first: str | None = None, lists: Container[str] = ()
) -> Iterator[tuple[str, str]]:
    """Keys and values of `KEY=VALUE,KEY=VALUE`.

    Args:
        text: the options.
        where: begins messages: the argument, and the value that has the options.
        allowed: the end of the message for an option of another form.
        first: the key of the first option, if that is a value alone.
        lists: keys whose value may be a list.

    Raises:
        UserError: for an option of another form, and for a key that is given twice.
    """
    seen: dict[str, str] = {}
    for option in split_options(text):
        key, equals, value = (part.strip() for part in option.partition("="))
        if first is not None and key and not equals and not seen:
            key, equals, value = first, "=", key
        if not key or not equals:
            raise UserError(f'{where}: "{option}" is not of the form KEY=VALUE{allowed and f"; allowed: {allowed}"}')
        if key in seen:
            several = f"; a list is written {key}=A|B" if key in lists else ""
            raise UserError(f"{where}: {key} is given twice, as {seen[key]} and as {value}; give it once{several}")
        seen[key] = value
        yield key, value
