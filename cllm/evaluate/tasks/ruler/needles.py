"""Needles in a haystack: sentences that give a key's value, hidden in lines of noise, essays or other needles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cllm.evaluate.tasks.ruler.draft import SHORT, Draft, Task, listed
from cllm.evaluate.tasks.ruler.essays import Essays
from cllm.evaluate.tasks.ruler.prompts import NEEDLE, NEEDLE_ALONE, NEEDLES, NOISE
from cllm.evaluate.tasks.ruler.words import distinct, draw

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Depths of needles in essays, in percent: 40 of them, evenly spaced from 0 to 100."""
_TINY = 1024
"""Tokens below which lines are added one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """The arguments of a task."""

    haystack: str
    """`noise`, `essay` or `needles`."""
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    """Keys asked for."""


FORMS = {
    "niah_single_1": Form(haystack="noise"),
    "niah_single_2": Form(haystack="essay"),
    "niah_single_3": Form(haystack="essay", value="uuids"),
    "niah_multikey_1": Form(haystack="essay", keys=4),
    "niah_multikey_2": Form(haystack="needles"),
    "niah_multikey_3": Form(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": Form(haystack="essay", values=4),
    "niah_multiquery": Form(haystack="essay", keys=4, queries=4),
}


@cache
def _sentences(essays: Essays, words: int) -> list[str]:
    return essays.first(words)


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """The value or values of one key, or of several. Sizes are words of essays, or lines."""

    generate = 128
    form: Form
    essays: Essays

    @property
    def step(self) -> int:
        short = self.length < SHORT
        if self.form.haystack == "essay":
            return 20 if short else 500  # the original has 500 at any length, too many for short contexts
        return 1 if self.length < _TINY else 5 if short else 25

    @property
    def smallest(self) -> int:
        return self.step if self.form.haystack == "essay" else max(self.step, self.form.keys * self.form.values)

    @property
    def largest(self) -> int | None:
        return self.essays.most if self.form.haystack == "essay" else None

    def draft(self, index: int, size: int) -> Draft:
        form, rng = self.form, self.rng(index)
        taken_keys, taken_values = set[str](), set[str]()
        keys = distinct(form.keys, lambda: draw(form.key, rng), taken_keys)
        values = {key: distinct(form.values, lambda: draw(form.value, rng), taken_values) for key in keys}
        needles = [(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        queried = rng.sample(keys, form.queries)
        others = list[tuple[str, str]]()
        if form.haystack == "needles":
            other_keys = distinct(size, lambda: draw(form.key, rng), taken_keys)
            others = list(zip(other_keys, distinct(size, lambda: draw(form.value, rng), taken_values), strict=True))
        text, depths = self._hide([self._sentence(*needle) for needle in needles], others, size, rng)
        # Several values of a key are read in the order of the text; several keys in the order of the question.
        answers = tuple(value for query in queried for key, value in needles if key == query)
        present = [value for _, value in needles + others if value != answers[0] and value not in values[queried[0]]]
        wrong = rng.sample(present, min(self.distractors, len(present)))
        wrong += distinct(self.distractors - len(wrong), lambda: draw(form.value, rng), taken_values)
        prompt = NEEDLE_ALONE if len(answers) == 1 else NEEDLES
        names = {
            "kind": form.value.removesuffix("s") if len(answers) == 1 else form.value,
            "query": "".join(listed(tuple(queried)))[1:],
        }
        return Draft(
            context=prompt.opening.format(**names) + text,
            question=prompt.question.format(**names),
            prefix=prompt.prefix.format(**names),
            references=answers,
            items=listed(answers),
            wrong=tuple(f" {value}" for value in wrong),
            facts={"depth": depths[[value for _, value in needles].index(answers[0])]},
        )

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.form.value, key=key, value=value)

    def _hide(
        self, needles: Sequence[str], others: Sequence[tuple[str, str]], size: int, rng: random.Random
    ) -> tuple[str, list[int]]:
        """The haystack with the needles, in their order, and the depth of each in percent."""
        if self.form.haystack == "essay":
            units, mark = _sentences(self.essays, size), " "
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            places = [len(units) * depth // 100 for depth in depths]
        else:
            units, mark = [self._sentence(*other) for other in others] or [NOISE] * size, "\n"
            places = sorted(rng.sample(range(size), len(needles)))
            depths = [round(100 * place / size) for place in places]
        return mark.join(insert(units, needles, places)), depths


def insert(units: Sequence[str], additions: Sequence[str], places: Sequence[int]) -> list[str]:
    """Put each addition before the unit at its place; places are in ascending order."""
    result, last = list[str](), 0
    for place, addition in zip(places, additions, strict=True):
        result += [*units[last:place], addition]
        last = place
    return result + list(units[last:])
