"""The methods by name, and the spec strings that choose one: `xkv:group=4,ratio=4`, `xkv:group=4,ratio=2+kivi:bits=4`.

A spec is a name, then optionally `:` and options, then optionally `+` and a quantiser for the stored tensors. After an
evicting method a low-rank one for the tokens that are left may follow, and its quantiser:
`snapkv:ratio=2+xkv:ratio=2+kivi:bits=4`. Values are YAML.

A method is one file: a subclass of `Compressor` in `methods/`, or in another package that names it in its entry points:

    @register("truncate", summary="keys and values without their low bits")
    class Truncate(Compressor): ...

    [project.entry-points."cllm.posthoc"]
    truncate = "my_package.truncate:Truncate"
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import textwrap
from collections.abc import Callable, Set
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cllm.config.load import parse_word
from cllm.errors import UserError, nearest
from cllm.key_values import read_options
from cllm.plugins import origin, plugins
from cllm.posthoc.evicting import Evicting
from cllm.posthoc.method import Codable, Compressor, TensorCoder

Method = TypeVar("Method", bound=Compressor)

ENTRY_POINTS = "cllm.posthoc"
"""The entry point group of methods in other packages."""
_BUILT_IN = "cllm.posthoc.methods"
_registered: dict[str, type[Compressor]] = {}


def register(name: str, *, summary: str, sweep: tuple[str, ...] = ()) -> Callable[[type[Method]], type[Method]]:
    """A class decorator that makes a method known as `name`.

    Args:
        name: of lower case letters, digits and `_`.
        summary: a line for the list of methods.
        sweep: see `Compressor.sweep`.

    Raises:
        UserError: if another class has the name. A class that is defined again, as in a notebook, replaces itself.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f'post-hoc method "{name}": allowed in a name: lower case letters, digits and _')

    def add(method: type[Method]) -> type[Method]:
        if not (isinstance(method, type) and issubclass(method, Compressor)):
            raise UserError(f'post-hoc method "{name}": is {method!r}; allowed: a subclass of Compressor')
        path, other = _path(method), _path(_registered.get(name, method))
        if path != other:
            raise UserError(f'post-hoc method "{name}" of {path}: the name is taken by {other}; choose another')
        method.name, method.summary, method.sweep = name, summary, sweep
        _registered[name] = method
        return method

    return add


def _path(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"


def methods() -> dict[str, type[Compressor]]:
    """All methods by name, sorted: those of `methods/`, and those of other packages.

    Raises `UserError`, naming the entry point and its distribution, for one that cannot be used.
    """
    _import_built_in()
    for name, plugin in plugins(ENTRY_POINTS).items():
        if _registered.get(name) is not plugin:
            raise UserError(
                f"{origin(ENTRY_POINTS, name)}: is {plugin!r}; allowed: the class of a method that is registered as "
                f'"{name}"'
            )
    return dict(sorted(_registered.items()))


@functools.cache
def _import_built_in() -> None:
    package = importlib.import_module(_BUILT_IN)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{_BUILT_IN}.{module.name}")


def default_sweep() -> list[str]:
    """The specs that a sweep measures by default, with `{group}` and `{ratio}` to fill in."""
    return [spec for method in methods().values() for spec in method.sweep]


def describe_methods() -> str:
    """A text that lists all methods with their options and defaults."""
    lines = ["options of all methods"]
    lines += [_describe_option(key, field) for key, field in Compressor.model_fields.items()]
    for name, method in methods().items():
        lines.append(f"{name}: {method.summary}")
        own = method.model_fields.keys() - Compressor.model_fields.keys()
        lines += [_describe_option(key, field) for key, field in method.model_fields.items() if key in own]
        refused = {key: getattr(method, f"no_{key}", None) for key in method.model_fields}
        lines += [f"    no {key}: {reason}" for key, reason in refused.items() if reason is not None]
    return "\n".join(lines)


def _describe_option(key: str, field: FieldInfo) -> str:
    default = "null" if field.default is None else field.default
    text = f"{key}={default}  {' '.join((field.description or '').split())}"
    return textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="        ")


def parse(spec: str, where: str = "--posthoc") -> Compressor:
    """The method that `spec` describes.

    Args:
        spec: a name and options, such as `xkv:group=4,ratio=4`.
        where: the option or argument that gave it, for messages.

    Raises:
        UserError: beginning with `where` and `spec`, for an unknown method or option (with the allowed ones), a value
            of the wrong type or out of range, and after `+` for a method that may not follow the one before, an option
            that concerns slots, and a method before it that stores nothing to quantise.
    """
    seen = f'{where} "{spec}"'
    *firsts, method = (_one(text, seen) for text in spec.split("+"))
    for first in reversed(firsts):
        try:
            method = compose(first, method)
        except ValueError as error:
            raise UserError(f"{seen}: {error}") from None
    return method


def compose(first: Compressor, then: Compressor) -> Compressor:
    """`first` with `then` after its `+`: a quantiser of the stored tensors, or a method for the tokens that are left.

    Raises `ValueError` for two methods, or an option of the second, that do not go together.
    """
    if isinstance(first, Codable) and isinstance(then, TensorCoder):
        _refuse(then, then.slot_options)
        return first.coded_by(then)
    if not (isinstance(first, Evicting) and then.follows_eviction):
        known = methods().items()
        codable = " or ".join(name for name, method in known if issubclass(method, Codable))
        coders = " or ".join(name for name, method in known if issubclass(method, TensorCoder))
        evicting = " or ".join(name for name, method in known if issubclass(method, Evicting))
        others = " or ".join(name for name, method in known if method.follows_eviction)
        raise ValueError(f"allowed with +: {codable}, then {coders}; {evicting}, then {others}")
    _refuse(then, Compressor.model_fields.keys())
    return first.followed_by(then)


def _refuse(then: Compressor, options: Set[str]) -> None:
    """Raise `ValueError` if one of `options`, which have no meaning after `+`, was given to `then`."""
    if wrong := sorted(then.model_fields_set & options):
        allowed = ", ".join(sorted(type(then).model_fields.keys() - options))
        raise ValueError(f"{wrong[0]} is no option of {then.name} after +; allowed: {allowed}")


def _one(text: str, where: str) -> Compressor:
    name, colon, options = text.strip().partition(":")
    known = methods()
    if name not in known:
        raise UserError(f'{where}: unknown method "{name}"; {nearest(name, known)}')
    method = known[name]
    given: dict[str, Any] = {}
    for key, value in read_options(options, where, allowed=_allowed(method)) if colon else ():
        if key not in method.model_fields:
            raise UserError(f'{where}: unknown option "{key}" of {name}; allowed: {_allowed(method)}')
        given[key] = parse_word(value, f"{where}: {key}")
    try:
        return method.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        seen = f" got {first['input']!r}" if key else ""
        raise UserError(f"{where}: {key}{': ' if key else ''}{message}{seen}") from None


def _allowed(method: type[Compressor]) -> str:
    return ", ".join(sorted(method.model_fields))
