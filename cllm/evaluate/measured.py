"""Measurements of trained models: records from run folders, studies, result files and tables of sweeps.

Sources are a run folder, a study's folder (or its results/), a folder of records such as runs/evaluation/NAME-HASH,
one JSON file (a study's result, one record, `{"rows": [records]}`, or students of an uptraining experiment), and the
CSV table of a sweep. Records of one run from several sources are put together by the run's name.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.left_out import LeftOut
from cllm.evaluate.measured_model import Measured
from cllm.evaluate.points import TRAINED
from cllm.evaluate.records import check_record, optional_number, read_record
from cllm.evaluate.students import has_students, read_students
from cllm.evaluate.suites.suite import Record
from cllm.files import inside, json_files, shorten
from cllm.runs import RunFolder
from cllm.trust import read_object

log = logging.getLogger(__name__)

_KINDS = {dict: "an object", list: "a list", str: "a text"}
_STUDY = ("design", "settings", "evaluations", "summary", "seed")
"""Keys of a study's result."""


def seedless(config: dict[str, Any]) -> str:
    """The settings of a run as text, without those that may differ between seeds: `train.seed`, name and folder."""
    kept = {key: value for key, value in config.items() if key not in ("name", "runs_dir")}
    kept["train"] = {key: value for key, value in (kept.get("train") or {}).items() if key != "seed"}
    return json.dumps(kept, sort_keys=True, default=str)


def read_measured(paths: Sequence[str | Path]) -> tuple[list[Measured], list[str]]:
    """Read the measurements of every model in `paths`, in their order; also returns the paths that cannot be read.

    Raises:
        UserError: if no path can be read, there is no record, or two run folders have one name.
    """
    check_names([path for path in map(Path, paths) if RunFolder(path).config_file.exists()])
    read: list[Measured] = []
    left_out = LeftOut(len(paths))
    for path in map(Path, paths):
        with left_out.unless_usable(path):
            read += list(_read(path))
    left_out.status()
    if not read:
        raise UserError(f"no result among: {' '.join(map(str, paths)) or '(nothing)'}; give runs, studies or files")
    return _told_apart(_joined(read)), left_out.names


def _joined(read: Sequence[Measured]) -> list[Measured]:
    """The measurements of each model from all sources, by its name, and by its folder where several have that name."""
    found: dict[tuple[str, str | None], Measured] = {}
    for one in read:
        folders = dict.fromkeys(other.folder for other in read if other.name == one.name and other.folder is not None)
        if len(folders) > 1 and one.folder is None:
            raise UserError(
                f"two models are called {one.name}, {' and '.join(folders)}, and some records do not say of which they "
                "are; compare them one by one"
            )
        key = one.name, one.folder if len(folders) > 1 else None
        found[key] = found[key].joined(one) if key in found else one
    return list(found.values())


def check_names(runs: Iterable[Path]) -> None:
    """Raise `UserError` if two run folders have one name: records carry the name alone."""
    folders: dict[str, Path] = {}
    for path in map(Path.resolve, runs):
        if folders.setdefault(path.name, path) != path:
            raise UserError(f"two runs are called {path.name}; a comparison needs a name for each")


def are_results(paths: Sequence[str | Path]) -> bool:
    """Whether paths are results other than run folders: a study, a folder of result files, or such files."""
    return any(map(_is_result, map(Path, paths)))


def _is_result(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".json", ".csv")
    if RunFolder(path).config_file.exists():
        return False
    return any(path.glob("*.json")) or any(path.glob("results/*.json"))


def _told_apart(models: list[Measured]) -> list[Measured]:
    """Labels with the facts by which runs of one label differ."""
    labelled = []
    for model in models:
        others = [other for other in models if other.label == model.label]
        differing = [key for key in model.facts if len({str(other.facts.get(key)) for other in others}) > 1]
        text = ", ".join([model.label, *(f"{key} {model.facts[key]}" for key in differing)])
        labelled.append(dataclasses.replace(model, label=text))
    return labelled


def _read(path: Path) -> Iterator[Measured]:
    if path.is_dir():
        run = RunFolder(path)
        if run.config_file.exists() and run.summary_file.exists():
            yield _of_run(run)
            return
        folder = path / "results" if (path / "results").is_dir() else path
        found = [one for file in json_files(folder) if not _is_of_older_checkpoint(file) for one in _of_file(file)]
        if not found:
            raise UserError(f"{path}: no run, and no results in it; allowed: runs, studies and folders of records")
        yield from found
    elif path.suffix == ".csv":
        yield from _of_table(path)
    elif path.is_file():
        found = list(_of_file(path))
        if not found:
            raise UserError(
                f"{path}: has no records of evaluations; allowed: a study's result, students, or records in `rows`"
            )
        yield from found
    else:
        raise UserError(f"{path}: no such file or folder")


