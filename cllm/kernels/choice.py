"""The choice between Triton kernels and plain torch, and log lines that are written once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal

from cllm.errors import UserError

log = logging.getLogger(__name__)

Kernel = Literal["auto", "triton", "reference"]


@functools.cache
def log_once(line: str, level: int = logging.INFO) -> None:
    """Log a line the first time that it comes up."""
    log.log(level, line)


def uses_triton(function: str, kernel: str, unsupported: Callable[[], str | None], *, on_gpu: bool) -> bool:
    """Whether Triton computes a call of `function`. For `auto` the choice is logged once.

    Args:
        function: its name, for messages.
        kernel: `auto` takes Triton if it supports the call, and plain torch otherwise; `triton`; or `reference`.
        unsupported: returns the reason why Triton cannot compute the call, or None.
        on_gpu: plain torch is slow there, so that choosing it is logged as a warning.

    Raises:
        UserError: for another `kernel`, and for `triton` if it cannot compute the call.
    """
    if kernel == "reference":
        return False
    if kernel not in ("auto", "triton"):
        raise UserError(f'{function}: kernel is "{kernel}"; allowed: auto, triton, reference')
    reason = unsupported()
    if kernel == "triton" and reason is not None:
        raise UserError(f'{function}: kernel is "triton", which cannot: {reason}; allowed: auto, reference')
    if kernel == "auto" and reason is None:
        log_once(f"{function}: triton")
    elif kernel == "auto" and on_gpu:
        log_once(f"{function}: plain torch, because triton cannot: {reason} (slow)", logging.WARNING)
    elif kernel == "auto":
        log_once(f"{function}: plain torch, because triton cannot: {reason}")
    return reason is None
