"""The compressed parts of a cache as JSON: trees of dataclasses whose leaves are numbers, words, and names of tensors.

Reading builds only classes that are already loaded and registered as `TensorTree`. A name in a file never imports code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Rotation
from cllm.posthoc.registry import methods
from cllm.posthoc.tensor_tree import TensorTree

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}
"""Dtypes of slots by name."""


class Tensors:
    """Tensors by name; one that occurs several times gets one name."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def add(self, name: str, tensor: Tensor) -> str:
        """The name of `tensor`: `name`, or the one that it already has."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = name
            self.named[name] = tensor
        return self._names[id(tensor)]


def write_tree(value: Any, where: str, tensors: Tensors) -> Any:
    """`value` as JSON, its tensors added to `tensors` under names that begin with `where`.

    Raises:
        UserError: naming the class and the field of something that no file can hold.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": tensors.add(where, value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [write_tree(item, f"{where}.{n}", tensors) for n, item in enumerate(value)]}
    if isinstance(value, TensorTree):
        fields = {}
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            if isinstance(value, Rotation) and field.name == "table":  # of the model's config
                continue
            item = getattr(value, field.name)
            if not isinstance(item, None | bool | int | float | str | Tensor | torch.dtype | tuple | TensorTree):
                raise UserError(
                    f"the cache cannot be stored: {type(value).__name__}.{field.name} is a {type(item).__name__}; it "
                    "belongs to the method and not to the cache; allowed: another method"
                )
            fields[field.name] = write_tree(item, f"{where}.{field.name}", tensors)
        return {"class": _name(type(value)), "fields": fields}
    raise UserError(f"the cache cannot be stored: it has a {type(value).__name__}")


def read_tree(data: Any, tensors: Mapping[str, Tensor], table: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    """The inverse of `write_tree`; `table` is that of a `Rotation` of keys.

    Raises `ValueError` for anything that `write_tree` does not write.
    """
    if not isinstance(data, dict):
        return data
    if data.keys() == {"tensor"}:
        return tensors[data["tensor"]]
    if data.keys() == {"dtype"}:
        return DTYPES[data["dtype"]]
    if data.keys() == {"tuple"}:
        return tuple(read_tree(item, tensors, table) for item in data["tuple"])
    if data.keys() != {"class", "fields"}:
        raise ValueError(f"a tree with the keys {sorted(data)}")
    kind = _classes()[data["class"]]
    fields = {name: read_tree(item, tensors, table) for name, item in data["fields"].items()}
    if issubclass(kind, Rotation):
        fields["table"] = table
    return kind(**fields)


def _classes() -> dict[str, type[TensorTree]]:
    """Every kind of tree that cllm and the installed plug-ins define, by name."""
    methods()
    found, new = {}, [TensorTree]
    while new:
        kind = new.pop()
        found[_name(kind)] = kind
        new.extend(kind.__subclasses__())
    return found


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
