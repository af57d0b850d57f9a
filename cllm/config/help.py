"""The settings of a schema as text: all of them, or those that have to do with a word.

Reads the schema alone: names of keys, types, bounds, defaults, and the docstrings under the fields.
"""

from __future__ import annotations

import json
import textwrap
import types
import typing
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

TaggedFields = list[tuple[str | None, FieldInfo]]
"""The fields of one key, each with the tag of its variant in a tagged union, or None outside of one."""
_WIDTH = 100
"""Columns of a text about a word."""


def sections_in(annotation: Any, tag: str | None = None) -> list[tuple[str | None, type[BaseModel]]]:
    """The sections in an annotation such as `Foo`, `Foo | None` or a tagged union, each with its tag."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(tag, annotation)]
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *metadata = typing.get_args(annotation)
        return sections_in(annotation, next((m.tag for m in metadata if isinstance(m, Tag)), tag))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [section for part in typing.get_args(annotation) for section in sections_in(part, tag)]
    return []


def schema_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of a schema and its pydantic field."""
    keys: dict[str, FieldInfo] = {}
    for key, fields in fields_of(schema, prefix).items():
        keys[key] = fields[0][1]
    return keys


def keys_help(schema: type[BaseModel]) -> str:
    """Every key with its default and its meaning, for `--help`."""
    keys = fields_of(schema)
    n_tags = len({tag for fields in keys.values() for tag, _ in fields if tag is not None})
    lines = [_key_help(key, fields, n_tags) for key, fields in keys.items()]
    return "settings, the same in YAML and on the command line:\n" + "\n".join(lines)


def _key_help(key: str, fields: TaggedFields, n_tags: int) -> str:
    """The help of one key. Where presets differ, each default and meaning follows the names of its presets."""
    head, *_ = fields
    if len(fields) > 1 and all(field.default == tag for tag, field in fields):  # the key that selects the preset
        names = ", ".join(str(tag) for tag, _ in fields)
        return f"  --{key}  (default: {_default(head[1])})\n      {_meaning(head[1])} Allowed: {names}."
    groups: dict[tuple[str, str], list[str | None]] = {}
    for tag, field in fields:
        groups.setdefault((_default(field), _meaning(field)), []).append(tag)
    defaults: dict[str, list[str]] = {}
    meanings: list[str] = []
    for (default, meaning), tags in sorted(groups.items(), key=lambda group: -len(group[1])):
        is_general = 2 * len(tags) > n_tags or set(tags) <= {None, *key.split(".")}
        names = "" if is_general else ", ".join(str(tag) for tag in tags)
        defaults.setdefault(default, []).append(names)
        meanings.append(f"{names}: {meaning}" if names else meaning)
    if len(defaults) == 1:
        shown = next(iter(defaults))
    else:
        shown = "; ".join(f"{d} with {', '.join(n)}" if all(n) else d for d, n in defaults.items())
    return "\n      ".join([f"  --{key}  (default: {shown})", *meanings])


def _default(field: FieldInfo) -> str:
    """The default as YAML (null, not None)."""
    return "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True), default=str)


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def fields_of(schema: type[BaseModel], prefix: str = "", tag: str | None = None) -> dict[str, TaggedFields]:
    """Every dotted key of a schema with its fields, each with the tag of the variant that has it.

    Several variants of a tagged union may have the same key; the default variant comes first.
    """
    keys: dict[str, TaggedFields] = {}
    for name, field in schema.model_fields.items():
        sections = sections_in(field.annotation)
        if not sections:
            keys.setdefault(prefix + name, []).append((tag, field))
        if len(sections) > 1:
            usual = type(field.get_default(call_default_factory=True))
            sections.sort(key=lambda section: section[1] is not usual)
        for inner_tag, section in sections:
            for key, fields in fields_of(section, f"{prefix}{name}.", inner_tag or tag).items():
                keys.setdefault(key, []).extend(fields)
    return keys


# ---- about a word ----------------------------------------------------------------------------------------------------


def settings_about(schema: type[BaseModel], word: str) -> list[str]:
    """The settings whose key, allowed values or meaning contains `word`, each with its type and bounds.

    Those whose key contains it come first. For the name of a preset, that preset and its settings alone. Case does not
    matter.
    """
    keys, word = fields_of(schema), word.casefold().removeprefix("--")
    presets = {tag: section for tag, section in _variants(schema) if tag is not None}
    if word in presets and not any(word in key.split(".") for key in keys):  # layers is both
        own = {key: [pair for pair in fields if pair[0] == word] for key, fields in keys.items()}
        title = f"{word}: {' '.join((presets[word].__doc__ or '').split())}"
        return [textwrap.fill(title, _WIDTH), *(_about(key, fields, 1) for key, fields in own.items() if fields)]
    texts = {key: _about(key, fields, len(presets)) for key, fields in keys.items()}
    close = [text for key, text in texts.items() if word in key.casefold()]
    return close + [text for text in texts.values() if word in text.casefold() and text not in close]


def _variants(schema: type[BaseModel]) -> list[tuple[str | None, type[BaseModel]]]:
    """The sections below a schema, each with its tag."""
    below = [part for field in schema.model_fields.values() for part in sections_in(field.annotation)]
    return [pair for tag, section in below for pair in ((tag, section), *([] if tag else _variants(section)))]


def _about(key: str, fields: TaggedFields, n_tags: int) -> str:
    """The help of one key with its type; the key that selects the preset lists the presets instead."""
    head, *meanings = _key_help(key, fields, n_tags).split("\n")
    if not all(tag is not None and field.default == tag for tag, field in fields):
        meanings.append(f"allowed: {'; or '.join(dict.fromkeys(_type(field) for _, field in fields))}")
    return "\n".join([head, *(_wrapped(line.strip()) for line in meanings)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_BOUNDS = (
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Lt, "lt", "below"),
    (annotated_types.Le, "le", "at most"),
)


def _type(field: FieldInfo) -> str:
    """The values that a field takes: `an integer, at least 1, at most 1,000, or null`."""
    bounds = [
        f"{name} {_number(getattr(rule, attribute))}"
        for kind, attribute, name in _BOUNDS
        for rule in field.metadata
        if isinstance(rule, kind)
    ]
    first, *others = _types(field.annotation)
    return " or ".join([", ".join([first, *bounds]) + ("," if bounds and others else ""), *others])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _types(annotation: Any) -> list[str]:
    """The alternatives of an annotation, null last."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return [", ".join(value if isinstance(value, str) else json.dumps(value) for value in inner)]
    if origin is typing.Annotated:
        return _types(inner[0])
    if origin in (list, dict, tuple):
        return [f"a {'mapping' if origin is dict else 'list'} of values, each {', '.join(_types(inner[-1]))}"]
    if origin is not None or isinstance(annotation, types.UnionType):
        parts = dict.fromkeys(text for part in inner for text in _types(part))
        return sorted(parts, key=lambda text: text == "null")
    return [_PLAIN.get(annotation, "any value")]
