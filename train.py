#!/usr/bin/env python
"""Train a decoder whose layers declare where their keys and values come from.

python train.py --config configs/quickstart.yaml
python train.py --config configs/model/332m.yaml --config configs/kv/fusedkv.yaml --dry-run
python train.py --config configs/quickstart.yaml --model.kv.preset cla --name cla --optim.lr 2e-3
python train.py --config runs/cla/config.yaml --resume auto
"""

from __future__ import annotations

import logging
import signal
import sys

import yaml

from cllm.config import Config
from cllm.config.load import config_parser
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config


@one_line
@stoppable("--resume auto goes on from the newest checkpoint, or starts again where there is none", signal.SIGUSR1)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 3 for a run that was stopped and can be resumed."""
    parser = config_parser(Config, __doc__ or "")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, its size and its cost; do not train")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML")
    parser.add_argument("--resume", metavar="auto|FILE", help="resume from the newest checkpoint, or from this one")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    arguments, overrides = parser.parse_settings(argv)
    if not arguments.config:
        raise UserError("give at least one --config FILE; configs/quickstart.yaml is a good first one")
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

        print(dry_run(with_vocabulary(config)))
        return 0
    folder = train(config, resume=arguments.resume, overwrite=arguments.overwrite)
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


if __name__ == "__main__":
    sys.exit(main())
