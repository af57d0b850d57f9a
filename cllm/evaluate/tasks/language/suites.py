"""Suites of the data sets in `datasets.py`: questions from a local file, as token ids, and their scores."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cllm.errors import UserError
from cllm.evaluate.suites.suite import Record
from cllm.evaluate.tasks.language import scores
from cllm.evaluate.tasks.language.datasets import DATASETS, DataSet
from cllm.evaluate.tasks.language.example import Example, draw, lettered, with_shots
from cllm.evaluate.tasks.language.rows import Row, read_rows
from cllm.evaluate.tasks.language.wikitext import WikiText
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import ALL, Score, TaskSuite, share, value
from cllm.evaluate.tasks.text import continuations, n_bytes, pieces, start
from cllm.section import MAX_COUNT, MAX_SEED, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

log = logging.getLogger(__name__)

_NEXT_QUESTION = "\n\nQuestion:"


class FileSettings(Section):
    """Options of a data set in a file."""

    shots: int = Field(0, ge=0, le=1000)
    """Solved examples before every question; they are the same for every question (of a group such as a subject)."""
    shots_path: str | None = None
    """The file of the examples; null: examples come from `path` and are not scored."""
    samples: int | None = Field(None, ge=0, le=MAX_COUNT)
    """Questions, drawn evenly from the groups; 0: all; null: the suite's default."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Selects examples and questions."""
    start: bool = True
    """Whether the model's start token (BOS or EOS) stands before the text. lm-evaluation-harness leaves it out
    where the tokenizer does not add it."""
    skip_long: bool = False
    """Leave out questions that are longer than the model's context, and log their number; else they are an error."""
    path: str = ""
    """The file with the questions, or a folder whose files are read by name: .jsonl, .json, .csv, .tsv (also with .gz,
    .xz, .bz2, .zst) or .parquet."""


class LetterSettings(FileSettings):
    """Options of a data set whose options can be listed in the question."""

    letters: bool | None = None
    """Whether options are listed as A, B, ... and answered by their letter, else by their text; null: the data set's
    usual form. Models below about 1B parameters answer letters at chance (OLMES, arXiv 2406.08446)."""


class SolutionSettings(FileSettings):
    """Options of a data set with worked solutions."""

    generate: int = Field(0, ge=0, le=8192)
    """Tokens of a solution to generate greedily for exact match, e.g. 256; 0: measure the gold solution only."""


_SETTINGS: dict[str, type[FileSettings]] = {"solution": SolutionSettings}
_NUMBERS: dict[str, tuple[Score, ...]] = {
    "choice": (
        share("accuracy"),
        share("accuracy_norm", "norm"),
        share("accuracy_bpb", "by bpb"),
        value("bits_per_byte", "gold bits/byte"),
    ),
    "pair": (share("accuracy"), value("margin", "margin (nats)")),
    "word": (share("accuracy"), value("word_loss", "nats a word"), value("bits_per_byte", "bits/byte")),
    "solution": (value("bits_per_byte", "gold bits/byte"), share("exact_match"), share("last_number")),
}


