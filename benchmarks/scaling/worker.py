"""Train the run of a case as train.py does, its last steps profiled: python -m benchmarks.scaling.worker CONFIG N."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from benchmarks.scaling.profile import KernelProfile
from cllm.errors import one_line
from cllm.signals import stoppable
from cllm.train.run import train
from cllm.uptrain.complete import load_config


@one_line
@stoppable()
def main(file: str, profiled: str) -> None:
    """Train the config in `file` and profile the last `profiled` steps."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config([file])
    steps = int(profiled)
    folder = Path(config.runs_dir) / config.name
    for old in folder.glob("kernels-*.json"):  # of an earlier command
        old.unlink()
    callbacks = [KernelProfile(folder, first=config.train.steps - steps, steps=steps)] if steps else []
    train(config, overwrite=True, callbacks=callbacks)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
