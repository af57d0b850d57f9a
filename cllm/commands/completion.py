"""Answers to a shell that completes a command line of `cllm`, by the optional package argcomplete.

The shell starts `cllm` with the line in the variable COMP_LINE. Only the parser of the line's command is built, so that
an answer takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin

from cllm.arguments import Parser
from cllm.config.load import ConfigParser, schema_keys
from cllm.config.shipped import shipped_configs, shipped_notebooks
from cllm.plan.presets import preset_names


def complete(parser: Parser, commands: Collection[str]) -> int:
    """Answer the shell and exit; return the exit status 1 if argcomplete is not installed.

    Args:
        parser: of `cllm`, with a subparser for each command.
        commands: names of the commands.
    """
    try:
        import argcomplete
    except ImportError:
        return 1
    words = os.environ.get("COMP_LINE", "").split()
    if len(words) > 1 and words[1] in commands:
        (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        subparsers.choices[words[1]] = command_parser(words[1])
    argcomplete.autocomplete(parser, always_complete_options=False)  # ends the process
    return 0


def command_parser(name: str) -> Parser:
    """The parser of a command, in which settings are options, and options know the values that are not files."""
    parser: Parser = importlib.import_module(f"cllm.commands.{name}").make_parser(f"cllm {name}")
    if isinstance(parser, ConfigParser):
        for key, field in schema_keys(parser.schema).items():
            with contextlib.suppress(argparse.ArgumentError):  # the option --config, in a recipe a setting as well
                choices = preset_names() if key.endswith("kv.preset") else literals(field.annotation)
                parser.add_argument(f"--{key}", choices=choices)
    for action in parser._actions:
        if action.dest == "config" or (name, action.dest) == ("configs", "name"):
            action.completer = shipped_or_file if action.option_strings else shipped  # type: ignore[attr-defined]
    return parser


def literals(annotation: Any) -> list[str] | None:
    """The values of a `Literal` or bool annotation as YAML; None for other types."""
    if annotation is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else None


def shipped(**_: Any) -> list[str]:
    """Names of the shipped configs, recipes and notebooks."""
    return [*shipped_configs(), *shipped_notebooks()]


def shipped_or_file(prefix: str, **_: Any) -> list[str]:
    """Names of the shipped configs and recipes, and YAML files whose path begins with `prefix`."""
    from argcomplete.completers import FilesCompleter

    return [*shipped_configs(), *FilesCompleter(("yaml", "yml"))(prefix)]
