"""Classes that a config names by their import path, with arguments from YAML.

Only training imports them, and only what its own config names. Whatever reads the config of another run, such as
evaluation, comparison and export, leaves them alone.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from cllm.errors import UserError, nearest
from cllm.trust import reason


def import_class(path: str, base: type, key: str) -> type:
    """The class at an import path such as `lightning.pytorch.callbacks.EarlyStopping`.

    Args:
        path: module and class, joined by a dot.
        base: the class must be a subclass of it.
        key: where the config names it, for messages.

    Raises:
        UserError: if the module cannot be imported, whatever that raises, has no such class, or it is another kind.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{key}: {path} cannot be imported: {reason(error)}") from error
    found = getattr(module, name, None)
    wanted = f"lightning.pytorch's {base.__name__}"
    if found is None:
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        raise UserError(f"{key}: {module_name} has no {name}; {nearest(name, classes)}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}: {path} is not a subclass of {wanted}; allowed: subclasses of it")
    return found


def check_arguments(cls: type, arguments: Mapping[str, Any], key: str) -> None:
    """Refuse arguments that the constructor of `cls` does not take, or of another type than it declares.

    Raises:
        UserError: naming `key`, the class and the argument.
    """
    signature = inspect.signature(cls)
    where = f"{key}: {cls.__name__}"
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = [name for name, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for name in arguments:
        if name not in taken and not open_ended:
            raise UserError(f"{where} has no argument {name!r}; {nearest(name, taken)}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{where}: {error}; its arguments: {', '.join(taken)}") from None
    for name, kind in _declared_types(cls).items():
        if name not in arguments:
            continue
        try:
            TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(
                arguments[name]
            )
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"{where}: {name} is {arguments[name]!r}: {message[0].lower()}{message[1:]}") from None
        except PydanticUserError:
            continue  # a type that pydantic does not know


def _declared_types(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc] # of the class, not of an instance
    except (NameError, TypeError, AttributeError):  # names that exist only for type checkers
        return {}


def construct(cls: type, arguments: Mapping[str, Any], key: str) -> Any:
    """An instance of `cls`. Raises `UserError` for whatever its constructor raises."""
    try:
        return cls(**arguments)
    except Exception as error:
        raise UserError(f"{key}: {cls.__name__}: {reason(error)}") from error


def split_entry(entry: str | Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The import path and the arguments of an entry of YAML; no path for a mapping without `class`."""
    if isinstance(entry, str):
        return entry, {}
    path = entry.get("class")
    return path if isinstance(path, str) else None, {key: value for key, value in entry.items() if key != "class"}