def _of_run(run: RunFolder) -> Measured:
    summary, config = run.summary(), run.config().as_yaml_data()
    validated = [row["val/loss"] for row in run.metrics() if row.get("val/loss") is not None]
    return Measured(
        name=run.name,
        label=run.name,
        alike=seedless(config),
        kv_bytes=optional_number(summary, run.summary_file, "kv_bytes_per_token", "resident"),
        kv_vs_mha=optional_number(summary, run.summary_file, "kv_vs_mha", "resident"),
        loss=validated[-1] if validated else None,
        text=_validation_text(config.get("data") or {}),
        records=tuple(records_of_run(run)),
    )


def _validation_text(data: dict[str, Any]) -> str:
    keys = ("path", "validation", "seq_len", "validation_sequences")
    return f"validation of {', '.join(f'{key} {data.get(key)}' for key in keys)}"


def records_of_run(run: RunFolder) -> list[Record]:
    """The records in a run's evaluation/, of its newest checkpoint. Raises `UserError` for one that is not JSON."""
    folder = inside(run.path, run.evaluation_folder.name, written_in=run.path)
    found = (read_record(file) for file in json_files(folder) if not _is_of_older_checkpoint(file))
    return [record for record in found if "refused" not in record]


def _is_of_older_checkpoint(file: Path) -> bool:
    """Whether the name of a record's file ends in that of a checkpoint, as `all-step-00000040.json`."""
    stem, _, step = file.stem.rpartition("-step-")
    return bool(stem) and step.isdecimal()


def _of_file(file: Path) -> Iterator[Measured]:
    """The models of a JSON file; none if it has no records."""
    content = read_object(file)
    if all(key in content for key in _STUDY):
        if not content.get("search"):
            yield _of_study(file, content)
        return
    if has_students(content):
        yield from read_students(file, content)
        return
    rows = content.get("rows", [content])
    records: dict[tuple[str, str | None], list[Record]] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("run"), str) and {"suite", "spec", "loss"} & row.keys():
            check_record(row, file)
            folder = row.get("path") if row.get("kind") == "huggingface" else None
            records.setdefault((row["run"], folder), []).append(row)
    for (name, folder), own in records.items():
        yield Measured(
            name=name,
            label=name,
            alike=json.dumps([name, folder]),
            folder=folder,
            facts={"folder": folder},
            records=tuple(own),
        )


def _of_study(file: Path, content: dict[str, Any]) -> Measured:
    for key, kind in (("summary", dict), ("settings", dict), ("evaluations", list), ("design", str)):
        if not isinstance(content[key], kind):
            raise UserError(f"{file}: {key} is {shorten(repr(content[key]))}; allowed: {_KINDS[kind]}")
    for record in content["evaluations"]:
        if not isinstance(record, dict):
            raise UserError(f"{file}: evaluations has {shorten(repr(record))}; allowed: objects")
        check_record(record, f"{file}: evaluations")
    settings = content["settings"]
    words = [content["design"], *(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())]
    facts = {"tokens": content.get("tokens"), "learning rate": optional_number(content, file, "config", "optim", "lr")}
    facts["code"] = content.get("code")
    same = [content["design"], settings, *facts.values(), content.get("data")]
    return Measured(
        name=file.stem,
        label=", ".join(words),
        alike=json.dumps(same, sort_keys=True, default=str),
        kv_bytes=optional_number(content, file, "summary", "kv_bytes_per_token", "resident"),
        kv_vs_mha=optional_number(content, file, "summary", "kv_vs_mha", "resident"),
        loss=optional_number(content, file, "loss"),
        text=f"validation of {content.get('data')}",
        facts=facts,
        records=tuple(record for record in content["evaluations"] if "refused" not in record),
    )


def _of_table(file: Path) -> Iterator[Measured]:
    """The models of the CSV table that a sweep writes, with a record for each row."""
    wanted = ("run", "design", "spec", "bytes_per_token", "ratio_to_own", "ratio_to_mha", "perplexity")
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not rows or any(key not in rows[0] for key in wanted):
        raise UserError(f"{file}: not the table of a sweep: its first line has no {', '.join(wanted)}")
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        records = tuple(_records_of_rows(file, own))
        yield Measured(name=name, label=name, alike=name, records=records)


def _records_of_rows(file: Path, rows: Iterable[dict[str, str]]) -> Iterator[Record]:
    rows = list(rows)
    try:
        exact = next((float(row["perplexity"]) for row in rows if row["spec"] == TRAINED), None)
        for row in rows:
            size = float(row["bytes_per_token"])
            record = {
                "run": row["run"],
                "design": row["design"],
                "spec": row["spec"],
                "set": file.stem,
                "perplexity": float(row["perplexity"]),
                "uncompressed_perplexity": exact,
                "uncompressed_loss": None,
                "bf16_bytes_per_token": size,
                "own_bf16_bytes_per_token": size * float(row["ratio_to_own"]),
                "mha_bf16_bytes_per_token": size * float(row["ratio_to_mha"]),
            }
            check_record(record, file)
            yield record
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: not the table of a sweep: {error}") from None
