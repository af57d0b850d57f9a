"""Reads YAML files and a command line into one validated config.

`--config A.yaml --config B.yaml --model.n_layers 12`: mappings are merged key by key. Later files win, and the command
line wins over all files. A mapping with `preset` or `layers` replaces an earlier one instead of being merged, so that
`kv: {preset: mha}` over `kv: {preset: cla, factor: 3}` leaves no stray `factor`.

Values are YAML in files and on the command line (`cllm/yaml_text.py`). Types are strict: `"2"` is not an integer. A
mistake is a `UserError` that names the key, its file, the value and what is allowed (`mistakes.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cllm.arguments import Parser
from cllm.config.help import keys_help, schema_keys, settings_about
from cllm.config.mistakes import SELECTORS, Origin, describe
from cllm.config.nested import enter
from cllm.config.shipped import find_config
from cllm.errors import UserError
from cllm.yaml_text import MAX_DEPTH, parse_word, read_yaml

Schema = TypeVar("Schema", bound=BaseModel)

COMMAND_LINE = "command line"


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with `over`, mapping by mapping. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        replace = isinstance(value, dict) and any(selector in value for selector in SELECTORS)
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
        raise UserError(describe(error, schema, data, origin or {}, only_file)) from None


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
