"""Settings with dotted keys, such as `train.steps`, as nested mappings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from cllm.errors import UserError

ARGUMENTS = "arguments"
"""The name, in messages, of settings that a Python function is given."""


def enter(tree: dict[str, Any], sections: Sequence[str], label: str) -> dict[str, Any]:
    """The mapping at a path of `tree`; adds missing sections. Raises `UserError`, which `label` begins."""
    node = tree
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"{label}: {'.'.join(sections[: depth + 1])} was given a value already")
    return node


def nest(settings: Mapping[str, Any], name: str = ARGUMENTS) -> dict[str, Any]:
    """Python values with dotted keys as nested mappings: `{"a.b": 1, "a": {"c": 2}}` is `{"a": {"b": 1, "c": 2}}`.

    Only the outermost keys are split at dots. Paths become text, and tuples lists, as in YAML. `name` is that of the
    settings in messages.

    Raises:
        UserError: for a key that is used both as a section and with a value.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, leaf = str(key).split(".")
        node = enter(tree, sections, f"{name}: {key}")
        below, plain = node.get(leaf), _plain(value)
        node[leaf] = _united(below, plain) if isinstance(below, dict) and isinstance(plain, dict) else plain
    return tree


def _united(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, mapping by mapping; `other` wins."""
    united = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(united.get(key), dict)
        united[key] = _united(united[key], value) if both else value
    return united


def _plain(value: Any) -> Any:
    """A Python value as YAML would give it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
