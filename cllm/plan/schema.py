"""`model.kv` as YAML may say it: a preset by name, or `layers`, of cllm and of installed plug-ins.

A plug-in names an object of its module under the entry point group `cllm.plans`; importing the module registers kinds
of sources, reads and presets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Tag

from cllm.errors import UserError
from cllm.plan.presets import PRESETS, Preset
from cllm.plan.registry import close_registries
from cllm.plugins import plugins

_broken: UserError | None = None
try:
    plugins("cllm.plans")
except UserError as error:  # raised when a plan is read: importing a module is no place for it
    _broken = error
close_registries()

from cllm.plan.explicit import Explicit  # noqa: E402  (its fields are the kinds that are registered by now)


def _variant(value: Any) -> str | None:
    """The class that a value of `model.kv` is for; a mapping that names neither preset nor layers means mha."""
    if _broken is not None:
        raise _broken
    if isinstance(value, Explicit) or (isinstance(value, dict) and "layers" in value and "preset" not in value):
        return "layers"
    return value.get("preset", "mha") if isinstance(value, dict) else getattr(value, "preset", None)


_VARIANTS = [Annotated[cls, Tag(name)] for name, cls in PRESETS.items()] + [Annotated[Explicit, Tag("layers")]]
if TYPE_CHECKING:
    KVConfig = Preset | Explicit
else:
    KVConfig = Annotated[Union[tuple(_VARIANTS)], Discriminator(_variant)]  # noqa: UP007
"""A value of `model.kv`."""
