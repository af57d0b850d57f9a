"""Processes of one run on a CPU, with gloo, started as torchrun does.

Each is forked from a server that has imported the training stack, so that a rank costs only what it computes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cllm.config import Config
from cllm.train.run import train

SECONDS = 300.0
"""Time that the other ranks have to end when one was killed."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["cllm.train.run", "cllm.uptrain.student"])


def run_ranks(number: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Call `target(rank, *arguments)` in each of `number` processes, and return their exit statuses.

    `target` must be a function of a module. Processes that have not ended after `SECONDS` print their stacks to stderr
    and are killed. They have the status None.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    started = []
    for rank in range(number):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        variables |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 1}
        texts = {key: str(value) for key, value in variables.items()}
        started.append(_processes.Process(target=_enter, args=(texts, target, arguments)))
        started[-1].start()
    deadline = time.monotonic() + SECONDS
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    statuses = [process.exitcode for process in started]
    for process in started:
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGABRT)
            process.join(5)
        process.kill()
    return statuses


def _enter(variables: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(variables)
    rank = int(variables["RANK"])
    pytest.MonkeyPatch().setattr(rank_zero_only, "rank", rank, raising=False)
    target(rank, *arguments)


def train_on_ranks(number: int, config: Config, log: Path, resume: str | None = None) -> None:
    """Train a run with `number` processes. `log` becomes what they write to stderr."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"devices": number})})
    statuses = run_ranks(number, _train, config, log, resume)
    assert statuses == [0] * number, log.read_text(encoding="utf-8")


def _train(rank: int, config: Config, log: Path, resume: str | None) -> None:
    with log.open("a", buffering=1, encoding="utf-8") as errors, contextlib.redirect_stderr(errors):
        try:
            train(config, resume=resume)
        except Exception:
            sys.excepthook(*sys.exc_info())
            raise
