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

from cllm.cache.accounting import kv_bytes
from cllm.config import Config
from cllm.config.load import validate
from cllm.data.module import DataModule
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.kernels.cross_entropy import IGNORE
from cllm.model.decoder import Decoder
from cllm.uptrain.complete import complete
from cllm.uptrain.start import calibration_batches, make_student, open_teacher
from experiments.uptraining.students import data_module


@torch.no_grad()
def nats_per_token(model: Decoder, data: DataModule, device: torch.device) -> float:
    """Loss over the validation sequences, with matrix products in bf16 on every device."""
    nats, scored = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in data.val_dataloader()[0]:
        with torch.autocast(device.type, torch.bfloat16):
            nats += model.loss(batch["input_ids"].to(device), batch["labels"].to(device), reduction="none").sum()
        scored += int((batch["labels"] != IGNORE).sum())
    return nats.item() / scored


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
            own, theirs = kv_bytes(config.model), kv_bytes(teacher.config)
            found |= {"bytes_per_token": own.resident, "teacher_bytes_per_token": theirs.resident}
            if "teacher_loss" not in found:
                found["teacher_loss"] = nats_per_token(teacher.decoder.to(device), module, device)
        begin = time.perf_counter()
        try:
            student = make_student(
                config, teacher, partial(calibration_batches, config, module), device=device, resumed=False
            )
        except UserError as error:
            found["starts"][start] = {"refused": str(error)}
        else:
            seconds = time.perf_counter() - begin
            loss = nats_per_token(student.to(device).eval(), module, device)
            found["starts"][start] = {"loss": loss, "seconds": seconds}
        write_atomic(out, json.dumps(found, indent=2) + "\n")


@one_line
def main() -> int:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    measure(spec["configs"], Path(spec["out"]), torch.device(spec["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
