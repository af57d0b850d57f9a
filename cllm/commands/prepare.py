"""Prepare a corpus for training: tokenise text and write the tokens as shards.

    %(prog)s --config recipes/stdlib [--out DIR] [--force] [--section.key VALUE ...]
    %(prog)s --verify data/prepared/stdlib

`cllm configs` lists the shipped recipes, which are examples; docs/data.md describes every setting.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cllm.config.load import ConfigParser, config_parser, load_settings
from cllm.config.shipped import shipped_configs
from cllm.data.integrity import verify_folder
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.report import summary
from cllm.errors import UserError, one_line
from cllm.signals import stoppable


def make_parser(program: str) -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Recipe, __doc__ or "", program)
    parser.add_argument("--force", action="store_true", help="replace a folder that was prepared by a different recipe")
    parser.add_argument(
        "--verify",
        action="append",
        metavar="DIR",
        default=[],
        help="check a prepared folder for damage: read all files and compare their hashes",
    )
    return parser


@one_line
@stoppable("the same command resumes after the last finished shard")
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm prepare") -> int:
    """Run the command line; returns its exit status: 3 if it was stopped."""
    options, overrides = make_parser(program).parse_settings(arguments)
    if options.verify:
        if options.config or overrides or options.force:
            raise UserError(
                "--verify reads what is there and prepares nothing: give it without a recipe and its settings"
            )
        for folder in options.verify:
            manifest = verify_folder(folder)
            print(summary(manifest), f"verified: {len(manifest.files())} files as they were written", sep="\n")
        return 0
    if not options.config:
        shipped = [name for name in shipped_configs() if name.startswith("recipes/")]
        raise UserError(f"no recipe: give --config FILE, as those in data/recipes, or one of {', '.join(shipped)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cllm").setLevel(logging.INFO)
    print(summary(prepare(load_settings(Recipe, options.config, overrides), force=options.force)))
    return 0
