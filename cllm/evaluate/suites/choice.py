"""The suites of a command line with their settings: `--suite ruler:length=4096,tasks=niah|vt --suite copying`."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cllm.errors import UserError, nearest
from cllm.evaluate.suites.suite import Suite
from cllm.key_values import read_options
from cllm.yaml_text import parse_word


class Chosen(NamedTuple):
    """A suite that was asked for."""

    suite: Suite
    given: BaseModel | None = None
    """Its settings; None for a suite without."""


def parse_choice(text: str, known: Mapping[str, Suite]) -> Chosen:
    """The suite and the settings of `NAME` or `NAME:KEY=VALUE,...`.

    Numbers, `true`, `false` and `null` are YAML. A text, such as a path, is taken as it is; in quotes it may have
    commas. A list is written `a|b` or `[a, b]`; a single value stands for a list of one. A list has no value twice.

    Raises:
        UserError: naming `text`, for an unknown suite or option (with the allowed ones), and for a value of the wrong
            type or out of range.
    """
    name, colon, options = (part.strip() for part in text.partition(":"))
    if name not in known:
        allowed = list(known)
        hint = nearest(name, allowed) if len(allowed) > 4 else f"allowed: {', '.join(allowed)}"
        raise UserError(f"--suite is {name!r}; {hint}")
    suite = known[name]
    if suite.settings is None:
        if colon:
            raise UserError(f'--suite "{text}": {name} has no options in its name; leave out what follows {name}')
        return Chosen(suite)
    where, fields = f'--suite "{text}"', suite.settings.model_fields
    values: dict[str, Any] = {}
    keys = f"{', '.join(sorted(fields))}; a value with a comma needs quotes"
    lists = [key for key, field in fields.items() if _lists(_kinds(field.annotation))]
    pairs = read_options(options, where, allowed=keys, first=suite.positional, lists=lists)
    for key, value in pairs if colon else ():
        if key not in fields:
            raise UserError(f'{where}: unknown option "{key}" of {name}; {nearest(key, fields)}')
        values[key] = _value(value, fields[key], f"{where}: {key}")
    try:
        return Chosen(suite, suite.settings.model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        seen = f"{key}: " if key else ""
        got = f" got {first['input']!r}" if key else ""
        raise UserError(f"{where}: {seen}{first['msg'].removeprefix('Value error, ')}{got}") from None


def _value(text: str, field: FieldInfo, where: str) -> Any:
    kinds = _kinds(field.annotation)
    lists = _lists(kinds)
    if not lists:
        return _single(text, kinds, where)
    if not text or text.startswith("["):
        values = parse_word(text, where)
    else:
        inner = [kind for each in lists for kind in _kinds(typing.get_args(each)[0])]
        values = [_single(part.strip(), inner, where) for part in text.split("|")]
        values = None if values == [None] else values
    return list(dict.fromkeys(values)) if _is_plain(values) else values


def _single(text: str, kinds: Sequence[Any], where: str) -> Any:
    """A text as it is, so that a path may look like YAML; other values as YAML."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if not {str, Path} & {*kinds} or quoted or (text == "null" and type(None) in kinds):
        return parse_word(text, where)
    return text or (None if type(None) in kinds else "")


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, or the one type."""
    return list(typing.get_args(annotation)) if _is_union(annotation) else [annotation]


def _lists(kinds: Iterable[Any]) -> list[Any]:
    """The kinds that are lists."""
    return [kind for kind in kinds if typing.get_origin(kind) is list]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_plain(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str | int | float) for value in values)


def describe_suites(suites: Iterable[Suite]) -> str:
    """A text that lists suites with their options and defaults."""
    lines = []
    for suite in suites:
        lines.append(f"{suite.name}: {suite.help}")
        if suite.settings is not None:
            lines += [_describe(key, field) for key, field in suite.settings.model_fields.items()]
        for option in suite.options:
            text = f"{option.flag} {option.keywords.get('metavar', '')}  {option.keywords.get('help', '')}"
            lines.append(_wrapped(" ".join(text.split())))
    return "\n".join(lines)


def _describe(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "null" if default is None else "|".join(map(str, default)) if isinstance(default, list) else default
    return _wrapped(f"{key}={shown}  {' '.join((field.description or '').split())}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="        ")


def names(chosen: Sequence[Chosen]) -> str:
    """The names of suites, for a message."""
    return ", ".join(choice.suite.name for choice in chosen)
