"""The orderly end of a run: after its last step, or on a signal after the current one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from cllm.files import write_atomic
from cllm.signals import STOPPING_RUNS, interrupting, leave_terminal
from cllm.train.callbacks import early_stop_reason
from cllm.train.checkpoints import Checkpoints
from cllm.train.module import step_is_complete

log = logging.getLogger(__name__)


class StopWhenDone(Callback):
    """Ends the run after its last step, with a validation, or after the step in which a signal came, without one.

    The signals are SIGTERM, SIGINT, SIGHUP (a terminal that closes) and SIGUSR1 (which srun forwards to its tasks
    without ending itself). SIGHUP stays ignored if it was, as under nohup. The run is saved first, and `--resume auto`
    continues it. A second SIGINT interrupts at once. Several processes agree on stopping every `agree_every` steps,
    because agreeing makes the host wait for the device.

    A run that another callback stops is finished: it is saved, unless `train.checkpoint_every` is null, and
    `early_stop.json` records the step.
    """

    def __init__(self, checkpoints: Checkpoints, steps: int, agree_every: int):
        self.checkpoints, self.steps, self.agree_every = checkpoints, steps, agree_every
        self.received: int | None = None
        self.interrupted = False
        """Whether a signal has ended the run."""
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals in this context, and restore the earlier handlers at its end.

        Enter it before the loaders' processes fork: the handlers that they inherit keep them alive until the current
        step has ended.
        """
        try:
            for number in STOPPING_RUNS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.getsignal(number)
                    signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return
        self.received = number
        if number == signal.SIGHUP:
            leave_terminal()
        tqdm.write(f"{signal.Signals(number).name}: saving after this step, then stopping", file=sys.stderr)
        signal.signal(signal.SIGINT, interrupting(self._before.get(signal.SIGINT)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_is_complete(trainer, batch_idx):
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            agree = trainer.global_step % self.agree_every == 0
            stop = agree and trainer.strategy.reduce_boolean_decision(stop, all=False)
        done = trainer.global_step >= self.steps
        if stop:
            self.interrupted = not done
            self.checkpoints.save(trainer)
            if not done:
                trainer.limit_val_batches = 0  # an interrupted run stops without a validation
        if stop or done:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self.interrupted or step >= self.steps:
            return
        if trainer.is_global_zero:
            reason = early_stop_reason(trainer.callbacks)  # type: ignore[attr-defined] # set by Lightning
            log.info("ended early after step %d of %d: %s", step, self.steps, reason)
            record = {"step": step, "reason": reason}
            write_atomic(self.checkpoints.folder.early_stop_file, json.dumps(record, indent=2) + "\n")
        trainer.strategy.barrier()
        # Saved after the record: a kill between them repeats the last steps, and not the decision alone.
        if self.checkpoints.every is not None:
            self.checkpoints.save(trainer)
