"""Reads YAML files and a command line into one validated config.

`--config A.yaml --config B.yaml --model.n_layers 12`: mappings are merged key by key. Later files win, and the command
line wins over all files. A mapping with `preset` or `layers` replaces an earlier one instead of being merged, so that
`kv: {preset: mha}` over `kv: {preset: cla, factor: 3}` leaves no stray `factor`.

Values are YAML in files and on the command line (`cllm/yaml_text.py`). Types are strict: `"2"` is not an integer. A
mistake is a `UserError` that names the key, its file, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cllm.arguments import Parser
from cllm.config.help import keys_help, schema_keys, sections_in, settings_about
from cllm.config.nested import enter
from cllm.config.shipped import find_config
from cllm.errors import UserError, nearest, same_word
from cllm.yaml_text import MAX_DEPTH, parse_word, read_yaml

Schema = TypeVar("Schema", bound=BaseModel)
Origin = dict[tuple[str, ...], str]
"""The file, or the command line, in which each key and section was given."""

COMMAND_LINE = "command line"
_SELECTORS = ("preset", "layers")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`, mapping by mapping. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        replace = isinstance(value, dict) and any(selector in value for selector in _SELECTORS)
        if isinstance(value, dict) and isinstance(below, dict) and not replace:
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _paths(data: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in data.items():
        found.append((*prefix, str(key)))
        if isinstance(value, dict):
            found += _paths(value, (*prefix, str(key)))
    return found


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parse `--a.b 1 --c=x` into `{"a": {"b": 1}, "c": "x"}`. Raises `UserError`."""
    tree: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{COMMAND_LINE}: unexpected argument {word!r}; settings look like --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"{COMMAND_LINE}: --{key} needs a value")
            text = words.pop(0)
        value = parse_word(text, f"{COMMAND_LINE}: --{key}")
        *sections, leaf = key.split(".")
        if len(sections) > MAX_DEPTH:
            raise UserError(f"{COMMAND_LINE}: --{key[:40]}...: is nested more than {MAX_DEPTH} levels deep")
        enter(tree, sections, f"{COMMAND_LINE}: --{key}")[leaf] = value
    return tree


_PLAIN_TYPES = ("int", "str", "float", "bool")
"""Names of plain types in pydantic's locations."""


def _item(annotation: Any) -> Any:
    """The type of the items of a list, which may be optional; None for other types."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union) else ()
    lists = [kind for kind in (annotation, *kinds) if typing.get_origin(kind) is list]
    return typing.get_args(lists[0])[0] if lists else None


def _locate(schema: type[BaseModel], location: tuple[Any, ...]) -> tuple[tuple[str, ...], list[str]]:
    """A pydantic location as a path of keys, without union tags, and the keys allowed in place of its last part."""
    path: list[str] = []
    here: list[tuple[str | None, type[BaseModel]]] = [(None, schema)]
    siblings: list[str] = []
    annotation: Any = None
    for part in location:
        if tagged := [section for section in here if section[0] is not None and section[0] == part]:
            here = [(None, tagged[0][1])]
            continue
        is_field = any(part in model.model_fields for _, model in here)
        if isinstance(part, str) and not is_field and typing.get_origin(annotation) in (types.UnionType, typing.Union):
            if tried := [section for section in here if section[1].__name__ == part]:
                here, annotation = tried, None
                continue
            if not here or part in _PLAIN_TYPES:
                continue  # which of several plain types was tried
        path.append(str(part))
        if isinstance(part, int):
            annotation = _item(annotation)
            continue
        siblings = [name for _, model in here for name in model.model_fields]
        fields = [model.model_fields[part] for _, model in here if part in model.model_fields]
        here = [section for field in fields for section in sections_in(field.annotation)]
        annotation = fields[0].annotation if fields else None
    return tuple(path), siblings


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
        named |= {path: place for path, place in given.items() if path[-2:-1] == ("kv",) and path[-1] in _SELECTORS}
    places = set(named.values())
    if len(places) > 1:
        return "", ", ".join(f"{'.'.join(path[len(section) :])} from {place}" for path, place in named.items())
    return (places.pop() if places else _origin(section, origin)), ""


def _describe(error: Any, schema: type[BaseModel], origin: Origin, only_file: str) -> str:
    """One pydantic error as `file: key: the mistake, what is allowed`."""
    location, siblings = _locate(schema, error["loc"])
    where, key, after = _origin(location, origin), ".".join(location), ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = _unknown_key(location, siblings, schema)
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
        where, places = _origins(location, message, origin)
        after = f" ({places})" if places else ""
    elif not isinstance(error["input"], (dict, BaseModel)):
        message = f"{message[0].lower()}{message[1:]}, got {_shown(error['input'])}"
    return ": ".join(part for part in (where, key, message) if part) + after


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _without_branches(schema: type[BaseModel], errors: list[Any]) -> list[Any]:
    """Pydantic's errors with one for each value that several types are allowed for: it has one for each type.

    The error that goes deepest into a value is that of the type that was meant.
    """

    def tried(error: Any) -> tuple[Any, ...] | None:
        """The location of the value, if the error's own location ends with a type that was tried."""
        *value, _ = error["loc"]
        return tuple(value) if _locate(schema, error["loc"])[0] == _locate(schema, tuple(value))[0] else None

    kept: dict[Any, Any] = {}
    for error in errors:
        value = tried(error) if error["loc"] else None
        if value is None:
            kept[len(kept)] = error
        elif any(e["loc"][: len(value)] == value and len(e["loc"]) > len(error["loc"]) for e in errors):
            continue
        elif value in kept:
            what = "mapping" if error["type"] == "model_type" else error["msg"].removeprefix("Input should be a valid ")
            kept[value] = {**kept[value], "msg": f"{kept[value]['msg']} or {what}"}
        else:
            kept[value] = error
    return list(kept.values())


