"""Faults of the machine in the midst of a training run, as one line that says what remains and what to try."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from cllm import faults
from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder


@contextlib.contextmanager
def explained(config: Config, folder: RunFolder) -> Iterator[None]:
    """Turn exhausted memory and errors of the file system into a `UserError`; other exceptions pass through.

    Raises:
        UserError: naming the settings that need less memory, or the file; and the newest checkpoint.
    """
    try:
        with faults.naming(str(folder.path)), _quiet_threads():
            yield
    except UserError:
        raise
    except Exception as error:
        if faults.is_out_of_memory(error):
            line = _out_of_memory(config, faults.explain(error) or "out of memory")
        elif (found := faults.explain(error)) is not None:
            line = found
        else:
            raise
        newest = folder.newest_checkpoint()
        goes_on = f"the newest checkpoint is {newest}; --resume auto goes on from it" if newest else "no checkpoint yet"
        raise UserError(f"{line}; {goes_on}") from error


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback of TensorBoard's writing thread where the disk is full: the next event raises it again."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or faults.explain(failure.exc_value) is None:
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _out_of_memory(config: Config, line: str) -> str:
    train = config.train
    smaller = [
        (f"a smaller train.micro_batch than {train.micro_batch}", train.micro_batch > 1),
        ("train.gradient_checkpointing true", not train.gradient_checkpointing),
        (f"a shorter data.seq_len than {config.data.seq_len}", True),
        ("train.strategy zero2 or zero3 on several GPUs", not train.strategy.startswith("zero")),
    ]
    return f"{line}; try {', or '.join(what for what, helps in smaller if helps)}"
