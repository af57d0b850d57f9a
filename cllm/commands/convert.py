"""Convert between runs and checkpoint folders.

    %(prog)s export runs/NAME OUT      a run as a Hugging Face folder
    %(prog)s import LLAMA OUT          a Llama, Qwen, Mistral, Gemma or DeepSeek folder as a folder of cllm
    %(prog)s plain OUT LLAMA           a folder of cllm in the format of Llama, Qwen or Mistral

See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import Parser, whole_number
from cllm.errors import one_line
from cllm.signals import stoppable

if TYPE_CHECKING:
    from cllm.hub.export import Exported


def size(text: str) -> str:
    """The `type` of an option that takes a file size: `5GB`, `300MB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]?i?B", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"is {text or 'empty'}; allowed: a size such as 5GB or 300MB")
    return text


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options of all commands for the folder that they write."""
    parser.add_argument(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        default="5GB",
        help="largest weight file (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if this command made it")


def print_written(made: Exported, label: str = "") -> None:
    """Print the folder and its files."""
    print(f"written{label}: {made.folder}: {', '.join(made.files)}")


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add `export RUN OUT`: a run as a folder that transformers loads."""
    parser = commands.add_parser("export", help="write a run as a Hugging Face folder")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--checkpoint", type=whole_number(0), metavar="STEP", help="step of the checkpoint (default: the newest)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: %(default)s)")
    add("--no-tokenizer", action="store_true", help="do not copy the run's tokenizer")
    add("--push", metavar="REPO", help="also upload the folder to this repository (OWNER/NAME) of the Hugging Face Hub")
    add_output(parser)
    parser.set_defaults(command=export)


def export(options: argparse.Namespace) -> None:
    """Run `export`, and print a summary."""
    from cllm.hub.export import export_run
    from cllm.hub.push import check_push, push_folder

    if options.push is not None:
        check_push(options.push)
    made = export_run(
        options.run,
        options.out,
        step=options.checkpoint,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=not options.no_tokenizer,
        force=options.force,
    )
    print_written(made)
    print(f"step {made.step}, {made.parameters:,} parameters in {options.dtype}, {made.nbytes:,} bytes of weights")
    print(f'load it: import cllm; AutoModelForCausalLM.from_pretrained("{made.folder}")')
    if options.push is not None:
        print(f"uploaded: {push_folder(made.folder, options.push, f'{options.run.name} at step {made.step}')}")


def add_import(commands: argparse._SubParsersAction) -> None:
    """Add `import SOURCE OUT`: another family's checkpoint as a folder of this package."""
    parser = commands.add_parser("import", help="read another family's checkpoint")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder with config.json and safetensors")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--dtype", choices=("fp32", "bf16"), help="of the weights (default: as stored)")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin too; only tensors are unpickled")
    add_output(parser)
    parser.set_defaults(command=import_)


def import_(options: argparse.Namespace) -> None:
    """Run `import`, and print a summary."""
    from cllm.hub.exchange import import_folder

    made = import_folder(
        options.source,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        allow_pickle=options.allow_pickle,
        force=options.force,
    )
    print_written(made)
    print(f"{made.parameters:,} parameters, {made.nbytes:,} bytes of weights")


def add_plain(commands: argparse._SubParsersAction) -> None:
    """Add `plain SOURCE OUT`: a folder of this package in another family's format."""
    parser = commands.add_parser("plain", help="write a folder in another family's format")
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder that import or export made")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--family", choices=("llama", "mistral", "qwen2", "qwen3"), help="default: the first that fits")
    add_output(parser)
    parser.set_defaults(command=plain)


def plain(options: argparse.Namespace) -> None:
    """Run `plain`, and print a summary."""
    from cllm.hub.exchange import export_folder

    made, family = export_folder(
        options.source,
        options.out,
        family=options.family,
        max_shard_size=options.max_shard_size,
        force=options.force,
    )
    print_written(made, f" as {family}")
    print(f"{made.parameters:,} parameters, {made.nbytes:,} bytes of weights")


COMMANDS = (add_export, add_import, add_plain)
"""One function for each command. It adds the command's parser, and sets `command` to the function that runs it."""


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} export runs/NAME OUT")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm convert") -> int:
    """Run the command line; returns its exit status."""
    options = make_parser(program).parse_args(arguments)
    options.command(options)
    return 0