class QuestionSuite(TaskSuite):
    """The suite of one data set."""

    data: ClassVar[DataSet]

    def samples(self, subject: Subject, settings: FileSettings) -> Sequence[Sample]:
        if not settings.path:
            raise UserError(f"--suite {self.name}: needs path=FILE, the file with the questions")
        examples = self._examples(settings.path, settings)
        shots, scored = self._shots(examples, settings)
        count = self.data.samples if settings.samples is None else settings.samples
        chosen = [scored[i] for i in draw(scored, count, lambda example: example.group, settings.seed)]
        samples = [self._sample(subject, example, shots.get(example.group, ()), settings) for example in chosen]
        if not settings.skip_long or subject.context is None:
            return samples
        short = [sample for sample in samples if sample.longest <= subject.context]
        if len(short) < len(samples):
            left = len(samples) - len(short)
            log.warning("%s: left out %d of %d questions, longer than the context", self.name, left, len(samples))
        return short

    def _examples(self, path: str, settings: FileSettings) -> list[Example]:
        examples = [self._example(row) for row in read_rows(Path(path).expanduser(), self.data.columns)]
        letters = getattr(settings, "letters", None)
        letters = self.data.letters if letters is None else letters
        return [lettered(example) for example in examples] if letters else examples

    def _example(self, row: Row) -> Example:
        """The example of a row. Raises `UserError` for a choice without alternatives, and for an option without text,
        which has no log-probability."""
        example = self.data.example(row)
        if self.data.score == "choice" and len(example.options) < 2:
            raise row.error(f"has {len(example.options)} option; a choice needs 2 or more")
        empty = [n for n, option in enumerate(example.options, start=1) if not option.strip()]
        if empty:
            raise row.error(f"option {empty[0]} of {len(example.options)} is empty; it must have text")
        return example

    def _shots(
        self, examples: list[Example], settings: FileSettings
    ) -> tuple[Mapping[str, Sequence[Example]], list[Example]]:
        """The solved examples of each group, and the examples to score."""
        if settings.shots == 0:
            if settings.shots_path is not None:
                raise UserError(f"--suite {self.name}: shots_path needs shots=N, the number of examples")
            return {}, examples
        source = examples if settings.shots_path is None else self._examples(settings.shots_path, settings)
        members: dict[str, list[int]] = {}
        for position, example in enumerate(source):
            members.setdefault(example.group, []).append(position)
        shots, taken = {}, set()
        for group in dict.fromkeys(example.group for example in examples):
            positions = members.get(group, [])
            if len(positions) < settings.shots + (settings.shots_path is None):
                where = f"{settings.shots_path or settings.path}{f' ({group})' if group else ''}"
                raise UserError(f"--suite {self.name}: shots={settings.shots}: {where} has {len(positions)} examples")
            drawn = random.Random(f"{settings.seed} {group}").sample(positions, settings.shots)
            shots[group] = [self.data.shot(source[i]) for i in drawn]
            taken.update(drawn)
        scored = [e for i, e in enumerate(examples) if settings.shots_path is not None or i not in taken]
        return shots, scored

    def _sample(self, subject: Subject, example: Example, shots: Sequence[Example], settings: FileSettings) -> Sample:
        separator = self.data.separator
        shown = with_shots(example, shots, header=self.data.header(example.group), separator=separator)
        context, prompt, options = cut(subject, shown.context, shown.cue, shown.options)
        facts = {**example.facts, "characters": [max(1, len(option) - 1) for option in example.options]}
        question = Question(
            prompt=prompt,
            options=options,
            gold=example.gold,
            option_bytes=n_bytes(example.options),
            generate=getattr(settings, "generate", 0),
            stop=(_NEXT_QUESTION,),
            references=example.references,
            facts=facts,
        )
        # A text without a context has to follow a start token, or its first token would not be scored.
        first = start(subject) if settings.start or not (context or prompt) else ()
        return Sample(task=example.task or self.name, context=(*first, *context), questions=(question,))

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        return _SCORES[self.data.score](question, answer)

    def means(self, samples: Sequence[Sample], answers: Sequence[Sequence[Answer] | None]) -> list[Record]:
        """As the base's; the mean over the tasks weights questions alike, as the data sets' papers do."""
        records = super().means(samples, answers)
        if not records or records[-1]["task"] != ALL:
            return records
        pooled, *_ = super().means([replace(sample, task=ALL) for sample in samples], answers)
        return [*records[:-1], pooled | {"tasks": records[-1]["tasks"]}]


def cut(
    subject: Subject, context: str, cue: str, options: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The ids of the context, of the cue, and of each option.

    The cue has at least one token if there is any text before the options, so that every token of an option is
    predicted from what was read after the context.
    """
    before, continued = continuations(subject, context + cue, options)
    end = min(len(pieces(subject, context, cue + options[0])[0]), max(0, len(before) - 1))
    return before[:end], before[end:], continued


def _nats(answer: Answer) -> list[float]:
    return [sum(losses) for losses in answer.losses]


def _choice(question: Question, answer: Answer) -> dict[str, float]:
    return scores.choice(_nats(answer), question.option_bytes, question.facts["characters"], question.gold)


def _pair(question: Question, answer: Answer) -> dict[str, float]:
    return scores.pair(_nats(answer))


def _word(question: Question, answer: Answer) -> dict[str, float]:
    bits = scores.bits_per_byte(sum(answer.losses[0]), question.option_bytes[0])
    return scores.last_word(answer.losses[0], answer.top1[0]) | {"bits_per_byte": bits}


def _solution(question: Question, answer: Answer) -> dict[str, float]:
    numbers = {"bits_per_byte": scores.bits_per_byte(sum(answer.losses[0]), question.option_bytes[0])}
    return numbers | (scores.exact_match(answer.text, question.references[0]) if question.generate else {})


_SCORES: dict[str, Callable[[Question, Answer], dict[str, float]]] = {
    "choice": _choice,
    "pair": _pair,
    "word": _word,
    "solution": _solution,
}


def _suite(data: DataSet) -> type[QuestionSuite]:
    members: dict[str, Any] = {
        "name": data.name,
        "help": data.help,
        "main": data.main,
        "numbers": _NUMBERS[data.score],
        "settings": FileSettings if data.letters is None else LetterSettings,
        "groups": data.groups,
        "data": data,
        "__module__": __name__,
    }
    members["settings"] = _SETTINGS.get(data.score, members["settings"])
    return type(f"{data.name.title().replace('_', '')}Suite", (QuestionSuite,), members)


_SUITES: tuple[type[TaskSuite], ...] = (*(_suite(data) for data in DATASETS), WikiText)


def language_suites() -> tuple[TaskSuite, ...]:
    """A suite for each data set, and WikiText."""
    return tuple(suite() for suite in _SUITES)
