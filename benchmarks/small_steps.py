r"""The time of small training steps, in train.py's own loop, with and without `train.cuda_graph`.

    python -m benchmarks.small_steps runs/shares/configs/*.yaml --out small_steps.json

Each CONFIG is one of train.py, such as that of a student. It is trained for some steps in a temporary folder, without
validation. `step` is the wall time of a step, `kernels` that of its kernels on the GPU: where they are far apart, the
host limits the step. A config that cannot be recorded has its obstacle in place of times.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity

from benchmarks.record import KEPT, Record, Row
from benchmarks.timing import free, wall_clock
from cllm.arguments import Parser, whole_number
from cllm.environment import choose_device, environment
from cllm.errors import UserError, one_line
from cllm.signals import Interrupted, raise_if_stopped, stoppable
from cllm.train.run import train
from cllm.train.stop import StopWhenDone
from cllm.uptrain.complete import load_config

_WARM_UP, _PROFILED = 20, 5
"""Steps before the timed ones, and those whose kernels are counted after them."""


class Timer(Callback):
    """Times `steps` steps, then profiles some more."""

    def __init__(self, steps: int):
        self.steps, self.row = steps, Row()
        self.stopped: int | None = None
        """The signal that ended training early; None without one."""
        self._begin = 0.0
        self._trace: Any = None

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin and end the timed and the profiled steps."""
        if batch_idx == _WARM_UP:
            self._begin = wall_clock(module.device)
        if batch_idx == _WARM_UP + self.steps:
            self.row["step_ms"] = 1000 * (wall_clock(module.device) - self._begin) / self.steps
            if module.device.type == "cuda":
                self._trace = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
                self._trace.start()
        if batch_idx == _WARM_UP + self.steps + _PROFILED and self._trace is not None:
            wall_clock(module.device)
            self._trace.stop()
            events = self._trace.events()
            kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
            self.row["kernels_ms"] = sum(event.self_device_time_total for event in kernels) / 1000 / _PROFILED
            self.row["kernels"] = round(len(kernels) / _PROFILED)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Note whether a signal ended training."""
        for stop in (c for c in trainer.callbacks if isinstance(c, StopWhenDone)):  # type: ignore[attr-defined]
            self.stopped = stop.received if stop.interrupted else None


def measure(config: Path, *, graph: bool, steps: int, words: Sequence[str]) -> Row:
    """One row: `step_ms`, `tokens_per_s` and, on a GPU, `kernels_ms` and `kernels` of a step.

    Args:
        config: of train.py.
        graph: `train.cuda_graph`.
        steps: timed steps.
        words: settings as on train.py's command line.

    Raises:
        UserError: for a config that cannot be trained, or not as a graph.
        Interrupted: if a signal ended training early.
    """
    total = str(_WARM_UP + steps + _PROFILED + 1)
    with tempfile.TemporaryDirectory() as folder:
        more = ("--runs_dir", folder, "--name", config.stem, "--train.steps", total, "--train.validate_every", "null")
        loaded = load_config([config], [*more, "--train.cuda_graph", str(graph).lower(), *words])
        timer = Timer(steps)
        train(loaded, callbacks=[timer])
    if timer.stopped is not None:
        raise Interrupted(timer.stopped)
    free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = loaded.train.global_batch * loaded.data.seq_len
    return {**timer.row, "tokens": tokens, "tokens_per_s": 1000 * tokens / timer.row["step_ms"]}


def line(row: Row) -> str:
    """A row of the Markdown table."""
    graph = "yes" if row["graph"] else "no"
    if "obstacle" in row:
        return f"| {row['config']} | {graph} | {row['obstacle']} | | | |"
    kernels = [f"{row['kernels_ms']:.1f}", f"{row['kernels']:,}"] if "kernels" in row else ["", ""]
    cells = [row["config"], graph, f"{row['step_ms']:.1f}", *kernels, f"{row['tokens_per_s']:,.0f}"]
    return "| " + " | ".join(cells) + " |"


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m benchmarks.small_steps", description=__doc__)
    add = parser.add_argument
    add("configs", nargs="+", type=Path, metavar="CONFIG", help="files of train.py")
    add("--steps", type=whole_number(1), default=60, metavar="N", help="timed steps (default: %(default)s)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings",
        help="settings of all configs, such as train.micro_batch=8")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="JSON with all rows")
    return parser


@one_line
@stoppable(kept=KEPT)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = parser().parse_args(arguments)
    words = [
        word for setting in options.settings for word in ("--" + setting.partition("=")[0], setting.partition("=")[2])
    ]
    record = Record({"environment": environment()}, options.out)
    gpu = choose_device("auto").type == "cuda"
    print("| config | graph | step, ms | kernels, ms | kernels | tokens/s |\n|---|---|---:|---:|---:|---:|", flush=True)
    for config in options.configs:
        for graph in (False, True) if gpu else (False,):
            row: Row = {"config": config.stem, "graph": graph}
            try:
                row |= measure(config, graph=graph, steps=options.steps, words=words)
            except UserError as error:
                raise_if_stopped(error)
                if not graph:
                    raise
                row["obstacle"] = str(error)
            record.add(row)
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
