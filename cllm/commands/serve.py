"""Serve an exported folder with vLLM's own OpenAI server.

    %(prog)s out/fusedkv --port 8000 --dtype float32 [options of vLLM's server]

All other options are those of vLLM's server. See docs/serving.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser
from cllm.errors import one_line


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} out/fusedkv --port 8000")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that convert export or import made")
    parser.add_argument("--check", action="store_true", help="only check the folder, and print the cache's entries")
    return parser


@one_line
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm serve") -> int:
    """Check the folder, and become vLLM's server. Returns only with `--check`."""
    options, words = make_parser(program).parse_known_args(arguments)
    # Imported late: --help and mistakes in arguments answer without loading the decoder.
    from cllm.serve.launch import check_folder, check_server, describe, server_command

    if options.check:
        print("\n".join(describe(check_folder(options.folder))))
        return 0
    check_server(options.folder, words)
    command = server_command(options.folder, words)
    print(" ".join(command), file=sys.stderr, flush=True)
    os.execv(command[0], command)
