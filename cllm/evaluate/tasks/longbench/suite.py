"""The suite of LongBench's English tasks from local files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from cllm.errors import UserError
from cllm.evaluate.tasks.language.example import draw
from cllm.evaluate.tasks.language.rows import Row
from cllm.evaluate.tasks.language.scores import bits_per_byte
from cllm.evaluate.tasks.longbench.prompt import limit_of, long_sample
from cllm.evaluate.tasks.longbench.table import TASKS, LongTask, configured, task_rows
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import Score, TaskSuite, share, value
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class LongBenchSettings(Section):
    """Options of the suite `longbench`."""

    path: str = ""
    """The folder with NAME.jsonl for each task, or one such file."""
    tasks: list[str] = Field([], min_length=0)
    """Names of tasks, e.g. `qasper|hotpotqa`; empty: every English task in `path`."""
    prompts: str | None = None
    """The benchmark's dataset2prompt.json. Without it, prompts are plain ones and scores compare only with each other;
    those of lcc and repobench-p are the benchmark's."""
    lengths: str | None = None
    """The benchmark's dataset2maxlen.json: tokens of an answer; null: the same numbers from cllm."""
    length: int | None = Field(None, ge=64, le=MAX_TOKENS)
    """Tokens of prompt and answer; longer prompts lose their middle; null: the model's context."""
    samples: int = Field(0, ge=0, le=MAX_COUNT)
    """Rows of each task, drawn at random; 0: all."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Selects rows."""


def row_samples(
    subject: Subject, rows: Sequence[tuple[str, Row]], tasks: dict[str, LongTask], settings: Any, suite: str
) -> list[Sample]:
    """A sample of each row: `settings.samples` of every task.

    Raises:
        UserError: naming the row, if a field is missing or has no answers.
    """
    samples = []
    for name in dict.fromkeys(name for name, _ in rows):
        own = [row for other, row in rows if other == name]
        for position in draw(own, settings.samples, lambda row: 0, settings.seed):
            samples.append(_sample(subject, own[position], tasks[name], limit_of(subject, settings.length, suite)))
    return samples


def _sample(subject: Subject, row: Row, task: LongTask, limit: int) -> Sample:
    context, after = task.parts(row)
    references = row.texts("answers")
    if not references[0]:
        raise row.error("field `answers` has an empty text; it must be an answer")
    classes = row.texts("all_classes") if row.has("all_classes") and row.value("all_classes") else ()
    question = Question(generate=task.generate, facts={"classes": list(classes)})
    return long_sample(subject, context, after, task=task.name, references=references, question=question, limit=limit)


def answer_bits(question: Question, answer: Answer) -> float:
    """Bits per byte of the first reference."""
    return bits_per_byte(math.fsum(answer.losses[0]), question.option_bytes[0])


class LongBench(TaskSuite):
    """Greedy answers to questions about long texts, and the loss of the first reference."""

    name = "longbench"
    help = "question answering, summaries, retrieval and code over long texts (LongBench v1, English)"
    settings: ClassVar[type[BaseModel]] = LongBenchSettings
    main = "score"
    numbers: ClassVar[tuple[Score, ...]] = (share("score"), value("bits_per_byte", "answer bits/byte"))

    def tokens_of_samples(self, settings: LongBenchSettings) -> float:
        return (settings.samples or 200) * (settings.length or 4096) * (len(settings.tasks) or 16)

    def samples(self, subject: Subject, settings: LongBenchSettings) -> Sequence[Sample]:
        if not settings.path:
            raise UserError("--suite longbench: needs path=FOLDER, with the benchmark's NAME.jsonl")
        tasks = configured(settings.prompts, settings.lengths)
        return row_samples(subject, task_rows(settings.path, settings.tasks), tasks, settings, self.name)

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        score = TASKS[sample.task].score(answer.text, question.references, question.facts["classes"])
        return {"score": score, "bits_per_byte": answer_bits(question, answer)}
