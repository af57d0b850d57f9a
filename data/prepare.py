"""Prepare a corpus for training: text in, shards of tokens out.

    python data/prepare.py --config data/recipes/stdlib.yaml [--out DIR] [--force] [--section.key VALUE ...]

The recipes in data/recipes/ are examples of what can be said; docs/data.md tells the rest.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.cli import config_parser, load
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.report import summary
from cllm.errors import UserError, one_line


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = config_parser(Recipe, str(__doc__))
    parser.add_argument("--force", action="store_true", help="replace a prepared folder of a different recipe")
    options, overrides = parser.parse_settings(arguments)
    if not options.config:
        shipped = sorted(path.name for path in (Path(__file__).parent / "recipes").glob("*.yaml"))
        raise UserError(f"no recipe: give --config data/recipes/NAME.yaml (there are {', '.join(shipped)})")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cllm").setLevel(logging.INFO)
    try:
        print(summary(prepare(load(Recipe, options.config, overrides), force=options.force)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