def validate(
    schema: type[Schema], data: dict[str, Any], origin: Origin | None = None, *, only_file: str = ""
) -> Schema:
    """`data` as an instance of `schema`.

    Args:
        origin: of the keys in `data`, for messages.
        only_file: the file of all settings if there is only one: messages about missing keys name it.

    Raises:
        UserError: for the first mistake, with the number of further ones.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        errors = _without_branches(schema, error.errors())
        # An unknown key is usually a misspelt one, and the reason why another is missing: report it first.
        errors.sort(key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(_describe(errors[0], schema, origin or {}, only_file) + more) from None


def load_settings(
    schema: type[Schema],
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    complete: Callable[[dict[str, Any]], tuple[dict[str, Any], Origin]] | None = None,
) -> Schema:
    """Read, merge and validate YAML `files` and command-line `overrides`.

    Args:
        schema: the settings that are allowed.
        files: paths, or names of shipped configs (`find_config`); later ones win.
        overrides: words such as `--train.steps 10`; they win over all files.
        complete: fills in settings that follow from others, before validation. It takes the merged settings, and
            returns the completed ones and the origin of each added key.

    Raises:
        UserError: for the first mistake, with its key, its file, the value and what is allowed.
    """
    layers = [(str(path), read_yaml(find_config(path))) for path in files]
    layers.append((COMMAND_LINE, parse_overrides(overrides)))
    return merge_settings(schema, layers, complete=complete, only_file=str(files[0]) if len(files) == 1 else "")


def merge_settings(
    schema: type[Schema],
    layers: Iterable[tuple[str, dict[str, Any]]],
    *,
    complete: Callable[[dict[str, Any]], tuple[dict[str, Any], Origin]] | None = None,
    only_file: str = "",
) -> Schema:
    """Merge and validate settings.

    Args:
        schema: the settings that are allowed.
        layers: the name of a file, or another name for messages, and the settings in it; later layers win.
        complete: as for `load_settings`.
        only_file: as for `validate`.

    Raises:
        UserError: as `load_settings` does.
    """
    data: dict[str, Any] = {}
    origin: Origin = {}
    for name, layer in layers:
        data = merge(data, layer)
        origin |= dict.fromkeys(_paths(layer), name)
    present = set(_paths(data))  # without the keys of a plan that was replaced
    origin = {path: name for path, name in origin.items() if path in present}
    if complete is not None:
        data, added = complete(data)
        origin = added | origin
    return validate(schema, data, origin, only_file=only_file)


class ConfigParser(Parser):
    """A parser for options and the settings of a schema."""

    def __init__(self, schema: type[BaseModel], description: str, program: str | None = None):
        super().__init__(prog=program, description=description)
        self.schema = schema

    def parse_settings(self, words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the remaining words, which are settings. Raises `UserError` for a misspelt option."""
        return self.parse_with_settings(words, list(schema_keys(self.schema)))

    def full_help(self) -> str:
        """The usage, every option and every setting."""
        return f"{self.format_help()}\n{keys_help(self.schema)}"

    def topics(self, word: str) -> list[str]:
        """Texts about the options and settings that have to do with `word`, the closest first."""
        return [*super().topics(word), *settings_about(self.schema, word)]


def config_parser(schema: type[BaseModel], description: str, program: str | None = None) -> ConfigParser:
    """An argument parser with `--config` (repeatable) and a `--help` that lists every setting of `schema`.

    Args:
        program: how the command is called, for its usage; None: the name of the script.
    """
    parser = ConfigParser(schema, description, program)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML file, or the name of a shipped one (cllm configs lists them); repeat it, later files win",
    )
    return parser
