"""The base of task suites: from samples to means, standard errors, records and a table."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel

from cllm.errors import UserError
from cllm.evaluate.suites.suite import RUN, STEP, Job, Number, Record, Suite, subject_of
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.units import calibration_slug
from cllm.posthoc import UNCOMPRESSED
from cllm.tables import Column, aligned

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

log = logging.getLogger(__name__)

AS_IS = "as it is"
"""The spec of records of the uncompressed cache, when no --posthoc was given."""
_LONGEST_NAME = 150
"""Characters of a file's or folder's name without its hash."""
ALL = "all"
"""The task of a record that averages the tasks of a suite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score(Number):
    """A number that `TaskSuite.score` returns for a question. Records and tables have its mean."""

    percent: bool = False
    """Whether it is a share, from 0 to 1; records and tables have percentages."""
    detail: bool = False
    """Whether it is left out of the tables of several specs."""


def share(key: str, head: str | None = None, *, detail: bool = False) -> Score:
    """A share from 0 to 1, shown as a percentage; its column is called `head` (default: `key`) and a percent sign."""
    name, form = f"{head or key} %", "{:.1f}".format
    return Score(key=key, head=name, form=form, tag=key, higher_is_better=True, percent=True, detail=detail)


def value(
    key: str, head: str | None = None, form: Callable[[Any], str] = "{:.3f}".format, *, detail: bool = False
) -> Score:
    """A number that is shown as it is, such as a loss in nats."""
    return Score(key=key, head=head or key, form=form, tag=key, detail=detail)


class Mean(NamedTuple):
    """A mean over questions."""

    mean: float
    error: float | None
    """Standard error of the mean; questions of one sample count as dependent. None for a single sample."""
    questions: int


def mean_over_questions(numbers: Sequence[Sequence[float]]) -> Mean:
    """The mean over all questions of all samples, given the numbers of each sample's questions.

    The standard error is the cluster-robust one: with N questions in S samples, residuals summed in each sample,
    SE^2 = S / (S - 1) * sum_s (sum_q r_sq)^2 / N^2, which is s / sqrt(N) for one question a sample.
    """
    samples = [sample for sample in numbers if sample]
    count = sum(map(len, samples))
    mean = math.fsum(x for sample in samples for x in sample) / count
    if len(samples) < 2:
        return Mean(mean, None, count)
    squares = math.fsum(math.fsum(x - mean for x in sample) ** 2 for sample in samples)
    return Mean(mean, math.sqrt(len(samples) / (len(samples) - 1) * squares) / count, count)


