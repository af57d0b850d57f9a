"""The base of evaluation suites."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cllm.errors import UserError
from cllm.files import inside, write_atomic
from cllm.tables import Column, aligned

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

    from cllm.evaluate.perplexity import Settings
    from cllm.evaluate.subjects import Subject
    from cllm.evaluate.texts import TextSet

Record = dict[str, Any]
"""The result of one measurement, as its JSON file holds it."""
REFUSED = "refused.json"
"""The file of specs of --posthoc that a suite went on without, in the suite's folder of results."""


class Option:
    """A command-line option of a suite: `Option("--depth", type=int, metavar="N", help="...")`.

    Args:
        flag: its name, with two hyphens.
        unused: ends the message if the option is given and the suite does not run. Default: `goes with --suite NAME`.
        compresses: whether it also concerns every suite whose caches --posthoc compresses.
        keywords: as for argparse's `add_argument`.
    """

    def __init__(self, flag: str, *, unused: str = "", compresses: bool = False, **keywords: Any):
        self.flag, self.unused, self.compresses, self.keywords = flag, unused, compresses, keywords

    @property
    def dest(self) -> str:
        """The name of its value among the parsed options."""
        return self.keywords.get("dest", self.flag.removeprefix("--").replace("-", "_"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A number that a suite measures, and its names."""

    key: str
    """In the record, thus in JSON."""
    head: str
    """Above its column in tables."""
    form: Callable[[Any], str] = "{:.4f}".format
    """The number in a table."""
    tag: str | None = None
    """In TensorBoard: `eval-SET/TAG`. None: it is not logged there."""
    higher_is_better: bool = False
    """Whether a higher number is a better model, as for an accuracy; a loss is better if it is lower."""

    def column(self) -> Column[Record]:
        """Its column in a table of records."""
        return Column(self.head, lambda record: self.form(record[self.key]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One measurement of a subject: the set, and how to measure."""

    settings: Settings
    """Window, stride, batch and limit; None if not given on the command line."""
    device: torch.device
    options: argparse.Namespace
    """The parsed command line, with the suite's own options."""
    text: TextSet | None = None
    """The set to score; None for suites that take no text."""
    given: BaseModel | None = None
    """The suite's settings, from `--suite NAME:KEY=VALUE`; None for a suite without."""
    refused: dict[str, str] = field(default_factory=dict)
    """Gets the specs of --posthoc that cannot compress the subject's cache, with the reason."""
    skips_refused: bool = False
    """Whether to go on without such specs, even if no other is left."""

    @property
    def set_name(self) -> str | None:
        """The set's name; None for suites that take no text."""
        return None if self.text is None else self.text.name


def perplexity_text(value: float) -> str:
    """A perplexity in a table."""
    return f"{value:.4g}" if value >= 1e5 else f"{value:.3f}"


def subject_of(record: Record) -> tuple[str | None, str, str | None]:
    """The identity of a record's subject. The name of the run is not enough, since several subjects may have it."""
    return record.get("path"), record["run"], record.get("checkpoint")


def add_refused(earlier: Record | None, record: Record) -> Record:
    """The content of two `refused.json` as one, with the specs in order."""
    refused = {**({} if earlier is None else earlier["refused"]), **record["refused"]}
    return {**record, "refused": dict(sorted(refused.items()))}


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


RUN = Column[Record]("run", lambda record: record["run"], left=True)
STEP = Column[Record]("step", lambda record: "-" if record["step"] is None else str(record["step"]))
SET = Column[Record]("set", lambda record: record["set"], left=True)
TOKENS = Column[Record]("tokens", lambda record: f"{record['tokens_scored']:,}")


class Suite(ABC):
    """One way to measure a model. A subclass states its names and implements `run`.

    Its module is imported for every `--help`: import torch inside of `run`.
    """

    name: ClassVar[str]
    """As in `--suite NAME`."""
    help: ClassVar[str]
    """One line for `--help`."""
    numbers: ClassVar[tuple[Number, ...]]
    options: ClassVar[tuple[Option, ...]] = ()
    takes_text: ClassVar[bool] = True
    """Whether it measures on the sets that --data names (default: the subject's own); else once for each subject."""
    compared: ClassVar[bool] = True
    """Whether scripts/compare.py shows its numbers."""
    settings: ClassVar[type[BaseModel] | None] = None
    """The options `KEY=VALUE` of `--suite NAME:KEY=VALUE,...`; None: it takes none."""
    positional: ClassVar[str | None] = None
    """The option whose value may stand without its key, first: `NAME:VALUE,...`."""
    compresses: ClassVar[bool] = False
    """Whether --posthoc applies to it."""
    named_by_number: ClassVar[bool] = False
    """Whether its numbers are known without the suite's name: `--score NAME/NUMBER` takes each, even if `compared` is
    false, and the head of a column is the number's alone."""
    has_any_metric: ClassVar[bool] = False
    """Whether its numbers have any names, as metrics of another library: they are in `metrics` of a record, and
    there is no mean over tasks."""

    # ---- what a suite implements

    @abstractmethod
    def run(self, subject: Subject, job: Job) -> list[Record]:
        """Measure; one record, or several if the options ask for several measurements.

        Raises:
            UserError: if the subject or the text cannot be measured so.
        """

    def is_asked_for(self, options: argparse.Namespace) -> bool:
        """Whether the options select the suite without `--suite`."""
        return False

    def check_options(self, options: argparse.Namespace) -> None:  # noqa: B027
        """Refuse options that do not fit together, before torch is loaded. Raises `UserError`."""

    def check(self, subject: Subject, job: Job) -> None:  # noqa: B027
        """Refuse a subject that lacks what the suite needs, before it is measured. Raises `UserError`."""

    def spec_groups(self, specs: Sequence[str]) -> list[list[str]]:
        """The specs of --posthoc in groups that may be measured apart, each in a process of its own.

        Specs of one group share work, such as the prefill of a context.
        """
        return [list(specs)]

    def tokens(self, options: argparse.Namespace, given: BaseModel | None, data: Path | None) -> float:
        """A rough number of tokens that a measurement reads. Several processes start long measurements first.

        Args:
            options: the parsed command line.
            given: the suite's settings.
            data: the set; None for the subject's own, and for suites that take no text.
        """
        tokens = 1e6 if data is None or not data.exists() else bytes_of(data) / 4
        return min(tokens, options.max_tokens or tokens)

    def makes_unnamed(self, record: Mapping[str, Any]) -> bool:
        """Whether a record that names no suite is of this one."""
        return False

    def columns(self) -> Sequence[Column[Record]]:
        """The columns of the suite's table."""
        return (RUN, STEP, SET, *(number.column() for number in self.numbers))

    def file(self, name: str) -> str:
        """The path of a record's file in the folder of results.

        Args:
            name: of the set, then of the checkpoint if that is not its run's newest.
        """
        return f"{self.name}/{name}.json"

    # ---- what every suite can use

    def record(self, subject: Subject, job: Job, numbers: Record) -> Record:
        """The record of a measurement: the facts that identify it, then `numbers`."""
        from cllm.environment import hardware, versions

        text = job.text
        return {
            "suite": self.name,
            "run": subject.name,
            "path": str(subject.folder.resolve()),
            "kind": subject.kind,
            "checkpoint": subject.checkpoint,
            "step": subject.step,
            "design": subject.design,
            "set": job.set_name or self.name,
            "data": None if text is None else str(text.path),
            "split": None if text is None else text.split,
            **numbers,
            "precision": subject.precision,
            "hardware": hardware(job.device),
            "versions": versions(),
        }

    def table(self, records: Sequence[Record]) -> str:
        """One line for each record."""
        return aligned(self.columns(), records)

    def written(self, paths: Sequence[Path]) -> list[str]:
        """Lines that report the files of records."""
        return [f"written: {path}" for path in paths]

    def compared_numbers(self) -> tuple[Number, ...]:
        """The numbers that scripts/compare.py shows."""
        return self.numbers if self.compared else ()

    def save(self, subject: Subject, record: Record, out: Path | None = None) -> Path:
        """Write a record as JSON, and numbers with a tag as TensorBoard events of the run.

        A checkpoint that is not its run's newest has its name in the file's name: comparisons do not read that file.

        Args:
            out: the folder; then nothing is written in the run, and no events. Default: `subject.results()`.

        Returns:
            The JSON file's path.

        Raises:
            UserError: if it cannot be written.
        """
        name = record["set"] if subject.latest else f"{record['set']}-{Path(record['checkpoint']).stem}"
        path = subject.results(out) / self.file(name)
        self._write(subject, record, path, out)
        return path

    def describe_refused(self, subject: Subject, refused: dict[str, str]) -> list[str]:
        """A line for each spec of --posthoc that the suite went on without."""
        return [f"{subject.name} on {self.name}: {spec} is refused: {reason}" for spec, reason in refused.items()]

    def save_refused(self, subject: Subject, refused: dict[str, str], out: Path | None = None) -> Path:
        """Write the specs of --posthoc that the suite went on without, with the reasons, as `SUITE/refused.json`.

        Raises:
            UserError: if it cannot be written.
        """
        path = subject.results(out) / self.name / REFUSED
        record: Record = {"suite": self.name, "run": subject.name, "design": subject.design, "refused": refused}
        record = add_refused(None, record)
        self._write(subject, record, path, path)  # no events
        return path

    def _write(self, subject: Subject, record: Record, path: Path, out: Path | None) -> None:
        """Write a record to `path`, and its events unless `out` is given."""
        events = None if out is not None or subject.step is None else subject.tensorboard
        if events is not None:
            inside(events.parent, events.name, written_in=events, to_write=True)
        try:
            write_atomic(path, json.dumps(record, indent=2) + "\n")
            if events is not None:
                self._log(events, record)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}") from None

    def scalars(self, record: Record) -> dict[str, float]:
        """The numbers of a record that TensorBoard gets, by the end of their tags: `eval-SET/TAG`."""
        tagged = {number.tag: record.get(number.key) for number in self.numbers if number.tag is not None}
        return {tag: value for tag, value in tagged.items() if value is not None}

    def _log(self, folder: Path, record: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder), filename_suffix=".evaluation") as writer:
            for tag, value in self.scalars(record).items():
                writer.add_scalar(f"eval-{record['set']}/{tag}", value, record["step"])
