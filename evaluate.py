"""Measure perplexity and bits per byte of trained models, and what compressing their caches costs.

    python evaluate.py --run runs/NAME [--run ...] [--data FOLDER_OR_TEXT_FILE ...] [--window N] [--stride N]
    python evaluate.py --run runs/NAME --posthoc xkv:group=4,ratio=4 [--posthoc ...] [--prefix N]

A run is a run folder (its newest checkpoint), one checkpoint file, or a Hugging Face checkpoint folder. Without --data
a run is scored on its own validation sets. docs/evaluation.md says what exactly is measured, docs/posthoc.md what
--posthoc does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser, whole_number
from cllm.errors import UserError, one_line
from cllm.signals import stoppable


def parser() -> Parser:
    """The command line's arguments."""
    parser, count = Parser(description=__doc__), whole_number(1)
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="PATH", help="run, .ckpt or Hugging Face folder; repeat it")
    add("--data", nargs="+", action="extend", default=[], metavar="PATH",
        help="prepared folders or text files (.txt .md: one document; .jsonl: the `text` of each line); "
        "default: the run's own validation sets")  # fmt: skip
    add("--split", default="validation", help="split of prepared folders (default: %(default)s)")
    add("--window", type=count, metavar="N", help="tokens of context fed at once (default: the training length, at "
        "most 2048 for Hugging Face models)")  # fmt: skip
    add("--stride", type=count, metavar="N", help="tokens each window scores (default: half the window)")
    add("--batch", type=count, metavar="N", help="windows computed together; changes speed alone")
    add("--max-tokens", type=count, metavar="N", help="only the first N tokens of each set")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--name", metavar="SET", help="name of the set in file names and tags (default: from the data's path)")
    add("--out", metavar="DIR", type=Path, help="folder for SET.json; nothing is written elsewhere then (default: "
        "evaluation/ in the run's folder; runs/evaluation/NAME-HASH for a Hugging Face folder)")  # fmt: skip
    add("--posthoc", action="append", default=[], metavar="SPEC", help="compress the cache of a prefix and score what "
        "follows, e.g. xkv:group=4,ratio=4 or none; repeat it. The first 4 tokens stay exact (in the spec: sinks=N)"
    )  # fmt: skip
    add("--list-posthoc", action="store_true", help="list the methods of --posthoc and their options, and exit")
    add("--prefix", type=count, metavar="N", help="tokens of each window to compress (default: half the window)")
    add("--generate", type=whole_number(0), default=0, metavar="N", help="with --posthoc: also continue each prefix "
        "greedily by N tokens, and compare them with those after the prefix kept exact (default: 0)")  # fmt: skip
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 where one of several runs was left out."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if options.list_posthoc:
        from cllm.posthoc.registry import describe_methods

        print(describe_methods())
        return 0
    if not options.run:
        raise UserError("nothing to evaluate: give --run runs/NAME")
    if options.out and len(options.run) > 1:
        raise UserError(f"--out {options.out}: takes the results of one run, and there are {len(options.run)}")
    if options.prefix is not None and not options.posthoc:
        raise UserError(f"--prefix {options.prefix}: needs --posthoc, which says how to compress it")
    if options.generate and not options.posthoc:
        raise UserError(f"--generate {options.generate}: needs --posthoc, whose caches are compared")
    # Imported late: --help and mistakes in arguments answer without loading torch.
    import torch

    from cllm.evaluate import posthoc
    from cllm.evaluate.left_out import LeftOut
    from cllm.evaluate.perplexity import Settings, measure, open_sets, save, table
    from cllm.evaluate.subjects import load_subject

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU; allowed here: cpu, auto")
    device = torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")
    settings = Settings(
        split=options.split, window=options.window, stride=options.stride, batch=options.batch,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    records, paths = [], []
    left_out = LeftOut(len(options.run))
    try:
        for path in options.run:
            with left_out.unless_usable(path):
                subject = load_subject(path, device)
                announced = options.out is not None or subject.kind == "run"
                for text in open_sets(subject, options.data, split=settings.split, name=options.name):
                    if not announced:
                        if options.posthoc:
                            posthoc.resolve(subject, settings, options.prefix, device)
                        settings.resolve(subject, device)  # a mistake is all that is said
                        print(f"results of {path} go to {subject.results()}", file=sys.stderr, flush=True)
                        announced = True
                    if options.posthoc:
                        found = posthoc.measure(
                            subject,
                            text,
                            settings,
                            options.posthoc,
                            device,
                            prefix=options.prefix,
                            generate=options.generate,
                        )
                        paths += [posthoc.save(subject, record, options.out) for record in found]
                        records += found
                        continue
                    record = measure(subject, text, settings, device)
                    paths.append(save(subject, record, options.out))
                    records.append(record)
    finally:
        if records:
            print(
                posthoc.table(records) if options.posthoc else table(records),
                *(f"written: {path}" for path in paths),
                sep="\n",
            )
    return left_out.status()


if __name__ == "__main__":
    sys.exit(main())
