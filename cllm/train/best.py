"""The checkpoints with the lowest validation losses: `train.keep_best`."""

from __future__ import annotations

import json
import math

from cllm.files import write_atomic
from cllm.rows import rows_backwards
from cllm.runs import RunFolder

_LOSS = "val/loss"


class BestCheckpoints:
    """The `count` checkpoints with the lowest `val/loss`, of those whose step was validated.

    They follow from the checkpoints and the rows of metrics.jsonl on the disk, so that a resumed run has the same ones
    as an uninterrupted run. Deleting the others one by one is exact, because a checkpoint that is not among the best
    so far never becomes one of them. Exists on the first process only; with a count of 0 it does nothing.

    Args:
        folder: of the run.
        count: checkpoints to keep.
    """

    def __init__(self, folder: RunFolder, count: int):
        self.folder, self.count = folder, count
        self._losses: dict[int, float] = {}
        saved = {step for step, _ in folder.checkpoints()} if count else set()
        for _, row in rows_backwards(folder.metrics_file) if saved else ():
            if row["step"] < min(saved):
                break
            if row["step"] in saved and row.get(_LOSS) is not None:
                self._losses.setdefault(row["step"], row[_LOSS])

    def add(self, step: int, loss: float) -> None:
        """Take note of a validation after `step`, in nats per token. A loss that is not finite does not count."""
        if self.count and math.isfinite(loss):
            self._losses[step] = loss

    def steps(self) -> list[int]:
        """Steps of the best checkpoints, the best first; of equal ones the earlier first."""
        if not self.count:
            return []
        saved = [step for step, _ in self.folder.checkpoints() if step in self._losses]
        return sorted(saved, key=lambda step: (self._losses[step], step))[: self.count]

    def write(self) -> None:
        """Write best.json: step, loss and path of each, the best first. Without `train.keep_best`, delete it."""
        if not self.count:
            self.folder.best_file.unlink(missing_ok=True)
            return
        best = [
            {
                "step": step,
                _LOSS: self._losses[step],
                "checkpoint": self.folder.checkpoint_path(step).relative_to(self.folder.path).as_posix(),
            }
            for step in self.steps()
        ]
        write_atomic(self.folder.best_file, json.dumps(best, indent=2) + "\n")
