"""A contender of `scripts/bench_train.py`: a model, its optimizer and its times; and where it waits for its turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]
"""Of (ids, labels), (B, T) each."""
Batch = tuple[Tensor, Tensor]
"""Ids and labels, (B, T) int64 each."""
Batches = list[list[Batch]]
"""Of each step, its micro-batches."""


@dataclass
class Contender:
    """A model, its loss, and the times of its steps in ms, a list for each round."""

    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    flops_per_token: float
    rounds: list[list[float]] = field(default_factory=list)
    peak_gib: float | None = None
    """On a GPU."""
    last_loss: float = float("nan")
    held: dict[int, Tensor] = field(default_factory=dict)
    """By place in `tensors()`: room in the machine's memory, for when the contender waits."""

    def step(self, parts: Sequence[Batch]) -> Tensor:
        """One optimizer step over micro-batches; the loss of the last one."""
        for ids, labels in parts:
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = self.loss(ids, labels)
            (loss / len(parts) if len(parts) > 1 else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        """Weights, buffers and what the optimizer keeps of each weight."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *(t for t in states if t.ndim)]

    def leave(self) -> None:
        """Move out of the GPU's memory."""
        for n, tensor in enumerate(self.tensors()):
            if tensor.is_cuda:
                if n not in self.held:
                    self.held[n] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                tensor.data = self.held[n].copy_(tensor.data, non_blocking=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def enter(self) -> None:
        """Come back to it, at once or not at all: nothing else may be there."""
        for n, tensor in enumerate(self.tensors()):
            if n in self.held:
                tensor.data = self.held[n].to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    def drop(self) -> None:
        """Give the memory back."""
        self.model, self.loss = nn.Module(), lambda ids, labels: ids
        self.optimizer = torch.optim.SGD([torch.zeros(1)])
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def at_work(contender: Contender, swap: bool) -> Iterator[None]:
    """Have a contender on the GPU; with `swap` it was not there before, and is not after."""
    if not swap:
        yield
        return
    contender.enter()
    try:
        yield
    finally:
        contender.leave()
