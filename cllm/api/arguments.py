"""Checks of the types of arguments: a wrong one is a `UserError` that names the argument, as a wrong setting is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cllm.environment import choose_device
from cllm.errors import UserError

_DEVICES = ("auto", "cpu", "cuda")


def wrong_type(name: str, value: Any, allowed: str) -> UserError:
    """An error for an argument of a wrong type, with the argument as `function: argument`."""
    return UserError(f"{name} is a {type(value).__name__}; allowed: {allowed}")


def is_path(value: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a value is a path as text or as an object with a path, such as a `Run`."""
    return isinstance(value, str | os.PathLike)


def path_of(name: str, value: Any, allowed: str = "a path") -> Path:
    """The path in an argument. Raises `UserError` for other types."""
    if not is_path(value):
        raise wrong_type(name, value, allowed)
    return Path(value)


def paths_of(name: str, value: Any) -> list[Path]:
    """The paths in an argument that is a path or several. Raises `UserError` for other types."""
    if is_path(value):
        return [Path(value)]
    if not isinstance(value, Iterable):
        raise wrong_type(name, value, "a path or a list of paths")
    return [path_of(f"{name}: item {position}", one) for position, one in enumerate(value)]


def texts_of(name: str, value: Any) -> list[str]:
    """The strings in an argument that is a str or several. Raises `UserError` for other types."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable):
        raise wrong_type(name, value, "a str or a list of str")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong_type(f"{name}: item {position}", text, "str")
    return texts


def objects_of(name: str, value: Any, kind: type) -> list[Any]:
    """The objects in an argument that is a list of instances of `kind`. Raises `UserError` for other types."""
    if not isinstance(value, Iterable):
        raise wrong_type(name, value, f"a list of {kind.__name__} objects")
    objects = list(value)
    for position, one in enumerate(objects):
        if not isinstance(one, kind):
            found = f"the class {one.__name__}, not an object" if isinstance(one, type) else f"a {type(one).__name__}"
            raise UserError(f"{name}: item {position} is {found}; allowed: {kind.__name__} objects")
    return objects


def count_of(name: str, value: Any) -> int | None:
    """A positive int or None. Raises `UserError` for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise UserError(f"{name} is {value!r}; allowed: a positive int, or None")


def device_of(name: str, value: Any) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises `UserError` for anything else."""
    if value not in _DEVICES:
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(_DEVICES)}")
    return choose_device(value, name)


def token_ids_of(name: str, value: Any, vocab_size: int) -> Tensor:
    """Token ids, (B, T) of an integer dtype, with T at least 1. Raises `UserError` for anything else."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, "a tensor of token ids, (B, T) int64")
    if value.dim() != 2 or value.dtype not in (torch.int64, torch.int32):
        shape = f"({', '.join(map(str, value.shape))})"
        raise UserError(f"{name} has shape {shape} and dtype {value.dtype}; allowed: token ids, (B, T) int64")
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < vocab_size:
        wrong = int(value.min()) if value.min() < 0 else int(value.max())
        raise UserError(f"{name} has token {wrong}; allowed: 0 to {vocab_size - 1}, the model's vocabulary")
    return value
