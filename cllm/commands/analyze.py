"""Measure the similarity of cached keys and values between a model's layers: heat maps and JSON.

    %(prog)s runs/NAME [--data PATH ...] [--sequences 4] [--length N] [--group 1 2 4 8] [--energy 0.95]

docs/posthoc.md describes the figures.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.arguments import Parser, number, whole_number
from cllm.errors import UserError, one_line
from cllm.signals import stoppable

if TYPE_CHECKING:
    from torch import Tensor


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} runs/NAME")
    count, share = whole_number(1), number(above=0, up_to=1)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, .ckpt file or Hugging Face folder")
    add("--data", nargs="+", default=[], metavar="PATH", help="prepared folders or text files, such as one for each "
        "domain (default: the run's first validation set)")  # fmt: skip
    add("--posthoc", nargs="+", default=[], metavar="SPEC", help="also measure the error that these methods make in "
        "each layer, and its correlation with the effective rank; @FILE: those on the lines of a file")  # fmt: skip
    add("--calibration", type=Path, metavar="PATH", help="prepared folder (its train split) or text file on which "
        "methods of --posthoc calibrate (default: the first sequence)")  # fmt: skip
    add("--sequences", type=count, default=4, metavar="N", help="number of sequences to cache (default: %(default)s)")
    add("--length", type=count, metavar="N", help="tokens of each sequence (default: the training length)")
    add(
        "--group",
        type=count,
        nargs="+",
        default=[1, 2, 4, 8],
        help="sizes of the groups of layers whose ranks are measured (default: 1 2 4 8)",
    )
    add(
        "--energy",
        type=share,
        default=0.95,
        help="share of the sum of squared singular values that ranks keep (default: %(default)s)",
    )
    parser.add_device()
    add("--out", type=Path, metavar="DIR", help="folder of the files (default: evaluation/ in the run's folder, "
        "runs/evaluation/ for a Hugging Face folder)")  # fmt: skip
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm analyze") -> int:
    """Run the command line; returns its exit status."""
    options = make_parser(program).parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    # Imported late: --help and mistakes in arguments answer without loading torch.
    import torch

    from cllm.environment import choose_device
    from cllm.evaluate.calibration import calibration_tokens, check_is_used
    from cllm.evaluate.outputs import png
    from cllm.evaluate.perplexity import Settings, open_sets
    from cllm.evaluate.subjects import load_subject
    from cllm.evaluate.suites.posthoc import specs_of
    from cllm.evaluate.windows import Stream, pieces
    from cllm.files import write_atomic
    from cllm.posthoc import ranks
    from cllm.posthoc.analysis import collect, figure
    from cllm.posthoc.registry import parse

    device = choose_device(options.device)
    subject = load_subject(options.run, device)
    print(f"results go to {subject.results(options.out)}", file=sys.stderr, flush=True)
    length, _, _ = Settings(window=options.length).resolve(subject, device, window_option="--length")
    options.posthoc = specs_of(options.posthoc)
    for spec in options.posthoc:
        parse(spec)
    check_is_used(options.calibration, options.posthoc)
    records, files = [], []
    for text in itertools.islice(open_sets(subject, options.data), len(options.data) or 1):
        stream = Stream(text.source, start_id=subject.start_id)
        read = itertools.islice(pieces(subject, stream, length), options.sequences)
        batches = [torch.from_numpy(piece[None, :-1]).to(device) for piece in read]
        if not batches:
            raise UserError(f"{text.path}: too short for a sequence of {length} tokens; lower --length")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
            engine = subject.engine()
            slots = collect(engine, batches, heads=True)
            kinds = {kind: _measure(x, options) for kind, x in slots.items()}
            ids = calibration_tokens(subject, options.calibration, batches[0])
            lost = ranks.losses(kinds, engine, batches, options.posthoc, ids)
        record = {"run": subject.name, "checkpoint": subject.checkpoint, "set": text.name, "data": str(text.path),
                  "sequences": len(batches), "length": length, "kinds": kinds}  # fmt: skip
        records.append(record | ({"posthoc": lost} if lost else {}))
        folder = subject.results(options.out)
        paths = [folder / f"analysis-{text.name}.{suffix}" for suffix in ("json", "png")]
        try:
            write_atomic(paths[0], json.dumps(records[-1], indent=1) + "\n")
            write_atomic(paths[1], png(figure(kinds)))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from None
        files += paths
    print(ranks.table(records))
    for file in files:
        print(f"written: {file}")
    return 0


def _measure(slots: dict[int, Tensor], options: Namespace) -> dict[str, Any]:
    """The measurements of one kind of tensors (N, *width)."""
    from cllm.posthoc import ranks
    from cllm.posthoc.analysis import analyze

    found = analyze({slot: x.flatten(1) for slot, x in slots.items()}, groups=options.group, energy=options.energy)
    cosines = ranks.adjacent_cosines(found["cosine"])
    return found | {"normalised_effective_rank": ranks.ranks(slots), "adjacent_cosine": cosines}
