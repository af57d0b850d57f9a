"""The most common words of a numbered list, and the most frequent coded words of a text."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from cllm.evaluate.tasks.ruler.draft import SHORT, Draft, Task, listed
from cllm.evaluate.tasks.ruler.prompts import COMMON_WORDS, FREQUENT_WORDS
from cllm.evaluate.tasks.ruler.words import coded_word, distinct, word_lists

COMMON = 10
"""Common words of a list."""
ZETA_2 = math.pi**2 / 6
DOTS = "..."
_LEAST_WORDS = 5
"""Words of the vocabulary of frequent words, at least: the dots, three answers and another word."""


def numbered(words: list[str]) -> list[str]:
    """`["1. a", "2. b"]` for `["a", "b"]`."""
    return [f"{i}. {word}" for i, word in enumerate(words, start=1)]


@dataclass(frozen=True, slots=True)
class _Counts:
    """How often words appear in a list."""

    words: int
    """Different words, common ones included."""
    common: int
    """Appearances of each common word."""
    others: int
    """Appearances of each other word."""


@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """The 10 words that appear most often, after one worked example. Sizes are different words of the list."""

    generate = 120
    step = 10
    smallest = 2 * COMMON

    @property
    def largest(self) -> int:
        return len(word_lists().all)

    def draft(self, index: int, size: int) -> Draft:
        rng, short = self.rng(index), self.length < SHORT
        example, solution, _ = self._list(_Counts(20, 3, 1) if short else _Counts(40, 10, 3), rng)
        text, common, others = self._list(_Counts(size, 6, 1) if short else _Counts(size, 30, 3), rng)
        opening, question, prefix = COMMON_WORDS.opening, COMMON_WORDS.question, COMMON_WORDS.prefix
        solved = " ".join((f"{opening}{example}{question}{prefix}", *numbered(solution)))
        wrong = rng.sample(others, min(self.distractors, len(others)))
        return Draft(
            context=f"{solved}\n{opening}{text}",
            question=question,
            prefix=prefix,
            references=tuple(common),
            items=tuple(f" {item}" for item in numbered(common)),
            wrong=tuple(f" 1. {word}" for word in wrong),
        )

    def _list(self, counts: _Counts, rng: random.Random) -> tuple[str, list[str], list[str]]:
        """The list as text, its common words, and the others."""
        words = rng.sample(word_lists().all, counts.words)
        common, others = words[:COMMON], words[COMMON:]
        entries = common * counts.common + others * counts.others
        rng.shuffle(entries)
        return " ".join(numbered(entries)), common, others


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Task):
    """The 3 most frequent words of a text whose word frequencies follow Zipf's law with exponent 2.

    Word k appears int(N k^-2 / zeta(2)) times; word 1 is written as dots. Sizes are N.
    """

    generate = 50
    smallest = 80
    """From 74 on, the counts of ranks 2 to 5 fall: those of ranks 4 and 5 differ by N (1/16 - 1/25) / zeta(2) >= 1."""

    @property
    def step(self) -> int:
        return max(1, self.length // 32)

    def draft(self, index: int, size: int) -> Draft:
        rng = self.rng(index)
        vocabulary = distinct(max(_LEAST_WORDS, self.length // 50), lambda: coded_word(rng), set())
        rng.shuffle(vocabulary)
        vocabulary[:1] = [DOTS]
        counts = frequencies(size, len(vocabulary))
        entries = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        rng.shuffle(entries)
        answers = tuple(vocabulary[1:4])
        return Draft(
            context=FREQUENT_WORDS.opening + " ".join(entries),
            question=FREQUENT_WORDS.question,
            prefix=FREQUENT_WORDS.prefix,
            references=answers,
            items=listed(answers),
            wrong=tuple(f" {word}" for word in vocabulary[4 : 4 + self.distractors]),
        )


def frequencies(total: int, words: int) -> list[int]:
    """Appearances of the words of rank 1, 2, ... in a text of about `total` words: int(total k^-2 / zeta(2))."""
    return [int(total * rank**-2 / ZETA_2) for rank in range(1, words + 1)]
