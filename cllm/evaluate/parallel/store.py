"""The files of parts, until a command is complete.

    FOLDER/KEY/part.json     what to measure
               log.txt       the output of its process
               results/      what the part writes, with the paths that the files have in the folder of results
               report.json   written last: records, the folder of results, what was refused

A part whose report is there has ended and is not measured again. When all parts have ended, the folder is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.parallel.parts import Part
from cllm.evaluate.result_folders import RUNS
from cllm.evaluate.suites.suite import REFUSED, Record, add_refused
from cllm.files import check_replaceable, is_being_deleted, mark_new, remove, write_atomic
from cllm.trust import read_object

KIND = "evaluation parts"
"""The mark of the folder, see `cllm/files.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The records and files of a part that has ended."""

    results: str
    """The folder of results."""
    records: list[Record]
    files: list[str]
    """The file of each record, and of refused specs, relative to the folder of results."""
    messages: list[str]
    """Warnings, and what was refused."""
    refused: dict[str, str] = field(default_factory=dict)
    """Specs of --posthoc that cannot compress the run's caches, with the reason."""


def parts_folder(runs: Sequence[str], out: Path | None) -> Path:
    """The folder of a command's parts: beside `--out`, else in runs/evaluation/ of the working directory."""
    if out is not None:
        out = out.absolute()
        return out.with_name(f".{out.name}.parts")
    names = sorted(str(Path(run).resolve()) for run in runs)
    return RUNS / "evaluation" / f".parts-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]}"


class Store:
    """The files of parts in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self) -> None:
        """Make the folder. Raises `UserError` if it cannot be written or is somebody else's."""
        check_replaceable(self.folder, KIND)
        try:
            if is_being_deleted(self.folder):
                remove(self.folder, KIND)
            mark_new(self.folder, KIND)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error}") from None

    def close(self) -> None:
        """Delete the folder."""
        remove(self.folder, KIND)

    def of(self, part: Part) -> Path:
        """The folder of a part."""
        return self.folder / part.key

    def log(self, part: Part) -> Path:
        """The output of a part's process."""
        return self.of(part) / "log.txt"

    def begin(self, part: Part, words: Sequence[str]) -> Path:
        """Write what a process has to measure, and delete what an earlier one has left. Returns the file."""
        shutil.rmtree(self.of(part), ignore_errors=True)
        file = self.of(part) / "part.json"
        write_atomic(file, json.dumps({"words": list(words), "part": part.as_json()}))
        return file

    def report(self, part: Part) -> Report | None:
        """The report of a part; None if the part has not ended."""
        file = self.of(part) / "report.json"
        return Report(**read_object(file)) if file.exists() else None

    def publish(self, part: Part, report: Report) -> list[Path]:
        """Write the files of a part into the folder of results, and return those of its records.

        Raises:
            UserError: if one cannot be written.
        """
        for source in self._files(part):
            _write(Path(report.results) / source.relative_to(results_of(self.of(part))), source.read_bytes())
        return [Path(report.results) / file for file in report.files]

    def settle(self, ended: Sequence[tuple[Part, Report]]) -> None:
        """Give files that several parts have written the content that one process leaves there.

        That is the content of the last part in the order of the command; reports of refused specs are put together.

        Args:
            ended: the parts in the order of the command.
        """
        sources: dict[Path, list[Path]] = {}
        for part, report in ended:
            for source in self._files(part):
                target = Path(report.results) / source.relative_to(results_of(self.of(part)))
                sources.setdefault(target, []).append(source)
        for target, several in sources.items():
            if len(several) > 1:
                content: Any = several[-1].read_bytes()
                if target.name == REFUSED:
                    content = None
                    for source in several:
                        content = add_refused(content, read_object(source))
                    content = json.dumps(content, indent=2) + "\n"
                _write(target, content)

    def _files(self, part: Part) -> list[Path]:
        return sorted(file for file in results_of(self.of(part)).rglob("*") if file.is_file())


def results_of(folder: Path) -> Path:
    """The results in the folder of a part."""
    return folder / "results"


def write_report(folder: Path, report: Report) -> None:
    """Write the report of a part into its folder. The part has ended then."""
    write_atomic(folder / "report.json", json.dumps(asdict(report)) + "\n")


def _write(path: Path, content: str | bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
