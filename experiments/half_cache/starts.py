"""The perplexity of one student before training, for each of its starts. A process of its own, on one device.

    python -m experiments.half_cache.starts SPEC.json

SPEC names the configs, by start, and the file for results; it is written after every start.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cllm.config import Config
from cllm.config.load import validate
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.signals import raise_if_stopped, stoppable
from cllm.uptrain.complete import complete
from cllm.uptrain.start import calibration_batches, make_student, open_teacher
from experiments.uptraining.students import data_module, validation_loss


def measure(configs: dict[str, Any], out: Path, device: torch.device) -> None:
    """Measure the starts that `out` lacks. A start that the plan refuses gets its message instead of a loss."""
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"starts": {}}
    teacher = None
    for start, data in configs.items():
        if start in found["starts"]:
            continue
        config = validate(Config, complete(data)[0])
        module = data_module(config)
        if teacher is None:
            teacher = open_teacher(config)
            if "teacher_loss" not in found:
                found["teacher_loss"] = validation_loss(teacher.decoder.to(device), module, device, bf16=True)
        begin = time.perf_counter()
        try:
            student = make_student(
                config, teacher, partial(calibration_batches, config, module), device=device, resumed=False
            )
        except UserError as error:
            raise_if_stopped(error)
            found["starts"][start] = {"refused": str(error)}
        else:
            seconds = time.perf_counter() - begin
            loss = validation_loss(student.to(device).eval(), module, device, bf16=True)
            found["starts"][start] = {"loss": loss, "seconds": seconds}
        write_atomic(out, json.dumps(found, indent=2) + "\n")


@one_line
@stoppable("the same command goes on")
def main() -> int:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    measure(spec["configs"], Path(spec["out"]), torch.device(spec["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
