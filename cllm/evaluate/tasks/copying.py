"""Copying of random tokens: does a model look up what came earlier, and up to which distance?

A sequence is [BOS, r, filler, r] with T random tokens r, and random filler if there is any. The second copy is scored.
Its first token cannot be known and is read; each of the others can be copied from `distance` = T + filler tokens ago.
No token occurs twice before the second copy, if the vocabulary has enough of them, so that the token before decides
what follows. A model that does not look up the first copy loses about log V nats per token. (Induction heads are
usually found by such sequences: Olsson et al., 2022.)

The control is a second question on the same context: T new random tokens, which no context can predict. Their loss is
that of the first copy, measured at the place of the second one and on top of the same cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cllm.errors import UserError
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import TaskSuite, share, value
from cllm.evaluate.tasks.text import start
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    import numpy as np

    from cllm.evaluate.subjects import Subject

_SHORTEST = 32
"""The shortest default distance."""


class CopyingSettings(Section):
    """Options of `--suite copying:...`."""

    distances: list[int] | None = None
    """Tokens from the first occurrence of a token to the second. null: 32, 64, 128, ... while both copies fit into the
    model's window, or the longest that fits."""
    length: int | None = Field(None, ge=2, le=MAX_TOKENS)
    """T, the tokens of a copy; random filler between the copies makes up the distance. null: the distance itself, so
    that there is no filler."""
    samples: int = Field(100, ge=1, le=MAX_COUNT)
    """Sequences of each distance."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the random tokens."""


class Copying(TaskSuite):
    """Accuracy and loss on the second copy of random tokens, by distance."""

    name = "copying"
    help = "the second copy of random tokens, by distance"
    settings = CopyingSettings
    numbers = (share("accuracy"), value("loss"), value("new_loss", "loss of new tokens", detail=True))
    main = "accuracy"

    def tokens_of_samples(self, settings: CopyingSettings) -> float:
        return 2 * settings.samples * sum(settings.distances or [1000])

    def samples(self, subject: Subject, settings: CopyingSettings) -> Sequence[Sample]:
        import numpy as np

        tokens, begin, made = ordinary_tokens(subject), start(subject), []
        for distance in _distances(subject, settings, len(begin)):
            length = settings.length or distance
            draw = np.random.default_rng((settings.seed, distance, length))
            for _ in range(settings.samples):
                drawn = tuple(draw.choice(tokens, distance + length, replace=distance + length > len(tokens)).tolist())
                copied, filler, new = drawn[:length], drawn[length:distance], drawn[distance:]
                questions = tuple(
                    Question(prompt=ids[:1], options=(ids[1:],), facts={"distance": distance, "tokens": kind})
                    for ids, kind in ((copied, "copied"), (new, "new"))
                )
                context = begin + copied + filler
                made.append(Sample(task=f"distance={distance}", context=context, questions=questions))
        return made

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        right, loss = mean(answer.top1[0]), mean(answer.losses[0])
        return {"accuracy": right, "loss": loss} if question.facts["tokens"] == "copied" else {"new_loss": loss}


def _distances(subject: Subject, settings: CopyingSettings, begin: int) -> list[int]:
    """Raises `UserError` for distances that are shorter than a copy."""
    if settings.distances is None:
        least = max(settings.length or _SHORTEST, _SHORTEST)
        most = subject.window - begin + 1  # the last token of the second copy is not read
        doubled = (least * 2**n for n in range(32))
        shortened = most - settings.length if settings.length else most // 2
        return [d for d in doubled if d + (settings.length or d) <= most] or [max(shortened, settings.length or 2)]
    for distance in settings.distances:
        if distance < (settings.length or 2):
            what = "2" if settings.length is None else f"the length of a copy, {settings.length},"
            raise UserError(f"--suite copying: distances has {distance}; allowed: {what} or more")
    return settings.distances


def ordinary_tokens(subject: Subject) -> np.ndarray:
    """The ids of the vocabulary without special tokens, ascending: int64 (V,).

    Raises:
        UserError: if the subject has no tokenizer, or no ordinary tokens.
    """
    import numpy as np

    tokenizer = subject.tokenizer
    size = min(len(tokenizer), subject.vocab_size)
    tokens = np.setdiff1d(np.arange(size), np.array(tokenizer.all_special_ids, dtype=np.int64))
    if not tokens.size:
        raise UserError(f"{subject.path}: its tokenizer has no ordinary tokens")
    return tokens


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)
