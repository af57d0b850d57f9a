"""Samples of a task, as token ids: a context, and questions that are read after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a context: options whose log-probability is measured, text to generate, or both."""

    prompt: tuple[int, ...] = ()
    """Token ids read after the context. They are never compressed.

    Without a prompt, the first token of an option is predicted from the last token of the context, whose hidden state
    was computed before the cache was compressed. Give at least one token if every score should depend on the compressed
    cache.
    """
    options: tuple[tuple[int, ...], ...] = ()
    """Token ids of the continuations whose log-probability is measured."""
    gold: int = 0
    """Index of the right option."""
    option_bytes: tuple[int, ...] = ()
    """UTF-8 bytes of each option, for bits per byte."""
    generate: int = 0
    """Tokens to generate greedily, at most; 0: none."""
    stop: tuple[str, ...] = ()
    """Generation ends when the generated text contains one of these. It also ends at EOS."""
    references: tuple[str, ...] = ()
    """Accepted texts."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Properties of the question, such as depth or distance, as JSON values: for tables by group."""

    @property
    def longest(self) -> int:
        """The most tokens that are read after the context; the last one of an option, or generated, is not read."""
        return max(len(self.prompt) + max(self.generate, *map(len, self.options), 0, 0) - 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A context and its questions."""

    task: str
    """The name of a row of the table: `niah_single_1`, `blimp`, ..."""
    context: tuple[int, ...]
    """Token ids that are read first, and whose cache is compressed."""
    questions: tuple[Question, ...]

    @property
    def longest(self) -> int:
        """The most tokens that are read in a row, context included."""
        return len(self.context) + max((question.longest for question in self.questions), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A model's answer to a question."""

    losses: tuple[tuple[float, ...], ...] = ()
    """-log p in nats of every token of every option, given the context, the prompt and the option's earlier tokens.

    A first token that has nothing before it has no loss, so that its option has one loss less than tokens.
    """
    top1: tuple[tuple[bool, ...], ...] = ()
    """For each loss, whether its token has the largest logit."""
    generated: tuple[int, ...] = ()
    """Token ids generated greedily; EOS is left out."""
    text: str = ""
    """The generated tokens as text, cut before the first of `Question.stop`."""
