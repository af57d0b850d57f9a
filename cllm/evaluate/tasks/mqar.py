"""Multi-query associative recall (MQAR) of Zoology, arXiv 2312.04927, with the tokens of a trained model.

A sequence of T tokens begins with N key-value pairs. Then every key comes again, and the next token to predict is its
value. The queries are sparse: with (T - 2 N) / 2 places of two tokens after the pairs, key i is the first token of
place g_i, and the N places are drawn without replacement with p(g) proportional to (g + 1)^(a - 1), a = 0.01. All other
tokens are random ones of the vocabulary. Keys are different tokens of the first half of the vocabulary, values
different tokens of the second half.

The pairs are the context of a sample, so that `--posthoc` compresses them alone. Each query is a question: its prompt
is everything from the end of the pairs to the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cllm.errors import UserError
from cllm.evaluate.tasks.copying import ordinary_tokens
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import TaskSuite, share, value
from cllm.evaluate.tasks.text import start
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    import numpy as np

    from cllm.evaluate.subjects import Subject

_POWER = 0.01
"""a, as in the paper's experiments."""
_SHORTEST = 64
"""The smallest T of the paper's experiments."""


class MqarSettings(Section):
    """Options of `--suite mqar:...`."""

    pairs: list[int] = Field([4, 8, 16, 32], min_length=1)
    """N, the key-value pairs of a sample."""
    length: int | None = Field(None, ge=4, le=MAX_TOKENS)
    """T, the tokens of a sample without BOS: an even number, at least 4 N. null: 4 N, but at least 64."""
    samples: int = Field(100, ge=1, le=MAX_COUNT)
    """Samples of each number of pairs."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of all tokens and places."""


class Mqar(TaskSuite):
    """Accuracy and loss of the values of all keys, by number of pairs."""

    name = "mqar"
    help = "multi-query associative recall (Zoology), by number of key-value pairs"
    settings = MqarSettings
    numbers = (share("accuracy"), value("loss"))
    main = "accuracy"

    def tokens_of_samples(self, settings: MqarSettings) -> float:
        return settings.samples * sum(settings.length or max(64, 4 * pairs) for pairs in settings.pairs)

    def samples(self, subject: Subject, settings: MqarSettings) -> Sequence[Sample]:
        import numpy as np

        tokens, begin, made = ordinary_tokens(subject), start(subject), []
        for pairs in settings.pairs:
            length = settings.length or max(4 * pairs, _SHORTEST)
            _check(subject, pairs, length, len(tokens))
            draw = np.random.default_rng((settings.seed, pairs, length))
            for _ in range(settings.samples):
                made.append(_sample(draw, tokens, begin, pairs, length))
        return made

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        return {"accuracy": float(answer.top1[0][0]), "loss": answer.losses[0][0]}


def _check(subject: Subject, pairs: int, length: int, vocabulary: int) -> None:
    if pairs < 1:
        raise UserError(f"--suite mqar: pairs has {pairs}; allowed: 1 or more")
    if length % 2 or length < 4 * pairs:
        raise UserError(f"--suite mqar: length is {length}; allowed with {pairs} pairs: even, {4 * pairs} or more")
    if vocabulary <= length:
        raise UserError(
            f"--suite mqar: {length} tokens with {pairs} pairs, but {subject.name} has {vocabulary} ordinary tokens; "
            "allowed: fewer than that"
        )


def _sample(draw: np.random.Generator, tokens: np.ndarray, begin: tuple[int, ...], pairs: int, length: int) -> Sample:
    import numpy as np

    half, places = len(tokens) // 2, length // 2 - pairs
    keys = draw.choice(tokens[:half], pairs, replace=False)
    values = draw.choice(tokens[half:], pairs, replace=False)
    weight = np.arange(1, places + 1) ** (_POWER - 1)
    place = draw.choice(places, pairs, replace=False, p=weight / weight.sum())
    after = draw.choice(tokens, 2 * places)
    after[2 * place] = keys
    questions = tuple(
        Question(
            prompt=tuple(after[: 2 * g + 1].tolist()),
            options=((int(v),),),
            facts={"distance": 2 * (pairs - i) + 2 * int(g)},
        )
        for i, (v, g) in enumerate(zip(values, place, strict=True))
    )
    context = begin + tuple(np.stack((keys, values), axis=1).flatten().tolist())
    return Sample(task=f"pairs={pairs}", context=context, questions=questions)
