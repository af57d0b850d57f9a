"""Serve an exported folder with vLLM's own OpenAI server.

    %(prog)s out/fusedkv --port 8000 --dtype float32 [options of vLLM's server]

It checks the folder, the plan and the port, and becomes vLLM's server. Options besides those below are vLLM's:

    --host 127.0.0.1 --port 8000   where the server listens; vLLM's default host is every address of the machine
    --dtype float32                vLLM's default turns fp32 weights into bf16
    --max-model-len 4096           longest context, at most the model's
    --kv-cache-memory-bytes N      size of the KV cache; without a GPU at most 4 GiB by default
    --block-size 32                tokens of a block of the cache; without a GPU a multiple of 32
    --skip-tokenizer-init          serve token ids only

`python -m vllm.entrypoints.openai.api_server --help=all` lists the others. See docs/serving.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser
from cllm.errors import one_line
from cllm.signals import stoppable


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} out/fusedkv --port 8000")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that convert export or import made")
    parser.add_argument("--check", action="store_true", help="only check the folder, and print the cache's entries")
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm serve") -> int:
    """Check the folder, and become vLLM's server. Returns only with `--check`."""
    options, words = make_parser(program).parse_known_args(arguments)
    # Imported late: --help and mistakes in arguments answer without loading the decoder.
    from cllm.serve.launch import check_plan, check_server, describe, server_command

    if options.check:
        print("\n".join(describe(check_plan(options.folder, words))))
        return 0
    check_server(options.folder, words)
    command = server_command(options.folder, words)
    print(" ".join(command), file=sys.stderr, flush=True)
    os.execv(command[0], command)
