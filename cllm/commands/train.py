"""Train a decoder whose layers may share, fuse or compress the keys and values of other layers.

    %(prog)s --config quickstart
    %(prog)s --config model/332m --config kv/fusedkv --dry-run
    %(prog)s --config quickstart --model.kv.preset cla --name cla --optim.lr 2e-3
    %(prog)s --config runs/cla/config.yaml --resume auto
    %(prog)s --help optim

`cllm configs` lists the shipped configs. `--help WORD` shows only the settings that have to do with a word.
docs/training.md describes runs, docs/plans.md describes model.kv. README.md defines the words owner, slot, share and
fuse.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from cllm.arguments import number
from cllm.config import Config
from cllm.config.load import ConfigParser, config_parser
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config

if TYPE_CHECKING:
    from cllm.train.probes import Probe


def make_parser(program: str) -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "", program)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the KV plan, parameters, cache bytes, FLOPs, memory and epochs; do not train",
    )
    parser.add_argument(
        "--tokens-per-second",
        metavar="N",
        type=number(above=0),
        help="with --dry-run: print the hours that the run takes at this rate over all devices (default: the rate of "
        "the newest run in runs_dir with the same model and step on the same hardware)",
    )
    parser.add_argument(
        "--price",
        metavar="P",
        type=number(above=0),
        help="with --dry-run: print the cost at this price of a device for an hour",
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete config as YAML; do not train")
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="resume from the newest checkpoint (auto) or from this one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    return parser


@one_line
@stoppable("--resume auto goes on from the newest checkpoint; without one it begins at step 0", signal.SIGUSR1)
def main(argv: list[str] | None = None, *, program: str = "cllm train") -> int:
    """Run the command line; returns its exit status: 3 for a run that was stopped and can be resumed."""
    arguments, overrides = make_parser(program).parse_settings(argv)
    if not arguments.config:
        raise UserError(
            "give at least one --config FILE; --config quickstart (configs/quickstart.yaml) is a good first one"
        )
    for name in ("tokens_per_second", "price"):
        if getattr(arguments, name) is not None and not arguments.dry_run:
            raise UserError(f"--{name.replace('_', '-')} is given without --dry-run, which alone uses it")
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        print(yaml.safe_dump(config.as_yaml_data(), sort_keys=False), end="")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Imported late, so that --help and config mistakes do not load torch.
    from cllm.train.launch import is_first_process
    from cllm.train.run import train, with_vocabulary

    if arguments.dry_run:
        from cllm.train.dryrun import dry_run

        if config.evaluate_suites:
            from cllm.evaluate.during_training import choose_suites

            choose_suites(config)
        speed, price = arguments.tokens_per_second, arguments.price
        print(dry_run(with_vocabulary(config), tokens_per_second=speed, price=price))
        return 0
    probes: Sequence[Probe] = ()
    if config.evaluate_suites:
        from cllm.evaluate.during_training import training_probes

        probes = training_probes(config)
    folder = train(config, resume=arguments.resume, overwrite=arguments.overwrite, probes=probes)
    if (early := folder.early_stop()) is not None:
        print(f"run finished early, after step {early} of {config.train.steps}: {folder.path}  (see early_stop.json)")
        return 0
    step = max((step for step, _ in folder.checkpoints()), default=folder.last_step())  # rows may be lost
    if step < config.train.steps and folder.last_step() < config.train.steps:
        print(f"run stopped at step {step} of {config.train.steps}: {folder.path}  (--resume auto goes on)")
        # Launchers end all other processes as soon as one ends with another status than 0.
        return EXIT_STOPPED if is_first_process() else 0
    print(f"run finished: {folder.path}  (tensorboard --logdir {config.runs_dir})")
    return 0
