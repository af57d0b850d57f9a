"""List designs, KV heads and compressions that fit a GPU, with cache bytes, decode time and measured loss.

    %(prog)s --config model/332m --gpu H100 --context 32768 --concurrency 16
    %(prog)s --config model/332m --model.n_layers 12 --memory 24GB --bandwidth 1TB/s --designs mha fusedkv
    %(prog)s --run runs/NAME --gpu H200 --context 65536 --losses runs/study/results --picture plan.png
    %(prog)s --config model/332m --gpu L4 --view heads

The shape is that of a config with settings, or of a trained run, checkpoint or Hugging Face folder. Bytes are exact;
times are bytes / bandwidth and a measured factor; losses are measured ones only, and a dash stands where there is no
measurement. Notes under the table name the measurements and what is extrapolated. docs/planner.md describes all.
"""

from __future__ import annotations

import fnmatch
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import number, whole_number
from cllm.config import Config, ModelConfig
from cllm.config.load import ConfigParser, config_parser
from cllm.counts import parse_count
from cllm.errors import UserError, one_line
from cllm.signals import stoppable

if TYPE_CHECKING:
    from cllm.planner.candidates import Candidate, Request
    from cllm.planner.measured import Measurements
    from cllm.planner.report import Listed

VIEWS = ("table", "heads")


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def make_parser(program: str) -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "", program)
    parser.usage_hint = f"{program} --config model/332m --gpu H100"
    add, count = parser.add_argument, whole_number(1)
    add("--run", metavar="PATH", help="take the shape of this run, checkpoint or Hugging Face folder, not of a config")
    add("--gpu", metavar="NAME", help="a GPU of the table in docs/planner.md: H100, H200, B200, A100-80GB, L40S, ...")
    add("--memory", metavar="SIZE", help="memory of the GPU, such as 80GB or 75GiB; wins over that of --gpu")
    add("--bandwidth", metavar="RATE", help="its memory bandwidth, such as 3.35TB/s; wins over that of --gpu")
    add("--context", type=count, metavar="N", help="tokens of each sequence (default: model.max_seq_len)")
    add("--concurrency", type=count, default=1, metavar="N", help="sequences at once (default: %(default)s)")
    add(
        "--headroom",
        type=number(least=0, up_to=0.99),
        default=0.05,
        metavar="SHARE",
        help="share of the memory that neither weights nor caches use (default: %(default)s)",
    )
    add(
        "--designs",
        nargs="+",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="designs to try (default: every preset with its default settings, and the config's own; with "
        "--run only its own)",
    )
    add("--kv-heads", nargs="+", type=count, default=[], metavar="N", help="KV heads to try with each design "
        "(default: the query heads, halved until odd, and 1)")  # fmt: skip
    add("--compression", nargs="+", metavar="PATTERN", help="compressions to try, as patterns of measured specs, "
        "such as 'xkv*' (default: all measured on the design); none: no compression")  # fmt: skip
    add("--losses", nargs="+", type=Path, default=[], metavar="PATH", help="own measurements besides the shipped ones: "
        "a table in JSON, a sweep's CSV, records of evaluate --posthoc, or a folder of a study's results")  # fmt: skip
    add("--tokens", type=_count, metavar="N", help="compare losses of models after about N training tokens, such as "
        "490M (default: those after which most were measured, own ones first)")  # fmt: skip
    add("--window", type=_count, metavar="N", help="compare losses of windows of N tokens (default: likewise)")
    add("--text", metavar="NAME", help="compare losses on this text, as notes under the table name it (default: "
        "likewise)")  # fmt: skip
    add("--base-model", metavar="NAME", help="compare losses of this model, whose training tokens are not known "
        "(default: likewise)")  # fmt: skip
    add("--no-shipped", action="store_true", help="leave the shipped losses out; decode factors are still used")
    add("--view", choices=VIEWS, default="table", help="heads: cache by KV heads and sharing (default: %(default)s)")
    add(
        "--all",
        action="store_true",
        help="list every candidate, also those that do not fit; without it compressions are listed on the front, with "
        "--run also the nearest of other methods, and all with --compression; unmeasured KV heads with --kv-heads",
    )
    add("--json", action="store_true", help="print all candidates as JSON")
    add("--csv", action="store_true", help="print all candidates as CSV")
    add("--picture", type=Path, metavar="FILE", help="also draw the view into this PNG file")
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm plan") -> int:
    """Run the command line; returns its exit status."""
    options, overrides = make_parser(program).parse_settings(arguments)
    _check(options, overrides)
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from tqdm import tqdm

    from cllm.planner import report
    from cllm.planner.candidates import Request, candidates, designs, mark_front
    from cllm.planner.gpus import find_gpu
    from cllm.planner.keys import config_key

    gpu = find_gpu(options.gpu, options.memory, options.bandwidth)
    model = _model(options, overrides)
    context = options.context or model.max_seq_len
    request = Request(gpu=gpu, context=context, concurrency=options.concurrency, headroom=options.headroom)
    checkpoint = model if options.run else None
    chosen = {Path(options.run).resolve().name: model} if options.run and not options.designs else designs(
        model, words=options.designs, heads=options.kv_heads
    )  # fmt: skip
    measured = _measurements(options, {config_key(config) for config in chosen.values()})
    specs = _specs(options, measured)
    bar = partial(tqdm, desc="designs", total=len(chosen), disable=None, leave=False)
    found = mark_front(list(candidates(chosen, request, measured, specs=specs, reference=checkpoint, progress=bar)))
    if options.picture is not None:
        _draw(options, found, request, measured)
    if options.json:
        print(report.json_text(found, model, request, measured))
    elif options.csv:
        print(report.csv_text(found, measured), end="")
    elif options.view == "heads":
        print(report.heads_text(found, model, request, measured))
    else:
        listed: Listed = "near" if options.run else "front"
        listed = "all" if options.all or options.compression is not None else listed
        shown = found if options.all else report.choose(
            found, compressions=listed, heads=bool(options.kv_heads), asked=options.designs
        )  # fmt: skip
        print(report.text(found, shown, model, request, measured, compressions=listed))
    return 0


