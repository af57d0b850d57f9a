"""Dataclasses of tensors that are counted and rearranged together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


class TensorTree:
    """A dataclass whose fields may be tensors, other trees, and tuples of both. Tensors are batch first; trees may
    share tensors."""

    in_host_memory: ClassVar[bool] = False
    """Whether the tensors stay in host memory when those of other trees are on a device."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the tree; a shared one as often as it occurs."""
        for value in self.fields().values():
            yield from _tensors(value)

    def host_tensors(self) -> Iterator[Tensor]:
        """Those of `tensors` that are in host memory."""
        if self.in_host_memory:
            yield from self.tensors()
            return
        for value in self.fields().values():
            if isinstance(value, TensorTree):
                yield from value.host_tensors()

    def map(self, change: Change) -> Self:
        """A copy with `change(tensor)` for every tensor. To keep shared tensors shared, pass `once_each(change)`."""
        return dataclasses.replace(self, **{name: _changed(value, change) for name, value in self.fields().items()})  # type: ignore[type-var]

    def fields(self) -> dict[str, Any]:
        """The values of the dataclass's fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorTree):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _changed(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is tuple:
        return tuple(_changed(item, change) for item in value)
    return value.map(change) if isinstance(value, TensorTree) else value


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors`; a tensor that occurs several times counts once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def fp32_numbers(tensors: Iterable[Tensor]) -> int:
    """Numbers that `tensors` store in fp32; a tensor that occurs several times counts once."""
    once = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.numel() for tensor in once if tensor.dtype == torch.float32)


def once_each(change: Change) -> Change:
    """`change` with its results cached per tensor, so that tensors shared before are shared after."""
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def cached(tensor: Tensor) -> Tensor:
        if id(tensor) not in results:
            results[id(tensor)] = (tensor, change(tensor))  # keeps the original alive, so that its id stays taken
        return results[id(tensor)][1]

    return cached
