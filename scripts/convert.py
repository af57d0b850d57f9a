"""Convert between runs and checkpoint folders.

    python scripts/convert.py export runs/NAME OUT      a run as a Hugging Face folder

docs/huggingface.md tells the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.errors import one_line


def add_export(commands: argparse._SubParsersAction) -> None:
    """`export RUN OUT`: a run as a folder that transformers loads."""
    parser = commands.add_parser("export", help="write a run as a Hugging Face folder", allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint (default: the newest)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: %(default)s)")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)")
    add("--no-tokenizer", action="store_true", help="leave the tokenizer of the run's data out")
    add("--force", action="store_true", help="replace OUT if it is a checkpoint folder")
    parser.set_defaults(command=export)


def export(options: argparse.Namespace) -> None:
    """Write the folder and tell what is in it."""
    from cllm.hub.export import export_run

    made = export_run(
        options.run,
        options.out,
        step=options.checkpoint,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=not options.no_tokenizer,
        force=options.force,
    )
    print(f"written: {made.folder}: {', '.join(made.files)}")
    print(f"step {made.step}, {made.parameters:,} parameters in {options.dtype}, {made.nbytes:,} bytes of weights")
    print(f'load it: import cllm; AutoModelForCausalLM.from_pretrained("{made.folder}")')


COMMANDS = (add_export,)
"""One function for every command: it adds the command's parser, and sets `command` to what runs it."""


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = parser().parse_args(arguments)
    options.command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
