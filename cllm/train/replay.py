"""Forward and backward of a step as one CUDA graph: `train.cuda_graph`.

A step of few tokens is limited by the host, which starts about a thousand kernels for each pass. A graph records them
once; replaying it costs one launch. Clipping and the optimizer's step stay outside, so learning rates, skipped steps
and metrics work as without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cllm.config import Config
from cllm.errors import UserError

Objective = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From a micro-batch to scalars, among them `objective`, which is minimised."""
_WARM_UP = 2
"""Passes before the recording: they compile, tune and load kernels, which a recording may not."""


def obstacle(config: Config, *, gpu: bool, strategy: str, accumulate: int) -> str | None:
    """Why the steps of a run cannot be one CUDA graph each, as settings; None if they can.

    Args:
        config: of the run.
        gpu: whether it trains on GPUs.
        strategy: of `Launch`.
        accumulate: micro-batches of one process in an optimizer step.
    """
    if not gpu:
        return "train.accelerator is cpu"
    if strategy != "single":
        return f"train.strategy is {strategy}"
    if accumulate > 1:
        return f"train.global_batch {config.train.global_batch} is {accumulate} x train.micro_batch"
    if not config.uptrain.needs_teacher:
        return "no part of uptrain.loss reads a teacher; the kernels of cross-entropy alone wait for the device"
    if config.data.document_mask:
        return "data.document_mask is true: each batch has other boundaries"
    if config.uptrain.random_sources:
        return "uptrain.random_sources: each step reads other layers"
    if config.uptrain.curriculum_steps:
        return "uptrain.curriculum_steps: the model changes from step to step"
    return None


def resolve(config: Config, *, gpu: bool, strategy: str, accumulate: int) -> bool:
    """`train.cuda_graph` of a run, with arguments as those of `obstacle`.

    Raises:
        UserError: if it is true, and that is not possible.
    """
    wanted = config.train.cuda_graph
    if wanted is False:
        return False
    reason = obstacle(config, gpu=gpu, strategy=strategy, accumulate=accumulate)
    if reason is not None and wanted is True:
        raise UserError(f"train.cuda_graph is true, which cannot be: {reason}; allowed here: auto, false")
    return reason is None


class Replay:
    """The forward and backward of `model` for batches of one shape, recorded at the first batch."""

    def __init__(self, model: nn.Module, objective: Objective):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._objective = objective
        self._graph: Any = None
        self._batch: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalars of `objective` for a batch, detached; `attach_gradients` hands over their gradients.

        The returned tensors are overwritten by the next call.

        Raises:
            ValueError: for a batch of another shape than the first.
        """
        if self._graph is None:
            self._batch = {name: tensor.clone() for name, tensor in batch.items()}
            self._record()
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if shapes != (recorded := {name: tuple(tensor.shape) for name, tensor in self._batch.items()}):
            raise ValueError(f"a batch of shapes {shapes}; the recorded step takes {recorded}")
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._parts

    def attach_gradients(self) -> None:
        """Set the gradients of all parameters to those of the last call. The next call overwrites them in place."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._clear()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, go on with calls that a recording may not contain.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._parts = {name: part.detach() for name, part in self._pass().items()}
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._clear()

    def _pass(self) -> dict[str, Tensor]:
        """Forward and backward over the static batch, with gradients in memory that the backward allocates."""
        self._clear()
        parts = self._objective(self._batch)
        parts["objective"].backward()
        return parts

    def _clear(self) -> None:
        # Casts that autocast has kept are of weights before their update, and a recording would read them for ever.
        torch.clear_autocast_cache()
        for parameter in self._parameters:
            parameter.grad = None
