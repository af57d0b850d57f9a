"""Describes what pydantic refuses in one line: the file, the key as it was written, the value and what is allowed.

Pydantic adds parts to the location of an error that are no keys: the type that was tried, where a value may have one of
several (`seeds.list[int].0`), and the index of a value that was given alone and made a list (`base: a.yaml`).
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, JsonValue, Tag, ValidationError

from cllm.config.help import schema_keys
from cllm.errors import nearest, same_word

Origin = dict[tuple[str, ...], str]
"""The file, or the command line, in which each key and section was given."""
SELECTORS = ("preset", "layers")
"""Keys that select what a mapping describes: a mapping with one of them replaces another."""

# ---- the key ---------------------------------------------------------------------------------------------------------

_JSON: tuple[Any, ...] = (JsonValue, "JsonValue")
"""JSON, and as it names itself in its own definition: a tagged union."""
_KEY = "[key]"
"""Ends pydantic's location of a key of a mapping, as opposed to its value."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error is."""

    path: tuple[str, ...]
    """Keys and indices, as the user wrote them."""
    siblings: list[str]
    """The keys that are allowed in place of the last one."""
    ends_with_type: bool
    """Whether pydantic's location ends with one of several types that the value may have."""


def _alternatives(annotation: Any, tag: str | None = None) -> list[tuple[str | None, Any]]:
    """The types that a value may have besides None, each with its tag in a tagged union."""
    if annotation in _JSON:
        annotation = _JSON[0].__value__
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *metadata = typing.get_args(annotation)
        return _alternatives(annotation, next((m.tag for m in metadata if isinstance(m, Tag)), tag))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [found for part in typing.get_args(annotation) for found in _alternatives(part, tag)]
    return [] if annotation is type(None) else [(tag, annotation)]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_meant(tag: str | None, kind: Any, label: str) -> bool:
    """Whether pydantic calls a type `label`: by its tag, by a name such as `list[int]`, or by that of a section."""
    name = getattr(typing.get_origin(kind) or kind, "__name__", "")
    return label == tag or (name in re.findall(r"\w+", label) if _is_section(kind) else label.startswith(name))


def _below(kind: Any, part: str | int) -> list[tuple[str | None, Any]]:
    """The types of `part` of a value of type `kind`; none if it has no such part."""
    if _is_section(kind):
        return _alternatives(kind.model_fields[part].annotation) if part in kind.model_fields else []
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if (origin is list and isinstance(part, int)) or origin is dict:
        return _alternatives(inner[-1])
    return []


def _entry(values: list[Any], part: str | int) -> list[Any]:
    """`[value[part]]` for `values` of one value; [] without a value, or if it has no such part."""
    try:
        return [values[0][part]]
    except (LookupError, TypeError):
        return []


def _locate(schema: type[BaseModel], location: tuple[Any, ...], data: Any) -> _Place:
    """The place of an error in `data`, which `schema` refuses, from pydantic's location."""
    path: list[str] = []
    siblings: list[str] = []
    here: list[tuple[str | None, Any]] = [(None, schema)]
    values = [data]
    is_type = False
    for part in location:
        is_type = len(here) > 1 and not is_type and part != _KEY  # pydantic names the type it tried, if of several
        if is_type:
            here = [(tag, kind) for tag, kind in here if _is_meant(tag, kind, str(part))] or here
        if is_type or part == _KEY:
            continue
        was_alone = isinstance(part, int) and any(typing.get_origin(kind) is list for _, kind in here)
        if not (was_alone and values and not isinstance(values[0], list)):
            path.append(str(part))
            values = _entry(values, part)
        if isinstance(part, str):
            siblings = [name for _, kind in here if _is_section(kind) for name in kind.model_fields]
        here = [found for _, kind in here for found in _below(kind, part)]
    return _Place(tuple(path), siblings, is_type)


def _unknown_key(location: tuple[str, ...], siblings: list[str], schema: type[BaseModel]) -> str:
    """`unknown key;` and the key that was probably meant: in the same section, or of the same name in another."""
    key, word = ".".join(location), location[-1]
    keys = schema_keys(schema)
    if same_word(word, siblings) is None and key not in keys:  # the key may be that of another preset
        path = [part for part in location if not part.isdigit()]

        def in_common(other: str) -> int:
            return next((n for n, (a, b) in enumerate(zip(path, other.split("."), strict=False)) if a != b), 0)

        if elsewhere := same_word(word, sorted(keys, key=in_common, reverse=True)):
            return f'unknown key; did you mean "{elsewhere}"?'
    return f"unknown key; {nearest(word, siblings)}"


# ---- the file --------------------------------------------------------------------------------------------------------


