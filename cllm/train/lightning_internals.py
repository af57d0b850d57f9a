"""Every private part of Lightning that training touches, each because no public one does the same.

pyproject.toml pins Lightning's minor version. tests/train/test_lightning.py fails with a sentence if a part changes.
docs/architecture.md lists the public ways that are used instead of further private ones. One more private method,
`DeepSpeedStrategy._initialize_deepspeed_train`, is overridden in strategy.py.
"""

from __future__ import annotations

import threading
from typing import Any

from lightning.pytorch import Trainer

OBSERVER = "child-process-observer"
"""Name of the thread in which Lightning watches the processes that it has started."""


def disable_signal_handling(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: `StopWhenDone` does.

    Its handler of SIGTERM would end a run in the middle of a step. And before each micro-batch it would broadcast from
    the first process whether that has received one, which makes every host wait for its device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def validate_before_training(trainer: Trainer, missed: bool) -> None:
    """Make a trainer that resumes validate before it trains, if `missed` is true on the first process.

    Lightning does so only at the start of a run, and not after it has restored the state of its validation loop.
    """
    check = trainer._run_sanity_check

    def run() -> None:
        if trainer.strategy.broadcast(missed):
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            check()

    trainer._run_sanity_check = run  # type: ignore[method-assign]


def set_micro_batches(checkpoint: dict[str, Any], batches: int) -> None:
    """Make a loaded checkpoint count `batches` micro-batches so far.

    Lightning ends a step, and validates, if that count is a multiple of a step's micro-batches on one device. So it has
    to be counted as if the number of devices had always been the present one.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for span in ("total", "current"):  # saved before the end of the batch, which Lightning then completes itself
        progress[span] |= dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}


def stop_process_observer() -> None:
    """End Lightning's observer of the processes that it has started.

    After the end of one it kills all of them, itself included, without a message; `RankWatch` does it with one.
    """
    for thread in threading.enumerate():
        if thread.name == OBSERVER:
            observer: Any = thread
            observer._child_processes = []
