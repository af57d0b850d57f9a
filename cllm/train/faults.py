"""Faults of the machine during training, as one line: the fault, the newest checkpoint, and what to try."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from cllm import faults
from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder

Options = ParamSpec("Options")
Result = TypeVar("Result")


def explained(train: Callable[Concatenate[Config, Options], Result]) -> Callable[Concatenate[Config, Options], Result]:
    """Decorator of a training function: exhausted memory and errors of files become a `UserError`.

    Its message names the settings that need less memory, or the file, and the newest checkpoint. Other exceptions pass
    through.
    """

    @functools.wraps(train)
    def run(config: Config, *args: Options.args, **kwargs: Options.kwargs) -> Result:
        try:
            with _quiet_threads():
                return train(config, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            folder = RunFolder(Path(config.runs_dir) / config.name)
            if faults.is_write_error(error) and error.filename is None:
                error.filename = str(folder.path)
            line = faults.explain(error)
            if line is None:
                raise
            if faults.is_out_of_memory(error):
                line = _with_remedies(line, config)
            raise UserError(f"{line}; {newest_checkpoint_line(folder)}") from error

    return run


def newest_checkpoint_line(folder: RunFolder) -> str:
    """The end of an error message: the newest checkpoint of a run that ended early, or that there is no checkpoint."""
    newest = folder.newest_checkpoint()
    return f"the newest checkpoint is {newest}; --resume auto goes on from it" if newest else "no checkpoint yet"


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback of TensorBoard's writing thread on a full disk: the next event raises the error again."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or faults.explain(failure.exc_value) is None:
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _with_remedies(line: str, config: Config) -> str:
    train = config.train
    smaller = [
        (f"a smaller train.micro_batch than {train.micro_batch}", train.micro_batch > 1),
        ("train.gradient_checkpointing true", not train.gradient_checkpointing),
        ("train.cuda_graph false", train.cuda_graph is not False),
        (f"a shorter data.seq_len than {config.data.seq_len}", True),
        ("train.strategy zero2 or zero3 on several GPUs", not train.strategy.startswith("zero")),
    ]
    return f"{line}; try {', or '.join(what for what, helps in smaller if helps)}"
