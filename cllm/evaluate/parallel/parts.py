"""The parts of an evaluation: each has one run, one suite, one set, and specs that are measured together."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cllm.evaluate.result_folders import run_of
from cllm.evaluate.suites.choice import Chosen
from cllm.evaluate.suites.suite import bytes_of
from cllm.hub.kind import identify_model
from cllm.runs import RunFolder
from cllm.version import EVALUATION, code_version, data_hash

NOT_MEASURED_BY = ("run", "out", "suite", "suite_fault", "posthoc", "device", "devices", "per_device", "processes")
"""Options that change no number of a part, or that its other fields stand for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a command."""

    run: str
    """As in `--run`."""
    choice: int
    """The number of the suite among those of the command."""
    set: int | None
    """The number of the set; None for a suite that takes no text."""
    specs: tuple[str, ...]
    """Specs of --posthoc, measured together; empty: none were given."""
    place_label: str
    """Run, suite and set, for people."""
    cost: float
    """A rough measure of its time; parts that take long start first."""
    key: str
    """A hash of everything that decides the result. A part that has ended is not measured again."""

    @property
    def label(self) -> str:
        """For people."""
        return " ".join([self.place_label, *(f"--posthoc {spec}" for spec in self.specs)])

    @property
    def place(self) -> tuple[str, int, int | None]:
        """Run, suite and set; parts of one place differ in their specs."""
        return self.run, self.choice, self.set

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def parts_of(run: str, chosen: Sequence[Chosen], options: argparse.Namespace, device: str) -> list[Part]:
    """The parts of one run of a command, in the order in which one process measures them.

    Raises:
        UserError: if the run does not exist, is no model, or its config cannot be read.
    """
    parts = []
    size, model = bytes_of(weights := _weights(run)), _stamp(weights, "*")
    sets = _sets(run, options)
    specs: list[str] = options.posthoc
    rest = {key: value for key, value in vars(options).items() if key not in NOT_MEASURED_BY}
    for n, (suite, given) in enumerate(chosen):
        settings = None if given is None else given.model_dump(mode="json")
        for set_number, path in enumerate(sets) if suite.takes_text else [(None, None)]:
            for group in suite.spec_groups(specs) if specs else [[]]:
                identity = [str(Path(run).resolve()), model, suite.name, settings, set_number, group, rest, device]
                files = [*_files(settings), *_files(rest), *([] if path is None else _files(str(path)))]
                parts.append(
                    Part(
                        run=run,
                        choice=n,
                        set=set_number,
                        specs=tuple(group),
                        place_label=_label(run, options, n, suite.name, path if len(sets) > 1 else None),
                        cost=suite.tokens(options, given, path) * size * max(len(group), 1),
                        key=data_hash([code_version(EVALUATION), repr(identity), *map(_stamp, files)]),
                    )
                )
    return parts


def _label(run: str, options: argparse.Namespace, n: int, suite: str, data: Path | None) -> str:
    label = f"--run {run} --suite {options.suite[n] if options.suite else suite}"
    return label if data is None else f"{label} --data {data}"


def _sets(run: str, options: argparse.Namespace) -> list[Path]:
    """The sets of the command, or those of the run. A Hugging Face folder has none; measuring it is an error then."""
    if options.data:
        return [Path(path) for path in options.data]
    if not identify_model(run).is_run:
        return [Path(run) / "no data"]
    return [Path(path) for path in RunFolder.of(run).config().data.validation_sets.values()]


def _weights(run: str) -> Path:
    """The checkpoint of a run, or a Hugging Face folder."""
    path = Path(run)
    if not identify_model(path).is_run or path.suffix == ".ckpt" or (folder := run_of(path)) is None:
        return path
    return RunFolder(folder).newest_checkpoint() or path


def _files(value: Any) -> Iterator[Path]:
    """The paths that options name, of files and folders that exist."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _files(one)
    elif isinstance(value, str | Path) and str(value) and len(str(value)) < 4096:
        path = Path(value).expanduser()
        try:
            if path.exists():
                yield path
        except (OSError, ValueError):
            return


def _stamp(path: Path, inside: str = "**/*") -> list[Any]:
    """Names, sizes and times of change of a file, or of the files in a folder that match `inside`."""
    files = [path] if path.is_file() else sorted(file for file in path.glob(inside) if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
