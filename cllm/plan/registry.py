"""Registries: the kinds that YAML knows, and the functions that build their modules.

A package outside of cllm registers its kinds in the same way, and names its module under the entry point group
`cllm.plans`. As long as it imports torch inside of its functions only, reading a config stays free of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import cllm.plan.forms  # noqa: F401  (registers the forms of `own`)
from cllm.errors import PlanError
from cllm.plan.fuse import Fuse
from cllm.plan.joins import Gate, Join
from cllm.plan.kinds import Own, Read, Retention, Share, Source
from cllm.plan.latent import Latent
from cllm.section import Section

SOURCES: dict[str, type[Source]] = {}
"""Every kind of source by its YAML key."""
READS: dict[str, type[Read]] = {}
"""Every kind of read by its YAML key."""
_S = TypeVar("_S", bound=type[Source])
_R = TypeVar("_R", bound=type[Read])
_closed = False


def register_source(kind: _S) -> _S:
    """Make a kind of source known to YAML.

    Raises:
        PlanError: for a kind without `key` or `Settings`, and a key that is taken.
    """
    _check_members(kind)
    if kind.key in _ENTRY_KEYS:
        raise PlanError(
            f"{kind.__name__}: its key {kind.key!r} is one of every entry of model.kv.layers; choose another"
        )
    _add(SOURCES, kind.key, kind)
    return kind


def register_read(kind: _R) -> _R:
    """Make a kind of read known to YAML.

    Raises:
        PlanError: for a kind without `key` or `Settings`, `Settings` without a field for the owners, and a key or an
            option that another kind has.
    """
    _check_members(kind)
    options = set(kind.Settings.model_fields)
    if kind.key not in options:
        raise PlanError(f"{kind.__name__}: its Settings have no field {kind.key!r}, which names the owners")
    for other in READS.values():
        if other is not kind and (taken := sorted(options & set(other.Settings.model_fields))):
            raise PlanError(f"{kind.__name__}: its option {taken[0]!r} is one of {other.__name__}; choose another name")
    _add(READS, kind.key, kind)
    return kind


_ENTRY_KEYS = ("layers", "keys", "values", "read", "window")
"""Keys of an entry of `model.kv.layers` besides those of sources."""


def _check_members(kind: type[Source | Read]) -> None:
    for name, base in (("key", str), ("Settings", type)):
        if not isinstance(getattr(kind, name, None), base):
            raise PlanError(f"{kind.__name__}: has no {name}; every kind of source and read needs one")
    if not issubclass(kind.Settings, Section):
        raise PlanError(f"{kind.__name__}: its Settings are no subclass of cllm.section.Section")


def close_registries() -> None:
    """The schema of `model.kv` is made now: kinds that come later would be unknown to it."""
    global _closed
    _closed = True


def _add(registry: dict[str, Any], key: str, kind: type) -> None:
    if _closed:
        raise PlanError(
            f"{kind.__name__}: comes too late; import its module before cllm.config, or name it under the entry point "
            "group cllm.plans"
        )
    if registry.get(key, kind) is not kind:
        raise PlanError(f"{kind.__name__}: its key {key!r} is that of {registry[key].__name__}; choose another")
    registry[key] = kind


for _source in (Own, Latent, Retention):
    register_source(_source)
for _read in (Share, Fuse, Join, Gate):
    register_read(_read)

_Build = TypeVar("_Build", bound=Callable[..., Any])


class Builders:
    """Functions that build a kind's modules, each registered for a class and found for its subclasses too."""

    def __init__(self, what: str):
        self.what = what
        self._by_kind: dict[type, Callable[..., Any]] = {}

    def __call__(self, kind: type) -> Callable[[_Build], _Build]:
        """A decorator: `@owner_module(Own)`."""

        def register(build: _Build) -> _Build:
            self._by_kind[kind] = build
            return build

        return register

    def find(self, kind: Source | Read) -> Callable[..., Any] | None:
        """The function for an object's kind or the nearest base that has one; None without one."""
        return next((self._by_kind[c] for c in type(kind).__mro__ if c in self._by_kind), None)

    def of(self, kind: Source | Read) -> Callable[..., Any]:
        """The function for an object's kind. Raises `PlanError` if neither it nor a base has one."""
        found = self.find(kind)
        if found is None:
            raise PlanError(f"{type(kind).__name__}: has no {self.what}; register one with cllm.plan.registry")
        return found


owner_module = Builders("owner module")
"""`(config: ModelConfig, source) -> nn.Module | None`: writes a layer's slot, see `cllm/model/sources.py`."""
read_module = Builders("read module")
"""`(read, part, places, n_kv_heads, head_dim) -> Reader`: reads keys (`k`) or values (`v`), see `make_read` there."""
mixer_module = Builders("mixer")
"""`(config, plan, layer) -> nn.Module`: a block's attention, see `cllm/model/attention.py`. Kinds with plain slots have
softmax attention unless they register another. Reads of several slots at once register their own."""
