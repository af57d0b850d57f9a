"""A sample as text, and the base of the tasks that write them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

SHORT = 4096
"""Tokens from which on the published sizes and steps hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A sample as text."""

    context: str
    question: str
    prefix: str
    """The beginning of the answer."""
    references: tuple[str, ...]
    """Texts that a generated answer is searched for."""
    items: tuple[str, ...]
    """The parts of the answer, in the order in which the model reads them, each after its separator:
    `(" 123", ", 456", ", and 789")`."""
    wrong: tuple[str, ...]
    """Wrong answers in the form of the first item."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The answer; its first item alone, if there are several; then wrong ones."""
        first = self.items[:1] if len(self.items) > 1 else ()
        return ("".join(self.items), *first, *self.wrong)


def listed(words: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of "a", "a, and b" or "a, b, and c", each after its separator; a space stands before the first one."""
    last = len(words) - 1
    marks = ("" if i == 0 else ", and" if i == last else "," for i in range(len(words)))
    return tuple(f"{mark} {word}" for mark, word in zip(marks, words, strict=True))


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task at one length. The text of a sample depends on the seed, the length, the index and the size alone."""

    generate: ClassVar[int]
    """Tokens to generate."""
    name: str
    length: int
    """Tokens of the prompt and the generated text together, at most."""
    seed: int = 42
    distractors: int = 3
    """Wrong items of each sample."""

    @property
    @abstractmethod
    def step(self) -> int:
        """The size grows and shrinks by this."""

    @property
    @abstractmethod
    def smallest(self) -> int:
        """The smallest size of the haystack, in the task's units."""

    @property
    def largest(self) -> int | None:
        """The largest size; None: any."""
        return None

    @property
    def samples(self) -> int | None:
        """The number of samples that exist; None: any number."""
        return None

    @abstractmethod
    def draft(self, index: int, size: int) -> Draft:
        """The sample `index` with a haystack of `size`."""

    def rng(self, part: object) -> random.Random:
        """A generator for one sample, or another part, of the task."""
        return random.Random(f"{self.seed}/{self.name}/{self.length}/{part}")