def _origin(location: tuple[str, ...], origin: Origin) -> str:
    """The file that gave the key at `location`, or its innermost section that any file gave."""
    return next((origin[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origin), "")


def _origins(section: tuple[str, ...], message: str, origin: Origin) -> tuple[str, str]:
    """The origin of the keys of `section` that a message names, as (origin, ""), or ("", a list) if there are several.

    A rule between fields belongs to no single key, and its fields may come from several files.
    """
    words = set(re.findall(r"[A-Za-z_]\w*", message))
    sections = {path[:n] for path in origin for n in range(len(path))}
    given = {path: place for path, place in origin.items() if path not in sections and path[: len(section)] == section}
    named = {path: place for path, place in given.items() if path[-1] in words}
    if message.startswith("layer ") and not any("kv" in path for path in named):
        named |= {path: place for path, place in given.items() if path[-2:-1] == ("kv",) and path[-1] in SELECTORS}
    places = set(named.values())
    if len(places) > 1:
        return "", ", ".join(f"{'.'.join(path[len(section) :])} from {place}" for path, place in named.items())
    return (places.pop() if places else _origin(section, origin)), ""


# ---- the message -----------------------------------------------------------------------------------------------------

_SHOULD_BE = "Input should be "
_VALID = "a valid "


def _message(error: Any) -> str:
    """Pydantic's message in the words of YAML."""
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Dictionary|\bdictionary( or instance of \w+)?", "mapping", message)
    return message.replace("Input", "the key", 1) if error["loc"][-1:] == (_KEY,) else message


def _merged(errors: list[Any]) -> Any:
    """One error for a value that is of none of several types, from those of each type.

    A bound and a rule for the value come first: they are those of the type that was meant.
    """

    def rank(error: Any) -> int:
        return 2 if error["type"] == "literal_error" else int(error["msg"].startswith(_SHOULD_BE + _VALID))

    errors = sorted(errors, key=rank)
    message, *others = (
        text
        for error in errors
        for text in (
            error["ctx"]["expected"].replace(" or ", ", ").split(", ")
            if error["type"] == "literal_error"
            else [_message(error).removeprefix(_SHOULD_BE)]
        )
    )
    if rank(errors[0]):
        *listed, last = (message, *(text.removeprefix(_VALID) for text in others))
        message = f"{', '.join(listed)} or {last}"
    else:
        message = f"{message}, or {', '.join(others)}"
    prefix = _SHOULD_BE if errors[0]["msg"].startswith(_SHOULD_BE) else ""
    return {**errors[0], "msg": prefix + message}


def _one_for_each_value(schema: type[BaseModel], errors: list[Any], data: Any) -> list[Any]:
    """Pydantic's errors with one for each value that several types are allowed for: it has one for each type.

    The error that goes deepest into a value is that of the type that was meant.
    """
    kept: dict[Any, list[Any]] = {}
    for n, error in enumerate(errors):
        location = error["loc"]
        if not _locate(schema, location, data).ends_with_type:
            kept[n] = [error]
        elif not any(e["loc"][: len(location) - 1] == location[:-1] and len(e["loc"]) > len(location) for e in errors):
            kept.setdefault(location[:-1], []).append(error)
    return [_merged(found) if len(found) > 1 else found[0] for found in kept.values()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _line(error: Any, schema: type[BaseModel], data: Any, origin: Origin, only_file: str) -> str:
    """One pydantic error as `file: key: the mistake, what is allowed`."""
    place = _locate(schema, error["loc"], data)
    where, key, after = _origin(place.path, origin), ".".join(place.path), ""
    message = _message(error)
    if error["type"] == "extra_forbidden":
        message = _unknown_key(place.path, place.siblings, schema)
    elif error["type"] == "union_tag_invalid":
        expected = [tag.strip("'") for tag in error["ctx"]["expected_tags"].split(", ")]
        key += ".preset"
        message = f'unknown preset "{error["ctx"]["tag"]}"; {nearest(error["ctx"]["tag"], expected)}'
    elif error["type"] == "union_tag_not_found":
        message = f"is a mapping with preset or layers, got {_shown(error['input'])}"
    elif error["type"] == "missing":
        where = only_file or where
        message = "is required and missing"
    elif "ctx" in error and "error" in error["ctx"]:
        where, places = _origins(place.path, message, origin)
        after = f" ({places})" if places else ""
    elif not isinstance(error["input"], BaseModel):
        message = f"{message[0].lower()}{message[1:]}, got {_shown(error['input'])}"
    return ": ".join(part for part in (where, key, message) if part) + after


def describe(error: ValidationError, schema: type[BaseModel], data: Any, origin: Origin, only_file: str) -> str:
    """The first mistake in `data`, which `schema` refuses with `error`, and the number of further ones, in one line.

    Args:
        origin: of the keys in `data`.
        only_file: the file of all settings if there is only one: a missing key is reported as missing there.
    """
    errors = _one_for_each_value(schema, error.errors(), data)
    # An unknown key is usually a misspelt one, and the reason why another is missing: report it first.
    errors.sort(key=lambda e: e["type"] != "extra_forbidden")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _line(errors[0], schema, data, origin, only_file) + more