def _check(options: Namespace, overrides: Sequence[str]) -> None:
    if options.run and (options.config or overrides):
        raise UserError("--run: gives the shape, so --config and settings are not allowed beside it")
    if not options.run and not options.config:
        raise UserError("give the shape: --config FILE, such as --config model/332m, or --run PATH")
    if options.json and options.csv:
        raise UserError("--csv: not allowed beside --json")
    if options.picture is not None and options.picture.suffix != ".png":
        raise UserError(f"--picture is {str(options.picture)!r}; allowed: a file that ends in .png")


def _model(options: Namespace, overrides: Sequence[str]) -> ModelConfig:
    if options.run:
        from cllm.hub.open import open_config

        model = open_config(options.run, label="--run ")
    else:
        from cllm.uptrain.complete import load_config

        model = load_config(options.config, list(overrides)).model
    if model.vocab_size is None:
        raise UserError(
            "model.vocab_size is null; set it, such as --model.vocab_size 32000: the weights' bytes need it"
        )
    return model


def _measurements(options: Namespace, keys: Collection[str | None]) -> Measurements:
    """The measurements under the conditions that those of designs with `keys` have most; own ones come first."""
    from cllm.planner.collect import read_losses
    from cllm.planner.conditions import choose_conditions
    from cllm.planner.measured import Measurements
    from cllm.planner.table import Table, shipped_table

    shipped = shipped_table()
    if options.no_shipped:
        shipped = Table(decode=shipped.decode)
    own = [read_losses(path) for path in options.losses]
    losses = [[m for table in tables for m in table.losses if m.key in keys] for tables in (own, [shipped])]
    conditions = choose_conditions(
        losses, tokens=options.tokens, context=options.window, text=options.text, base_model=options.base_model
    )
    return Measurements([*own, shipped], conditions)


def _specs(options: Namespace, measured: Measurements) -> set[str] | None:
    """The compressions that `--compression` selects; None: all."""
    if options.compression is None:
        return None
    if options.compression == ["none"]:
        return set()
    found: set[str] = set()
    for pattern in options.compression:
        matching = {spec for spec in measured.specs() if fnmatch.fnmatchcase(spec, pattern)}
        if not matching:
            names = sorted({spec.partition(":")[0] for spec in measured.specs()})
            raise UserError(
                f'--compression "{pattern}": no spec that was measured on {measured.conditions.description} matches; '
                f"measured: {', '.join(names)} (patterns such as 'xkv*'), or none"
            )
        found |= matching
    return found


def _draw(options: Namespace, found: Sequence[Candidate], request: Request, measured: Measurements) -> None:
    from cllm.evaluate.outputs import png
    from cllm.files import write_atomic
    from cllm.planner.picture import front_figure, heads_figure

    draw = heads_figure if options.view == "heads" else front_figure
    picture = png(draw(found, request, measured.conditions))
    try:
        write_atomic(options.picture, picture)
    except OSError as error:
        raise UserError(f"--picture {options.picture}: cannot be written: {error}") from None
    print(f"written: {options.picture}", file=sys.stderr)