class TaskSuite(Suite):
    """A suite of samples. A subclass states its names, makes samples and scores answers.

    Its module is imported for every `--help`: import torch and numpy inside of its methods.
    """

    settings: ClassVar[type[BaseModel]]
    """The options `KEY=VALUE` of `--suite NAME:KEY=VALUE,...`: a `cllm.section.Section` with a docstring under each
    field."""
    main: ClassVar[str]
    """The key of the number that tables of several specs and comparisons show."""
    numbers: ClassVar[tuple[Score, ...]]
    """The numbers that `score` returns, made by `share` and `value`."""
    groups: ClassVar[tuple[str, ...]] = ()
    """Facts of questions by whose values records also have means, such as `depth`."""
    takes_text = False
    compresses = True
    _made_for: Subject | None = None
    """The subject of `_made`."""
    _made: Mapping[str, Sequence[Sample]] = {}
    """Samples by their settings."""

    # ---- what a task suite implements

    @abstractmethod
    def samples(self, subject: Subject, settings: Any) -> Sequence[Sample]:
        """The samples, the same for the same settings and tokenizer. It runs before anything is measured.

        Raises:
            UserError: if the subject or a file does not fit.
        """

    @abstractmethod
    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        """The numbers of one question by the keys of `numbers`; one that has no meaning for it may be left out."""

    # ---- what the base does with them

    def prepared(self, subject: Subject, settings: BaseModel) -> Sequence[Sample]:
        """The samples, made once for a subject and settings, and checked.

        Raises:
            UserError: if there are none, if one is longer than the subject's context, and as `samples` does.
        """
        if self._made_for is not subject:
            self._made_for, self._made = subject, {}
        key = settings.model_dump_json()
        if key not in self._made:
            samples = self.samples(subject, settings)
            self._check(subject, samples)
            self._made = {**self._made, key: samples}
        return self._made[key]

    def _check(self, subject: Subject, samples: Sequence[Sample]) -> None:
        if not any(sample.questions for sample in samples):
            raise UserError(f"--suite {self.name}: there are no samples for {subject.name}")
        longest = max(samples, key=lambda sample: sample.longest)
        if subject.context is not None and longest.longest > subject.context:
            raise UserError(
                f"--suite {self.name}: a sample of {longest.task} has {longest.longest} tokens; allowed: up to the "
                f"context of {subject.name}, {subject.context}"
            )
        names = {slug(ALL): ALL}
        for task in dict.fromkeys(sample.task for sample in samples):
            if (other := names.setdefault(slug(task), task)) != task or task == ALL:
                raise UserError(
                    f"--suite {self.name}: the results of tasks {other!r} and {task!r} would have one file; rename one"
                    if task != ALL
                    else f"--suite {self.name}: a task is called {ALL!r}, as the mean over tasks is; rename it"
                )
        for sample in samples:
            if not sample.context and any(q.generate and not q.prompt for q in sample.questions):
                raise UserError(f"--suite {self.name}: a sample of {sample.task} has nothing to generate from")

    def spec_groups(self, specs: Sequence[str]) -> list[list[str]]:
        """Methods that choose for an entire batch read contexts one at a time: they share no prefill with others."""
        from cllm.posthoc.registry import parse

        groups: dict[bool, list[str]] = {False: [], True: []}
        for spec in specs:
            groups[parse(spec).chooses_for_batch].append(spec)
        return [group for group in groups.values() if group]

    def tokens(self, options: argparse.Namespace, given: BaseModel | None, data: Path | None) -> float:
        return self.tokens_of_samples(given or self.settings())

    def tokens_of_samples(self, settings: Any) -> float:
        """A rough number of tokens of all samples, see `tokens`."""
        return 300 * (getattr(settings, "samples", None) or 1000) * (1 + (getattr(settings, "shots", None) or 0))

    def check(self, subject: Subject, job: Job) -> None:
        from cllm.posthoc.registry import parse

        for spec in job.options.posthoc:
            parse(spec)
        samples = self.prepared(subject, job.given or self.settings())
        if job.options.posthoc and (empty := [sample.task for sample in samples if not sample.context]):
            raise UserError(
                f"--suite {self.name}: samples of {empty[0]} have no context, so --posthoc has nothing to compress"
            )

    def run(self, subject: Subject, job: Job) -> list[Record]:
        from cllm.evaluate.tasks.run import run_samples

        self.check(subject, job)
        settings = job.given or self.settings()
        samples = self.prepared(subject, settings)
        specs = job.options.posthoc
        results = run_samples(
            subject,
            samples,
            specs,
            job.device,
            batch=job.settings.batch,
            label=f"{subject.name} on {self.name}",
            refused=job.refused,
            calibration=job.settings.calibration,
        )
        records = []
        for result in results:
            identity = {"set": self.name, "settings": settings.model_dump(mode="json"), "spec": result.spec or AS_IS}
            facts = {
                "ratio_to_own": result.own_nbytes / result.nbytes if result.nbytes else None,
                "host_share_of_own": result.host_nbytes / result.own_nbytes if result.own_nbytes else None,
                "weight_bytes": result.weight_bytes,
                "facts": result.facts,
                "calibration": result.calibration,
                "seconds": round(result.seconds, 3),
            }
            for task, reason in () if result.spec in job.refused else result.left_out.items():
                log.warning("%s: %s: %s is left out: %s", self.name, result.spec, task, reason)
            for numbers in self.means(samples, result.answers):
                records.append(self.record(subject, job, identity | numbers | facts) | {"set": self.name})
        return records

    def means(self, samples: Sequence[Sample], answers: Sequence[Sequence[Answer] | None]) -> list[Record]:
        """The numbers of every task, from the answers to each sample's questions, and their means over tasks.

        A task without answers (None) has no record. Then there is no mean over tasks either: it would not compare with
        that of other specs.
        """
        by_task: dict[str, list[list[tuple[Question, dict[str, float]]]]] = {}
        for sample, given in zip(samples, answers, strict=True):
            if given is None:
                continue
            scores = [(q, self.score(sample, q, answer)) for q, answer in zip(sample.questions, given, strict=True)]
            by_task.setdefault(sample.task, []).append(scores)
        tasks = [{"task": task} | self._numbers(scores) | self._by_group(scores) for task, scores in by_task.items()]
        complete = all(given is not None for given in answers)
        return [*tasks, {"task": ALL} | self._over_tasks(tasks)] if complete else tasks

    def _numbers(self, samples: Sequence[Sequence[tuple[Question, Mapping[str, float]]]]) -> Record:
        record: Record = {"samples": len(samples), "questions": sum(map(len, samples))}
        for number in self.numbers:
            scale, key = 100 if number.percent else 1, number.key
            kept = [[scores[key] for _, scores in sample if key in scores] for sample in samples]
            if any(kept):
                record[key], record[f"{key}_stderr"], _ = _scaled(mean_over_questions(kept), scale)
        return record

    def _by_group(self, samples: Sequence[Sequence[tuple[Question, Mapping[str, float]]]]) -> Record:
        groups: Record = {}
        for fact in self.groups:
            values = sorted({q.facts[fact] for sample in samples for q, _ in sample if fact in q.facts})
            if values:
                groups[fact] = {
                    str(v): self._numbers([[(q, s) for q, s in sample if q.facts.get(fact) == v] for sample in samples])
                    for v in values
                }
        return {"groups": groups} if groups else {}

    def _over_tasks(self, tasks: Sequence[Record]) -> Record:
        record: Record = {key: sum(task[key] for task in tasks) for key in ("samples", "questions")}
        record["tasks"] = len(tasks)
        for number in self.numbers:
            kept = [task for task in tasks if number.key in task]
            if kept:
                errors = [task[f"{number.key}_stderr"] for task in kept]
                record[number.key] = math.fsum(task[number.key] for task in kept) / len(kept)
                known = [error for error in errors if error is not None]
                spread = math.sqrt(math.fsum(e * e for e in known)) / len(kept)
                record[f"{number.key}_stderr"] = spread if len(known) == len(kept) else None
        return record

    # ---- tables and files

    def table(self, records: Sequence[Record]) -> str:
        """One line for each task; with several specs, a table for each number, with a column for each spec."""
        specs = list(dict.fromkeys(record["spec"] for record in records))
        if len(specs) == 1:
            lines = _lines(records)
            columns = [Column(number.head, _cell(lines, number, specs[0])) for number in self.numbers]
            title = self.name if specs[0] == AS_IS else f"{self.name}: {specs[0]}"
            return f"{title}\n" + aligned([*_LEFT, *columns], _first(lines))
        measured = [n for n in self.numbers if not n.detail and any(n.key in record for record in records)]
        shown = sorted(measured, key=lambda number: number.key != self.main)
        tables = []
        for number in shown:
            lines = _lines([record for record in records if number.key in record])
            columns = [Column(spec, _cell(lines, number, spec)) for spec in specs]
            tables.append(f"{self.name}: {number.head}\n" + aligned([*_LEFT, *columns], _first(lines)))
        sizes = {subject_of(record): record for record in records}
        ratios = [Column(spec, _ratio(records, spec)) for spec in specs]
        tables.append(f"{self.name}: own/x\n" + aligned([RUN, STEP, *ratios], list(sizes.values())))
        return "\n\n".join(tables)

    def written(self, paths: Sequence[Path]) -> list[str]:
        """The folder, and the number of files in it."""
        if len(paths) == 1:
            return super().written(paths)
        folder = os.path.commonpath([path.parent for path in paths])
        return [f"written: {len(paths)} files in {folder}"]

    def compared_numbers(self) -> tuple[Number, ...]:
        """The main number, under the suite's name."""
        return tuple(replace(n, head=f"{self.name}, {n.head}") for n in self.numbers if n.key == self.main)

    def save(self, subject: Subject, record: Record, out: Path | None = None) -> Path:
        """Write a record as JSON. Returns the file: `SUITE/SETTINGS/TASK.json`, with --posthoc `.../SPEC/TASK.json`.

        SETTINGS are the settings that differ from the defaults, or `default`. The mean over tasks of the uncompressed
        cache is also written to `SUITE/SUITE.json`, which comparisons read, and to the run's TensorBoard events.

        Raises:
            UserError: if it cannot be written.
        """
        suffix = "" if subject.latest else f"-{Path(record['checkpoint']).stem}"
        folder = subject.results(out) / self.name / self._settings_slug(record["settings"])
        if record["spec"] != AS_IS:
            folder /= slug(record["spec"]) + calibration_slug(record.get("calibration"))
        path = folder / f"{slug(record['task'])}{suffix}.json"
        self._write(subject, record, path, path)  # no events
        if record["task"] == ALL and record["spec"] in (AS_IS, UNCOMPRESSED) and self.main in record:
            super().save(subject, record, out)
        return path

    def label(self, record: Record) -> str:
        """The suite, the settings that differ from the defaults, and the spec: `copying:samples=4, xkv:ratio=4`."""
        name = self._settings_slug(record["settings"])
        named = self.name if name == "default" else f"{self.name}:{name}"
        named += "" if record.get("calibration") is None else f", calibrated on {record['calibration']}"
        return named if record["spec"] == AS_IS else f"{named}, {record['spec']}"

    def _settings_slug(self, settings: Record) -> str:
        default = self.settings().model_dump(mode="json")
        changed = {key: value for key, value in settings.items() if value != default[key]}
        texts = [f"{k}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in changed.items()]
        return slug(",".join(texts)) if texts else "default"


def _scaled(mean: Mean, scale: float) -> Mean:
    return Mean(mean.mean * scale, None if mean.error is None else mean.error * scale, mean.questions)


_Lines = Mapping[tuple[Any, str], Mapping[str, Record]]
"""Records by spec, by subject and task."""
_LEFT = (
    RUN,
    STEP,
    Column[Record]("task", lambda record: record["task"], left=True),
    Column[Record]("questions", lambda record: f"{record['questions']:,}"),
)


def _lines(records: Sequence[Record]) -> _Lines:
    """The lines of a table. The mean over tasks is left out if there is only one."""
    lines: dict[tuple[Any, str], dict[str, Record]] = {}
    for record in records:
        if record["task"] != ALL or record["tasks"] > 1:
            lines.setdefault((subject_of(record), record["task"]), {})[record["spec"]] = record
    return lines


def _first(lines: _Lines) -> list[Record]:
    return [next(iter(line.values())) for line in lines.values()]


def _cell(lines: _Lines, number: Score, spec: str) -> Callable[[Record], str]:
    def cell(first: Record) -> str:
        record = lines[subject_of(first), first["task"]].get(spec, {})
        if number.key not in record:
            return "-"
        error = record[f"{number.key}_stderr"]
        spread = "" if error is None else f" ± {number.form(error)}"
        return f"{number.form(record[number.key])}{spread}"

    return cell


def _ratio(records: Sequence[Record], spec: str) -> Callable[[Record], str]:
    def cell(first: Record) -> str:
        of = [r["ratio_to_own"] for r in records if (subject_of(r), r["spec"]) == (subject_of(first), spec)]
        return "-" if not of or of[0] is None else f"{of[0]:.2f}"

    return cell


def slug(text: str) -> str:
    """A text as part of a file's name.

    Characters that names should not have become `-`. If there are others than `:` and `@`, as in a path, a hash of the
    text follows: `a/b` and `a-b` must not get the same file. The same holds for long texts, which are cut.

    >>> slug("xkv:group=4,ratio=2"), slug("vt@1024"), slug("path=a/b")
    ('xkv-group=4,ratio=2', 'vt-1024', 'path=a-b-6e0d4d79')
    """
    name = re.sub(r"[^A-Za-z0-9._=+,-]+", "-", text).strip("-.")
    is_unique = name and len(name) <= _LONGEST_NAME and not re.search(r"[^A-Za-z0-9._=+,:@-]", text)
    return name if is_unique else f"{name[:_LONGEST_NAME]}-{_digest(text)}".strip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
