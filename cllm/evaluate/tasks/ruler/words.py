"""Random words, numbers and identifiers, and the word lists that they are drawn from."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from cllm.errors import UserError

KINDS = ("numbers", "words", "uuids")
"""Kinds of keys and values of needles."""
_SEVEN_DIGITS = (10**6, 10**7 - 1)


@dataclass(frozen=True)
class WordLists:
    """English words, each list sorted and without duplicates."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @cached_property
    def all(self) -> list[str]:
        """Every word once, sorted."""
        return sorted({*self.nouns, *self.adjectives, *self.verbs})


@cache
def word_lists() -> WordLists:
    """Load the word lists of the package wonderwords.

    Raises:
        UserError: if it is not installed.
    """
    try:
        from wonderwords import Defaults, RandomWord
    except ImportError:
        raise UserError(
            "--suite ruler: this task draws its words from the package wonderwords, which is not installed; "
            "pip install cllm[ruler]"
        ) from None
    lists = (Defaults.NOUNS, Defaults.ADJECTIVES, Defaults.VERBS)
    return WordLists(*(tuple(RandomWord(enhanced_prefixes=False, words=words).filter()) for words in lists))


def draw(kind: str, rng: random.Random) -> str:
    """Draw a key or a value of a needle.

    Args:
        kind: `numbers` (7 digits), `words` (adjective-noun) or `uuids` (version 4, of 128 random bits).
    """
    if kind == "numbers":
        return str(rng.randint(*_SEVEN_DIGITS))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    lists = word_lists()
    return f"{rng.choice(lists.adjectives)}-{rng.choice(lists.nouns)}"


def letters(count: int, alphabet: str, rng: random.Random) -> str:
    """Draw a word of `count` letters of the alphabet."""
    return "".join(rng.choices(alphabet, k=count))


def name(count: int, rng: random.Random) -> str:
    """Draw the name of a variable: `count` capital letters."""
    return letters(count, string.ascii_uppercase, rng)


def coded_word(rng: random.Random) -> str:
    """Draw a word of 6 small letters."""
    return letters(6, string.ascii_lowercase, rng)


def distinct(count: int, one: Callable[[], str], taken: set[str]) -> list[str]:
    """Draw `count` strings that differ from each other and from those in `taken`, and add them to `taken`."""
    drawn = list[str]()
    while len(drawn) < count:
        word = one()
        if word not in taken:
            taken.add(word)
            drawn.append(word)
    return drawn
