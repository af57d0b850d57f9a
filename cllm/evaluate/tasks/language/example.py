"""One question of a data set as text, and examples with answers before it (few shots)."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A question, its options and its answer, as text.

    The model reads `context`, `cue`, then an option. A cache is compressed after `context`: the cue and the option are
    read on top of it.
    """

    context: str = ""
    cue: str = ""
    options: tuple[str, ...]
    """Continuations, each with the space or line break that separates it from the cue."""
    gold: int = 0
    group: str = ""
    """Paradigm, subject, ...: samples are drawn evenly from groups, and few shots within one."""
    task: str = ""
    """The row of the result's table; empty: the data set."""
    references: tuple[str, ...] = ()
    """Accepted texts of a generated answer."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def solved(self) -> str:
        """The question with its answer, as an example before another question."""
        return self.context + self.cue + self.options[self.gold]


def lettered(example: Example) -> Example:
    """The question with its options listed as `A. ...` in the context; the options become the letters."""
    texts = [option.strip() for option in example.options]
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    letters = tuple(f" {letter}" for letter in LETTERS[: len(texts)])
    return replace(example, context=example.context + listed, options=letters)


def with_shots(example: Example, shots: Sequence[Example], *, header: str, separator: str) -> Example:
    """The question after a header and solved examples."""
    before = "".join(shot.solved + separator for shot in shots)
    return replace(example, context=header + before + example.context)


def draw(items: Sequence[T], count: int, group: Callable[[T], Hashable], seed: int) -> list[int]:
    """Positions of `count` random items, in order, evenly from the groups; 0: of all items.

    The groups' counts differ by at most one, unless a group has no more items.
    """
    if count == 0 or count >= len(items):
        return list(range(len(items)))
    generator = random.Random(seed)
    members: dict[Hashable, list[int]] = {}
    for position, item in enumerate(items):
        members.setdefault(group(item), []).append(position)
    order = list(members.values())
    for positions in order:
        generator.shuffle(positions)
    generator.shuffle(order)
    rounds = range(max(map(len, order)))
    drawn = [positions[n] for n in rounds for positions in order if n < len(positions)]
    return sorted(drawn[:count])
