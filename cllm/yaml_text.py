"""YAML text to plain data: one parser for config files, recipes and the command line.

It reads YAML 1.1 as PyYAML does, except that:

- `1e-3` is a float, as in YAML 1.2.
- A date such as `2024-01-31` is text.
- Numbers that the two versions of YAML read differently are errors: `010` (10, or octal 8) and `1:30` (text, or 90).
- Duplicate keys, keys that are lists or mappings, and tags other than `!!str` are errors.
- Size, nesting and the expansion of aliases (`*name`) are bounded, so that no text can hang or exhaust the process.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cllm.errors import UserError

MAX_BYTES = 2**20
"""Largest size of a YAML file, in bytes."""
MAX_VALUES = 100_000
"""Most values in a text; one that an alias repeats counts each time."""
MAX_DEPTH = 32
"""Deepest nesting of mappings and lists."""
MAX_DIGITS = 40
"""Most characters of a whole number."""

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!ambiguous"
_DIGITS = list("-+.0123456789")


class _Refused(yaml.MarkedYAMLError):
    """An error for valid YAML that is not accepted."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences listed above."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, 0, {}, set())
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", f"{_TAG}str"):
            raise _refused(f"tag {tag.removeprefix(_TAG)!r}; allowed: none, or !!str", event.start_mark)
        if self._depth > MAX_DEPTH:
            raise _refused(f"is nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key is a list or a mapping", key.start_mark)
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise _refused(f"a number of {len(node.value)} digits; allowed: up to {MAX_DIGITS}", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_ambiguous(self, node: yaml.ScalarNode) -> Any:
        """Raise for a plain scalar that YAML 1.1 and 1.2 read differently."""
        text = node.value
        if ":" in text:
            problem = f"{text} is a number to base 60 in YAML 1.1 and text in YAML 1.2"
        else:
            problem = f"{text} has a leading zero, which makes it octal in YAML 1.1 and decimal in YAML 1.2"
        raise _refused(f'{problem}; write a plain decimal number, or "{text}" for text', node.start_mark)


def _refused(problem: str, mark: yaml.Mark) -> _Refused:
    return _Refused(None, None, problem, mark)


def _measure(node: yaml.Node, depth: int, done: dict[int, tuple[int, int]], inside: set[int]) -> tuple[int, int]:
    """(values, levels) of a node with its aliases expanded. Raises `_Refused` beyond the bounds, and for a cycle."""
    if id(node) in inside:
        raise _refused("an alias refers to the value that it is in", node.start_mark)
    if id(node) not in done:
        if depth > MAX_DEPTH:
            raise _refused(f"is nested more than {MAX_DEPTH} levels deep", node.start_mark)
        inside.add(id(node))
        values, levels = 1, 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            more, below = _measure(child, depth + 1, done, inside)
            values, levels = values + more, max(levels, below + 1)
        inside.remove(id(node))
        done[id(node)] = values, levels
    values, levels = done[id(node)]
    if values > MAX_VALUES:
        raise _refused(f"stands for more than {MAX_VALUES:,} values with its aliases", node.start_mark)
    if depth + levels > MAX_DEPTH:
        raise _refused(f"is nested more than {MAX_DEPTH} levels deep", node.start_mark)
    return values, levels


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if tag not in (f"{_TAG}timestamp", f"{_TAG}int", f"{_TAG}float")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regexp in (
    (f"{_TAG}int", r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)"),
    (f"{_TAG}float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"),
    (f"{_TAG}float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"),
    (f"{_TAG}float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    (_AMBIGUOUS, r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_regexp})$"), _DIGITS)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(_AMBIGUOUS, _Loader.construct_ambiguous)


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML `text` spells.

    Raises:
        UserError: naming `where` and the line, for text that is not valid YAML or not accepted.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        what = "" if isinstance(error, _Refused) else "not valid YAML: "
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}{line}: {what}{problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_word(text: str, where: str) -> Any:
    """As `parse_yaml`, for a value in a word of a command line, where a comment would hide a part of the word.

    Raises:
        UserError: as `parse_yaml` does, and for a comment.
    """
    value = parse_yaml(text, where)
    node = yaml.compose(text, Loader=_Loader)
    if (rest := text[0 if node is None else node.end_mark.index :].strip()).startswith("#"):
        raise UserError(f'{where}: {text!r}: YAML reads "{rest}" as a comment; leave it out, or quote text')
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: naming the file, if it cannot be read, is larger than `MAX_BYTES`, or is not a mapping.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8") if len(content) <= MAX_BYTES else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if text is None:
        raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes, the most that a config file may have")
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config file holds a mapping of keys, this one holds a {type(data).__name__}")
    return data
