"""Variable tracking: a chain of assignments hidden in noise, of which every name is to be found."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cllm.evaluate.tasks.ruler.draft import SHORT, Draft, Task
from cllm.evaluate.tasks.ruler.essays import sentences
from cllm.evaluate.tasks.ruler.lengths import largest_size
from cllm.evaluate.tasks.ruler.needles import insert
from cllm.evaluate.tasks.ruler.prompts import NOISE, TRACKING
from cllm.evaluate.tasks.ruler.words import distinct, name

HOPS = 4
LETTERS, LETTERS_OF_EXAMPLE = 5, 3
_EXAMPLE_TOKENS = 500
_VALUES = range(10_000, 99_999)


@dataclass(frozen=True, kw_only=True)
class Tracking(Task):
    """The names of a chain's variables, after one worked example. Sizes are lines of noise."""

    generate = 30
    count: Callable[[str], int]
    """Tokens of a text, for the example."""

    @property
    def step(self) -> int:
        return 1 if self.length < SHORT else 10

    @property
    def smallest(self) -> int:
        return 2 if self.length < SHORT else 10

    def draft(self, index: int, size: int) -> Draft:
        rng, taken = self.rng(index), set[str]()
        draft = self._problem(size, LETTERS, rng, taken)
        wrong = distinct(self.distractors, lambda: name(LETTERS, rng), taken)
        return Draft(
            context=self.example + draft.context,
            question=draft.question,
            prefix=draft.prefix,
            references=draft.references,
            items=draft.items,
            wrong=tuple(f" {word}" for word in wrong),
            facts=draft.facts,
        )

    def _problem(self, size: int, letters: int, rng: random.Random, taken: set[str]) -> Draft:
        """The chain, in `size` lines of noise. If they are too few, their sentences are lines."""
        names = tuple(distinct(HOPS + 1, lambda: name(letters, rng), taken))
        value = str(rng.choice(_VALUES))
        sources = (value, *(f"VAR {source}" for source in names))
        chain = [f"VAR {target} = {source}" for target, source in zip(names, sources, strict=False)]
        units = [NOISE] * size if size > len(chain) else sentences(NOISE) * size
        places = sorted(rng.sample(range(len(units)), len(chain)))
        facts = {"value": value, "count": len(names)}
        return Draft(
            context=TRACKING.opening + "\n".join(insert(units, chain, places)),
            question=TRACKING.question.format(**facts),
            prefix=TRACKING.prefix.format(**facts),
            references=names,
            items=tuple(f" {word}" for word in names),
            wrong=(),
            facts={"depth": round(100 * places[0] / len(units))},
        )

    @cached_property
    def example(self) -> str:
        """A solved problem, the same before every sample.

        It has at most 500 tokens, or an eighth of a length below 4,096, if that is possible.
        """

        def text(size: int) -> str:
            draft = self._problem(size, LETTERS_OF_EXAMPLE, self.rng("example"), set())
            return f"{draft.context}{draft.question}{draft.prefix}{''.join(draft.items)}\n\n"

        limit = min(_EXAMPLE_TOKENS, self.length * _EXAMPLE_TOKENS // SHORT)
        size = largest_size(lambda size: self.count(text(size)), limit, smallest=2, step=1)
        return text(size or 2)
