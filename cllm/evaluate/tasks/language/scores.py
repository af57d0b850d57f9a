"""Numbers of one question from the losses of its options, or from a generated answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_GSM8K_ANSWER = re.compile(r"####\s*(-?\$?[\d.,]*\d)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats of a text of `n_bytes` UTF-8 bytes as bits per byte."""
    return nats / math.log(2) / n_bytes


def smallest(values: Sequence[float]) -> int:
    """The position of the smallest value; of equal ones the first, as numpy's `argmin`."""
    return min(range(len(values)), key=values.__getitem__)


def choice(nats: Sequence[float], n_bytes: Sequence[int], n_characters: Sequence[int], gold: int) -> dict[str, float]:
    """Numbers of a multiple-choice question.

    `accuracy` selects the option with the largest log-probability, `accuracy_norm` with the largest per character
    (lm-eval's `acc` and `acc_norm`), `accuracy_bpb` with the fewest bits per byte (OLMES, arXiv 2406.08446).

    Args:
        nats: negative log-probability of each option.
        n_bytes: UTF-8 bytes of each option.
        n_characters: characters of each option, without the space that separates it from the question.
        gold: the right option.
    """
    options = range(len(nats))
    return {
        "accuracy": float(smallest(nats) == gold),
        "accuracy_norm": float(smallest([nats[i] / n_characters[i] for i in options]) == gold),
        "accuracy_bpb": float(smallest([nats[i] / n_bytes[i] for i in options]) == gold),
        "bits_per_byte": bits_per_byte(nats[gold], n_bytes[gold]),
    }


def pair(nats: Sequence[float]) -> dict[str, float]:
    """Numbers of a minimal pair, good sentence first (BLiMP, arXiv 1912.00582). A tie is wrong."""
    good, bad = nats
    return {"accuracy": float(good < bad), "margin": bad - good}


def last_word(losses: Sequence[float], top1: Sequence[bool]) -> dict[str, float]:
    """Numbers of a word to predict (LAMBADA, arXiv 1606.06031): whether greedy decoding writes it, and its nats."""
    return {"accuracy": float(all(top1)), "word_loss": sum(losses)}


def without_calculator(solution: str) -> str:
    """A GSM8K solution without its calculator marks `<<16-3-4=9>>`."""
    return _CALCULATOR.sub("", solution)


def gsm8k_answer(solution: str) -> str | None:
    """The number after the last `####` of a solution, without commas and dollar signs; None: no such number."""
    found = _GSM8K_ANSWER.findall(solution)
    return _plain(found[-1]) if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, without commas; None: no number."""
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".0").rstrip(".")


def exact_match(text: str, answer: str) -> dict[str, float]:
    """Whether a generated solution ends in `answer`: after `####`, and as its last number however it is written."""
    return {"exact_match": float(gsm8k_answer(text) == answer), "last_number": float(last_number(text) == answer)}
