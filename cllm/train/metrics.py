"""The writer of metrics: rows go to `metrics.jsonl`, to TensorBoard and to the caller's loggers, under the same tags.

Tags are the same for every design, so that runs overlay. Every row of the file has `step`, `tokens` and the time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from cllm.errors import UserError
from cllm.files import sync_tree, write_atomic
from cllm.rows import drop_rows_after, rows_of_step
from cllm.runs import RunFolder
from cllm.train.hparams import hparams_summaries

log = logging.getLogger(__name__)

# The tab Custom Scalars, in this order. The tab Scalars sorts its groups by the tags' names, which no event can change.
LAYOUT = {
    "Compare runs": {
        "validation perplexity": ["Multiline", ["val/ppl"]],
        "validation loss": ["Multiline", ["val/loss"]],
        "bits per byte": ["Multiline", ["val/bits_per_byte"]],
        "training loss": ["Multiline", ["train/loss"]],
        "associative-recall loss": ["Multiline", ["val/ar_loss"]],
    },
    "Training": {
        "gradient norm": ["Multiline", ["train/gradient_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "skipped steps": ["Multiline", ["train/skipped_steps"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["throughput/mfu"]],
        "peak memory, GiB": ["Multiline", ["memory/peak_gib"]],
    },
}
_FINAL = "hp/val_ppl"
COMMON_KEYS = ("step", "tokens", "time")
"""Keys of every row that are not metrics."""


class MetricsLog:
    """Appends rows. It exists on the first process only.

    A resumed run first drops all rows after `start_step` from `metrics.jsonl` and TensorBoard: a crash has lost their
    steps, which come again. Rows of `start_step` are kept. A crash may have lost some of their events, so these are
    written again. `loggers` get no row twice from one process, but a crash cannot take back what they have logged.
    """

    def __init__(self, folder: RunFolder, *, start_step: int, tokens_per_step: int, loggers: Sequence[Logger] = ()):
        self.tokens_per_step, self.loggers = tokens_per_step, loggers
        self._run, self._events = folder.name, folder.tensorboard_folder
        if start_step and folder.metrics_file.exists():
            drop_rows_after(folder.metrics_file, start_step)
        else:
            if start_step:
                log.warning(
                    "%s: missing; it begins again without the rows up to step %d", folder.metrics_file, start_step
                )
            write_atomic(folder.metrics_file, "")
        self._file = folder.metrics_file.open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(self._events), purge_step=start_step or None, flush_secs=10)
        for row in rows_of_step(folder.metrics_file, start_step):
            values = {tag: math.nan if value is None else value for tag, value in row.items() if tag not in COMMON_KEYS}
            if not all(isinstance(value, int | float) for value in (row.get("time"), *values.values())):
                raise UserError(
                    f"{folder.metrics_file}: a row of step {start_step} is not one that a run writes: `time` and all "
                    "values must be numbers"
                )
            self._add_events(start_step, values, row["time"])

    def start(self, hyperparameters: dict[str, Any], config_text: str, plan: bytes) -> None:
        """Write the constants of the run: layout, hyperparameters, the config as text, the plan as a PNG file."""
        self.board.add_custom_scalars(LAYOUT)
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hyperparameters.items()}
        for summary in hparams_summaries(self._run, flat, {_FINAL: "validation perplexity"}):
            self.board._get_file_writer().add_summary(summary)  # add_hparams would begin another run
        self.board._get_file_writer().add_summary(_picture("kv/plan", plan), 0)
        self.board.add_text("config", f"```yaml\n{config_text}\n```", 0)
        for logger in self.loggers:
            logger.log_hyperparams(flat)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a row after optimizer step `step`. Values that are not finite become null in the file."""
        row: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, "time": time.time()}
        self._add_events(step, values, row["time"])
        row |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        for logger in self.loggers:
            logger.log_metrics({"tokens": row["tokens"], **values}, step=step)

    def _add_events(self, step: int, values: dict[str, float], seconds: float) -> None:
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step, seconds)
        self.board.add_scalar("tokens", step * self.tokens_per_step, step, seconds)
        if "val/ppl" in values:
            self.board.add_scalar(_FINAL, values["val/ppl"], step, seconds)

    def sync(self) -> None:
        """Write all rows and events so far through to the disk. A checkpoint gets its name only after that."""
        for logger in self.loggers:
            logger.save()
        self.board.flush()
        sync_tree(self._events)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self.board.close()


def _picture(tag: str, png: bytes) -> Summary:
    """A PNG file as it is: `add_image` would decode it and write another. Its size is in its first chunk."""
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def publish(trainer: Trainer, values: dict[str, float]) -> None:
    """Make `values` known to callbacks that monitor them: `trainer.callback_metrics`, fp64 scalars on the CPU."""
    trainer.callback_metrics.update({tag: torch.tensor(value, dtype=torch.float64) for tag, value in values.items()})
