"""List the shipped configs, recipes and notebooks, or print one.

    %(prog)s                            names, and the first line of each file's comment
    %(prog)s model/332m > mine.yaml     a copy to change
    %(prog)s notebooks/first_steps.ipynb > first_steps.ipynb

`--config NAME` of other commands finds the shipped file of that name, unless there is a file at this path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser
from cllm.config.shipped import shipped_configs, shipped_notebooks
from cllm.errors import UserError, nearest, one_line
from cllm.signals import stoppable


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="file to print (default: list all)")
    return parser


def first_comment(file: Path) -> str:
    """The file's first comment line without `#`; for a notebook its title; empty for a file without comments."""
    if file.suffix == ".ipynb":
        return json.loads(file.read_bytes())["cells"][0]["source"][0].lstrip("# ").rstrip()
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm configs") -> int:
    """Run the command line; returns its exit status."""
    options = make_parser(program).parse_args(arguments)
    shipped = shipped_configs() | shipped_notebooks()
    if options.name is None:
        width = max(map(len, shipped))
        for name, file in shipped.items():
            print(f"{name:{width}}  {first_comment(file)}".rstrip())
        return 0
    if options.name not in shipped:
        raise UserError(f"{options.name}: no such shipped config; {nearest(options.name, shipped)}")
    print(shipped[options.name].read_text(encoding="utf-8"), end="")
    return 0
