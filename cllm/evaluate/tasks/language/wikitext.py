"""Bits per byte of a text in windows, half of each read before the other half is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, Field

from cllm.errors import UserError
from cllm.evaluate.suites.suite import Record
from cllm.evaluate.tasks.language.example import draw
from cllm.evaluate.tasks.language.rows import read_text
from cllm.evaluate.tasks.language.scores import bits_per_byte
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import Score, TaskSuite, value
from cllm.evaluate.tasks.text import encode, start
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class WikiTextSettings(Section):
    """Options of the suite `wikitext`."""

    path: str = ""
    """The text file, e.g. of WikiText-2 or WikiText-103: word-level text is read as it is, `<unk>` included."""
    window: int | None = Field(None, ge=4, le=MAX_TOKENS)
    """Tokens of a window, start token included; null: the model's default window."""
    samples: int = Field(0, ge=0, le=MAX_COUNT)
    """Windows, drawn at random; 0: all."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Selects windows."""


class WikiText(TaskSuite):
    """Each token of the text is scored once, after at least half a window of text.

    The first half of a window is the context, whose cache is compressed; the second half is scored. Windows overlap by
    half. The first window has no context but the start token.
    """

    name = "wikitext"
    help = "bits per byte of a text, e.g. WikiText's word-level text"
    settings: ClassVar[type[BaseModel]] = WikiTextSettings
    main = "bits_per_byte"
    numbers: ClassVar[tuple[Score, ...]] = (value("bits_per_byte", "bits/byte"), value("loss", "nats a token"))

    def samples(self, subject: Subject, settings: WikiTextSettings) -> Sequence[Sample]:
        from cllm.evaluate.texts import TokenBytes

        if not settings.path:
            raise UserError("--suite wikitext: needs path=FILE, the text")
        path = Path(settings.path).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        (ids,) = encode(subject, [read_text(path)])
        if len(ids) < 2:
            raise UserError(f"{path}: has {len(ids)} tokens; at least 2 are needed")
        first, sizes = start(subject), TokenBytes(subject.tokenizer).lengths
        half = ((settings.window or subject.window) - len(first)) // 2
        begins = range(0, len(ids), half)
        samples = []
        for n in draw(begins, settings.samples, lambda begin: 0, settings.seed):
            begin = begins[n]
            if begin == 0:
                context, prompt, begin = first or ids[:1], ids[:0], 0 if first else 1
            else:  # the last token of the context is read after compression, because it predicts the first scored one
                context, prompt = (*first, *ids[begin - half : begin - 1]), ids[begin - 1 : begin]
            scored = ids[begin : begins[n] + half]
            if scored:
                bytes_ = max(1, int(sizes[list(scored)].sum()))
                question = Question(prompt=prompt, options=(scored,), option_bytes=(bytes_,))
                samples.append(Sample(task=self.name, context=context, questions=(question,)))
        return samples

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        losses = answer.losses[0]
        bits = bits_per_byte(math.fsum(losses), question.option_bytes[0])
        return {"bits_per_byte": bits, "loss": math.fsum(losses) / len(losses)}

    def means(self, samples: Sequence[Sample], answers: Sequence[Sequence[Answer] | None]) -> list[Record]:
        """Totals over the text: nats over bytes, and nats over tokens."""
        given = [(s.questions[0], of[0]) for s, of in zip(samples, answers, strict=True) if of is not None]
        if not given:
            return []
        nats = math.fsum(loss for _, answer in given for loss in answer.losses[0])
        tokens = sum(len(answer.losses[0]) for _, answer in given)
        n_bytes = sum(question.option_bytes[0] for question, _ in given)
        totals = {"bits_per_byte": bits_per_byte(nats, n_bytes), "loss": nats / tokens}
        totals |= {"tokens_scored": tokens, "bytes": n_bytes}
        return [record | totals for record in super().means(samples, answers)]
