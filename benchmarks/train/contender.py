"""A contender of the training benchmark: a model, its optimizer and times. --swap moves it between GPU and CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]
"""(ids, labels), (B, T) each, to the loss."""
Batch = tuple[Tensor, Tensor]
"""Ids and labels, (B, T) int64 each."""
Batches = list[list[Batch]]
"""The micro-batches of each step."""


@dataclass
class Contender:
    """A model, its loss, and the times of its steps in ms, one list per round."""

    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    flops_per_token: float
    rounds: list[list[float]] = field(default_factory=list)
    peak_gib: float | None = None
    """None on a CPU."""
    last_loss: float = float("nan")
    cpu_copies: dict[int, Tensor] = field(default_factory=dict)
    """Pinned CPU memory for each index of `tensors()`."""

    def step(self, parts: Sequence[Batch]) -> Tensor:
        """Take one optimizer step over micro-batches; returns the loss of the last one."""
        for ids, labels in parts:
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = self.loss(ids, labels)
            (loss / len(parts) if len(parts) > 1 else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        """Weights, buffers and the optimizer's states."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *(t for t in states if t.ndim)]

    def move_to_cpu(self) -> None:
        """Move all tensors to CPU memory and free that of the GPU."""
        for n, tensor in enumerate(self.tensors()):
            if tensor.is_cuda:
                if n not in self.cpu_copies:
                    self.cpu_copies[n] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                tensor.data = self.cpu_copies[n].copy_(tensor.data, non_blocking=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def move_to_gpu(self) -> None:
        """Move all tensors back to the GPU, where no other contender may be."""
        for n, tensor in enumerate(self.tensors()):
            if n in self.cpu_copies:
                tensor.data = self.cpu_copies[n].to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    def drop(self) -> None:
        """Free the memory; the contender cannot be used any more."""
        self.model, self.loss = nn.Module(), lambda ids, labels: ids
        self.optimizer = torch.optim.SGD([torch.zeros(1)])
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def on_device(contender: Contender, swap: bool) -> Iterator[None]:
    """Have a contender on the device; with `swap` it is moved to the GPU for that, and back to the CPU at the end."""
    if not swap:
        yield
        return
    contender.move_to_gpu()
    try:
        yield
    finally:
        contender.move_to_cpu()
