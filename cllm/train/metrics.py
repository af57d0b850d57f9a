"""One place that writes what a run measures: `metrics.jsonl` and TensorBoard, the same tags in both.

Tags are the same for every design, so that runs overlay. Every row carries `step`, `tokens` and the time.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cllm.errors import UserError
from cllm.files import sync_tree, write_atomic
from cllm.rows import drop_rows_after, rows_of_step
from cllm.runs import RunFolder

LAYOUT = {
    "Compare runs": {
        "validation perplexity": ["Multiline", ["val/ppl"]],
        "validation loss": ["Multiline", ["val/loss"]],
        "bits per byte": ["Multiline", ["val/bits_per_byte"]],
        "training loss": ["Multiline", ["train/loss"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["throughput/mfu"]],
        "peak memory, GiB": ["Multiline", ["memory/peak_gib"]],
    },
}
_FINAL = "hp/val_ppl"
_COMMON = ("step", "tokens", "time")


class MetricsLog:
    """Appends rows; made on the process that writes, only there.

    On a resumed run, rows after `start_step` are dropped from both files first: they came from steps that a crash lost
    and that will be done again. Rows of `start_step` itself are kept; a crash may have lost some of their events, which
    are therefore written again.
    """

    def __init__(self, folder: RunFolder, *, start_step: int, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self._events = folder.tensorboard_folder
        if start_step and folder.metrics_file.exists():
            drop_rows_after(folder.metrics_file, start_step)
        else:
            write_atomic(folder.metrics_file, "")
        self._file = folder.metrics_file.open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(self._events), purge_step=start_step or None, flush_secs=10)
        for row in rows_of_step(folder.metrics_file, start_step):
            values = {tag: math.nan if value is None else value for tag, value in row.items() if tag not in _COMMON}
            if not all(isinstance(value, int | float) for value in (row.get("time"), *values.values())):
                raise UserError(
                    f"{folder.metrics_file}: a row of step {start_step} is not one that a run writes: `time` and all "
                    "values must be numbers"
                )
            self._add_events(start_step, values, row["time"])

    def start(self, hyperparameters: dict[str, Any], config_text: str, plan: Figure) -> None:
        """Write what stays the same over the run: layout, hyperparameters, the config as text, the plan's picture."""
        self.board.add_custom_scalars(LAYOUT)
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hyperparameters.items()}
        for summary in hparams(flat, {_FINAL: math.nan}):
            self.board._get_file_writer().add_summary(summary)
        self.board.add_figure("kv/plan", plan, 0)
        self.board.add_text("config", f"```yaml\n{config_text}\n```", 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row after optimizer step `step`. Values that are not finite become null in the file."""
        row: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, "time": time.time()}
        self._add_events(step, values, row["time"])
        row |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps(row) + "\n")

    def _add_events(self, step: int, values: dict[str, float], seconds: float) -> None:
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step, seconds)
        self.board.add_scalar("tokens", step * self.tokens_per_step, step, seconds)
        if "val/ppl" in values:
            self.board.add_scalar(_FINAL, values["val/ppl"], step, seconds)

    def sync(self) -> None:
        """Write all rows and events so far to the disk. A checkpoint gets its name only after that."""
        self.board.flush()
        sync_tree(self._events)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self.board.close()
