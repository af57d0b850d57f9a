"""Multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs, then the keys again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cllm.evaluate.tasks.copying import ordinary_tokens
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import TaskSuite, share, value
from cllm.evaluate.tasks.text import start
from cllm.section import MAX_COUNT, MAX_SEED, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class MqarSettings(Section):
    """Options of `--suite mqar:...`."""

    pairs: list[int] = Field([4, 8, 16], min_length=1)
    """Key-value pairs of a sample."""
    samples: int = Field(100, ge=1, le=MAX_COUNT)
    """Samples of each number of pairs."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of keys and values."""


class Mqar(TaskSuite):
    """Accuracy of the value of each key."""

    name = "mqar"
    help = "multi-query associative recall (Zoology)"
    settings = MqarSettings
    numbers = (share("accuracy"), value("loss"))
    main = "accuracy"

    def samples(self, subject: Subject, settings: Any) -> Sequence[Sample]:
        import numpy as np

        draw = np.random.default_rng(settings.seed)
        tokens = ordinary_tokens(subject)
        half = len(tokens) // 2
        made = []
        for pairs in settings.pairs:
            for _ in range(settings.samples):
                keys = draw.choice(tokens[:half], pairs, replace=False).tolist()
                values = draw.choice(tokens[half:], pairs).tolist()
                context = start(subject) + tuple(t for pair in zip(keys, values, strict=True) for t in pair)
                questions = tuple(
                    Question(prompt=(k,), options=((v,),), facts={"pairs": pairs})
                    for k, v in zip(keys, values, strict=True)
                )
                made.append(Sample(task=f"pairs={pairs}", context=context, questions=questions))
        return made

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        return {"accuracy": float(answer.top1[0][0]), "loss": answer.losses[0][0]}
