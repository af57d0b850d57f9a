"""The options of `cllm evaluate`."""

from __future__ import annotations

from pathlib import Path

from cllm.arguments import Parser, whole_number
from cllm.evaluate.suites.registry import add_options


def options_parser(program: str, description: str | None = None) -> Parser:
    """The command line's arguments. `description` is the text above them in `--help`."""
    parser, count = Parser(prog=program, description=description), whole_number(1)
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="PATH", help="run, .ckpt file or Hugging Face folder; repeatable")
    add("--data", nargs="+", action="extend", default=[], metavar="PATH",
        help="prepared folders or text files (.txt .md: one document; .jsonl: the `text` of each line); "
        "default: the run's own validation sets")  # fmt: skip
    add("--split", default="validation", help="split of prepared folders to score (default: %(default)s)")
    add("--window", type=count, metavar="N", help="tokens that the model reads at once (default: the training length; "
        "at most 2048 for Hugging Face models)")  # fmt: skip
    add("--stride", type=count, metavar="N", help="tokens scored in each window (default: half the window)")
    add("--batch", type=count, metavar="N", help="windows or samples computed together; changes only speed and memory")
    add("--max-tokens", type=count, metavar="N", help="score only the first N tokens of each set")
    parser.add_device()
    add("--devices", metavar="LIST", help="measure on several GPUs, one process each: all, or numbers such as 0,1,2,3 "
        "(default: in this process, on the device of --device)")  # fmt: skip
    add("--per-device", type=count, default=1, metavar="N", help="with --devices: processes on each GPU (default: 1)")
    add("--processes", type=count, default=1, metavar="N", help="processes on a CPU (default: 1)")
    add("--name", metavar="SET", help="name of the set in files and TensorBoard (default: from the data's path)")
    add("--out", metavar="DIR", type=Path, help="folder of the results; nothing is then written to the run (default: "
        "evaluation/ in the run's folder; runs/evaluation/NAME-HASH for a Hugging Face folder)")  # fmt: skip
    add("--list-suites", action="store_true", help="list the suites of --suite and their options, and exit")
    add("--list-posthoc", action="store_true", help="list the methods of --posthoc and their options, and exit")
    add_options(parser)
    return parser
