"""Forward and backward of a step as one CUDA graph: `train.cuda_graph`.

A step of few tokens is limited by the host, which starts about a thousand kernels for each pass. A graph records them
once; replaying it costs one launch. Clipping and the optimizer's step stay outside, so learning rates, skipped steps
and metrics work as without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from cllm.config import Config
from cllm.errors import UserError

log = logging.getLogger(__name__)

Objective = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From a micro-batch to scalars, among them `objective`, which is minimised."""
_WARM_UP = 2
"""Passes before the recording: they compile, tune and load kernels, which a recording may not."""
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _obstacle(config: Config, *, gpu: bool, strategy: str, accumulate: int) -> str | None:
    """Why the steps of a run cannot be one CUDA graph each, as settings; None if they can."""
    train = config.train
    if not gpu:
        return "train.accelerator is cpu" if train.accelerator == "cpu" else "this machine has no GPU"
    if strategy != "single":
        return f"train.strategy is {train.strategy}" + (f": {strategy}" if train.strategy == "auto" else "")
    if accumulate > 1:
        return f"train.global_batch {train.global_batch} is {accumulate} x train.micro_batch"
    if not config.uptrain.needs_teacher:
        return "no part of uptrain.loss reads a teacher; the kernels of cross-entropy alone wait for the device"
    if config.data.document_mask:
        return "data.document_mask is true: each batch has other boundaries"
    if config.uptrain.random_sources:
        return "uptrain.random_sources: each step reads other layers"
    if config.uptrain.curriculum_steps:
        return "uptrain.curriculum_steps: the model changes from step to step"
    return None


def resolve(config: Config, *, gpu: bool, strategy: str, accumulate: int) -> str | None:
    """Why the steps of a run are not one CUDA graph each, as far as settings decide it; None if they are.

    Args:
        config: of the run.
        gpu: whether it trains on GPUs.
        strategy: of `Launch`.
        accumulate: micro-batches of one process in an optimizer step.

    Raises:
        UserError: if `train.cuda_graph` is true, and that is not possible.
    """
    if config.train.cuda_graph is False:
        return "train.cuda_graph is false"
    reason = _obstacle(config, gpu=gpu, strategy=strategy, accumulate=accumulate)
    if reason is not None and config.train.cuda_graph is True:
        raise UserError(f"train.cuda_graph is true, which cannot be: {reason}; allowed here: auto, false")
    return reason


def make_replay(model: nn.Module, objective: Objective, *, setting: bool | str, reason: str | None) -> Replay | None:
    """The `Replay` of a run, or None if its steps are not replayed. Logs what `auto` chose, and why.

    Args:
        model: the decoder that is trained, ready for training.
        objective: of a micro-batch.
        setting: `train.cuda_graph` of the run.
        reason: why its steps are not replayed, as of `resolve`.
    """
    if setting is not False:
        rank_zero_only(log.info)("cuda_graph: %s", "steps are replayed" if reason is None else f"not used ({reason})")
    return Replay(model, objective) if reason is None else None


class Replay:
    """The forward and backward of `model` for batches of one shape, recorded at the first batch.

    A recording reads the memory of the weights that it was made with, and contains no Python code. So it is made again
    if weights or buffers are replaced, frozen or unfrozen, and a model with hooks is refused.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        self._model, self._objective = model, objective
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._recorded: list[Any] | None = None
        """`_state` of the model when it was recorded."""
        self._graph: Any = None
        self._batch: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalars of `objective` for a batch, detached; `attach_gradients` hands over their gradients.

        The returned tensors are overwritten by the next call. No parameter has a gradient afterwards.

        Raises:
            ValueError: for a batch of another shape than the first.
            UserError: for a model with hooks.
        """
        if not self._batch:
            self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if shapes != (recorded := {name: tuple(tensor.shape) for name, tensor in self._batch.items()}):
            raise ValueError(f"a batch of shapes {shapes}; the recorded step takes {recorded}")
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor, non_blocking=True)
        if self._recorded is None or self._state() != self._recorded:
            self._record()
        self._graph.replay()
        self._drop_gradients()  # what clears gradients in place would clear those of this call
        return self._parts

    def attach_gradients(self) -> None:
        """Set the gradients of all parameters to those of the last call. The next call overwrites them in place."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _state(self) -> list[Any]:
        """Values that change if a recording no longer computes what the model would."""
        state: list[Any] = []
        for module in self._modules:
            state += [len(hooks) for kind in _MODULE_HOOKS if (hooks := getattr(module, kind))]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    state.append((id(tensor), tensor.data_ptr(), tensor.requires_grad, _has_hooks(tensor)))
        return state

    def _record(self) -> None:
        if self._recorded is not None:
            log.warning("cuda_graph: weights were replaced, frozen or unfrozen; the step is recorded again")
            self._graph = None  # frees its memory
        self._modules = list(self._model.modules())
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._recorded = self._state()
        _check_hooks(self._model)
        self._graph = self._capture()

    def _capture(self) -> Any:
        """The graph of a pass over the static batch, whose results are `_parts` and `_gradients`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._drop_gradients()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, go on with calls that a recording may not contain.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._parts, self._gradients = self._pass()
        return graph

    def _pass(self) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Forward and backward over the static batch, with gradients in memory that the backward allocates."""
        self._drop_gradients()
        # Casts that autocast has kept are of weights before their update, and a recording would read them for ever.
        torch.clear_autocast_cache()
        parts = self._objective(self._batch)
        with torch.autocast(parts["objective"].device.type, enabled=False):  # as Lightning's backward
            parts["objective"].backward()
        torch.clear_autocast_cache()
        return {name: part.detach() for name, part in parts.items()}, [p.grad for p in self._parameters]

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _has_hooks(tensor: Tensor) -> bool:
    return any(getattr(tensor, kind, None) for kind in _TENSOR_HOOKS)


def _check_hooks(model: nn.Module) -> None:
    names = [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in _MODULE_HOOKS)]
    names += [name for name, parameter in model.named_parameters() if _has_hooks(parameter)]
    if names:
        raise UserError(
            f"train.cuda_graph: {names[0] or 'the model'} has a hook (of a callback or logger?), which replayed steps "
            "would not call; allowed with it: train.cuda_graph false"
        )
