"""Rows of the kernel benchmark, random tensors, and forward and backward as one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Record, Row, reason_of
from benchmarks.timing import BF16, time_ms
from cllm.environment import clocks


def rand(*shape: int, grad: bool = True) -> Tensor:
    """A random bf16 tensor on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=BF16).requires_grad_(grad)


def forward_backward(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], None]:
    """A call that runs `function` and its backward, with fixed gradients for each of its results."""

    def call() -> tuple[Tensor, ...]:
        result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        gradients = [torch.randn_like(t) for t in call()]

    def run() -> None:
        for t in inputs:
            t.grad = None
        torch.autograd.backward(call(), gradients)

    return run


class Table(Record):
    """Rows with their clocks, printed and written as they come."""

    def write(self) -> None:
        """Write the file with the clocks before the first row and now."""
        if self.out is not None:
            self.results["clocks"] = [*self.results["clocks"][:1], clocks()]
            super().write()

    def time(
        self, what: str, case: str, name: str, function: Callable[..., Any], *inputs: Tensor, bound: float | None = None
    ) -> None:
        """Add a row with the ms of `function(*inputs)`, forward and backward; a failure is printed instead.

        Args:
            what: the benchmark.
            case: shapes.
            name: the alternative that is timed.
            function: returns a tensor or a tuple of tensors.
            inputs: its arguments.
            bound: least ms that the hardware needs.
        """
        self.measure(what, case, name, lambda: time_ms(forward_backward(function, *inputs)), bound)

    def measure(
        self, what: str, case: str, name: str, milliseconds: Callable[[], float], bound: float | None = None
    ) -> None:
        """Add a row with what `milliseconds` returns; arguments otherwise as for `time`."""
        try:
            ms = milliseconds()
        except Exception as error:
            print(f"{what:<10}{case:<34}{name:<26} failed: {reason_of(error, 90)}")
            return
        row: Row = {"what": what, "case": case, "name": name, "ms": ms, "bound_ms": bound}
        self.add(row)
        share = f"{ms / bound:6.2f}x bound" if bound else ""
        print(f"{what:<10}{case:<34}{name:<26}{ms:9.3f} ms {share}", flush=True)
