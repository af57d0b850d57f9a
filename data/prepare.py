"""Prepare a corpus for training: tokenise text and write the tokens as shards.

    python data/prepare.py --config data/recipes/stdlib.yaml [--out DIR] [--force] [--section.key VALUE ...]
    python data/prepare.py --verify data/prepared/stdlib

data/recipes/ has examples of recipes; docs/data.md describes every setting.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.config.load import config_parser, load_settings
from cllm.data.integrity import verify_folder
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.report import summary
from cllm.errors import UserError, one_line
from cllm.signals import stoppable


@one_line
@stoppable("the same command resumes after the last finished shard")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 if it was stopped."""
    parser = config_parser(Recipe, str(__doc__))
    parser.add_argument("--force", action="store_true", help="replace a folder that was prepared by a different recipe")
    parser.add_argument(
        "--verify",
        action="append",
        metavar="DIR",
        default=[],
        help="check a prepared folder for damage: read all files and compare their hashes",
    )
    options, overrides = parser.parse_settings(arguments)
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
        shipped = sorted(path.name for path in (Path(__file__).parent / "recipes").glob("*.yaml"))
        raise UserError(f"no recipe: give --config data/recipes/NAME.yaml (there are {', '.join(shipped)})")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cllm").setLevel(logging.INFO)
    print(summary(prepare(load_settings(Recipe, options.config, overrides), force=options.force)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
