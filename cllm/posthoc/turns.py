"""Hooks of modules that several layers share: in a loop, later turns compute with the modules of the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def add_hook(
    module: nn.Module, hook: Callable[..., Any], inside: nn.Module | None, *, before: bool = False
) -> list[Any]:
    """Call `hook` after `module`, or `before` it, and return the handles that remove it.

    Args:
        module: the module.
        hook: as for `register_forward_hook`, or `register_forward_pre_hook`.
        inside: only for calls inside of this layer, for a module that other layers may share; None: for all calls.
        before: call it before the module.
    """
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    if inside is None:
        return [register(hook)]
    is_inside = False

    def enter(*_: Any) -> None:
        nonlocal is_inside
        is_inside = True

    def leave(*_: Any) -> None:
        nonlocal is_inside
        is_inside = False

    return [
        inside.register_forward_pre_hook(enter),
        inside.register_forward_hook(leave, always_call=True),
        register(lambda *arguments: hook(*arguments) if is_inside else None),
    ]
