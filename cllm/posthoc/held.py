"""Dataclasses of tensors that can be counted and rearranged together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor

Change = Callable[[Tensor], Tensor]


class Held:
    """A dataclass of tensors, and of others like it. Tensors are batch first; several may hold the same one."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors held, shared ones as often as they are referred to."""
        for value in self._fields().values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Held):
                yield from value.tensors()

    def map(self, change: Change) -> Self:
        """`change` of every tensor. A `change` that remembers its results keeps shared tensors shared."""
        return dataclasses.replace(self, **{name: _changed(value, change) for name, value in self._fields().items()})  # type: ignore[type-var]

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _changed(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return value.map(change) if isinstance(value, Held) else value


def held_bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of `tensors`, each one once however often it comes."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def remember(change: Change) -> Change:
    """`change`, applied once to each tensor: what was shared before is shared after."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = (tensor, change(tensor))  # the original is kept so that its id stays taken
        return done[id(tensor)][1]

    return once
