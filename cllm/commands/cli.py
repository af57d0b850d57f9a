# PYTHON_ARGCOMPLETE_OK
"""`cllm COMMAND ...`: one program for all commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from cllm import __version__
from cllm.arguments import Parser
from cllm.errors import one_line
from cllm.signals import raise_if_stopped, raising

COMMANDS = {
    "prepare": "turn text into shards of tokens",
    "train": "train a model from YAML configs",
    "evaluate": "measure perplexity and bits per byte, also with compressed caches",
    "compare": "put runs into one table and one figure",
    "convert": "export runs to Hugging Face folders, and import such folders",
    "serve": "serve an exported folder with vLLM's OpenAI server",
    "analyze": "measure how similar cached keys and values of different layers are",
    "sweep": "compress the caches of runs in many ways: one table, one figure",
    "tradeoff": "train designs and sweep over them",
    "study": "train a grid of designs, rates and seeds, with intervals and a report",
    "plan": "list designs and compressions that fit a GPU, with bytes, time and measured loss",
    "configs": "list the shipped configs, recipes and notebooks, or print one",
}
"""A line of help for each command; `cllm.commands` has a module of the same name."""


def make_parser() -> Parser:
    """The parser of `cllm` itself, in which commands have no arguments yet."""
    parser = Parser(
        prog="cllm",
        description="Train and compare decoder language models whose layers declare where their keys and values come "
        "from.\n`cllm COMMAND --help` describes a command.",
        usage_hint="cllm train --config quickstart",
    )
    parser.add_argument("--version", action="version", version=f"cllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    return parser


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (default: those of the process) begin with; returns its exit status."""
    if "_ARGCOMPLETE" in os.environ:
        from cllm.commands.completion import complete

        return complete(make_parser(), COMMANDS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        with raising(signal.SIGINT):  # the other signals end the process, which has nothing to clean up yet
            command = importlib.import_module(f"cllm.commands.{words[0]}")
            raise_if_stopped()
        return command.main(words[1:], program=f"cllm {words[0]}")
    make_parser().parse_args(words)
    return 0
