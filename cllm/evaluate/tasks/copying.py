"""Copying of random tokens: does a model look up what came earlier, and at which distance?

A sequence is [BOS, r, filler, r] with T random tokens r. The score is on the second copy, whose every token but the
first can be known from the first copy. Random tokens have no statistics that a model could know, so a model that does
not look up the first copy loses log V nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import TaskSuite, share, value
from cllm.evaluate.tasks.text import start
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class CopyingSettings(Section):
    """Options of `--suite copying:...`."""

    length: int = Field(32, ge=2, le=MAX_TOKENS)
    """T, tokens of a copy."""
    distances: list[int] = Field([32, 64, 128], min_length=1)
    """Tokens from a token of the first copy to its second one: T, or more with random filler between the copies."""
    samples: int = Field(100, ge=1, le=MAX_COUNT)
    """Sequences of each distance."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the random tokens."""


class Copying(TaskSuite):
    """Loss and accuracy on the second copy of random tokens."""

    name = "copying"
    help = "loss and accuracy on the second copy of random tokens, by distance"
    settings = CopyingSettings
    numbers = (share("accuracy"), value("loss"))
    main = "accuracy"

    def samples(self, subject: Subject, settings: Any) -> Sequence[Sample]:
        import numpy as np

        draw = np.random.default_rng(settings.seed)
        tokens = ordinary_tokens(subject)
        made = []
        for distance in settings.distances:
            for _ in range(settings.samples):
                copy = tuple(draw.choice(tokens, settings.length).tolist())
                filler = tuple(draw.choice(tokens, distance - settings.length).tolist())
                question = Question(prompt=copy[:1], options=(copy[1:],), facts={"distance": distance})
                made.append(
                    Sample(task=f"distance={distance}", context=start(subject) + copy + filler, questions=(question,))
                )
        return made

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        losses, right = answer.losses[0], answer.top1[0]
        return {"accuracy": sum(right) / len(right), "loss": sum(losses) / len(losses)}


def ordinary_tokens(subject: Subject) -> Any:
    """The ids of the vocabulary without special tokens: int64 (V,), ascending."""
    import numpy as np

    size = min(len(subject.tokenizer), subject.vocab_size)
    return np.setdiff1d(np.arange(size), np.array(subject.tokenizer.all_special_ids, dtype=np.int64))
