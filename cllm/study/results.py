"""The result of a point: one JSON file with its config, versions, hardware, learning curve and evaluations.

The report reads nothing else. Names of data folders are kept without the folders above them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cllm.data.manifest import text_label
from cllm.errors import UserError
from cllm.files import shorten, write_atomic
from cllm.runs import DataDigests, RunFolder
from cllm.runs.speed import median_speed
from cllm.study.matching import CacheMatch
from cllm.study.points import Point, Variant
from cllm.trust import read_object
from cllm.version import config_hash, data_hash
from cllm.yaml_text import read_yaml

log = logging.getLogger(__name__)

FORMAT = 1
COMMIT = "CLLM_COMMIT"
"""The environment variable with the commit of a copy of the code that is no git repository."""
_TRAINING_ROWS = 60
"""Most points of the training loss that a result keeps."""
_DIGITS = 7
"""Significant digits of numbers in curves."""


_WHOLE, _NUMBER, _TEXT, _NOTHING = (int,), (int, float), (str,), (type(None),)
_KEYS: dict[str, tuple[type, ...]] = {
    "design": _TEXT,
    "settings": (dict,),
    "tokens": _WHOLE,
    "seed": _WHOLE,
    "rate": _NUMBER + _NOTHING,
    "search": (bool,),
    "declared": _TEXT,
    "code": _TEXT,
    "commit": _TEXT + _NOTHING,
    "data": _TEXT + _NOTHING,
    "loss": _NUMBER + _NOTHING,
    "trained_tokens": _WHOLE,
    "tokens_per_s": _NUMBER + _NOTHING,
    "finished": _TEXT,
    "match": (dict, *_NOTHING),
    "summary": (dict,),
    "summary.parameters": _WHOLE,
    "summary.kv_vs_mha": (dict,),
    "summary.kv_vs_mha.resident": _NUMBER,
    "summary.kv_vs_mha.read": _NUMBER,
    "summary.kv_bytes_per_token": (dict,),
    "summary.kv_bytes_per_token.resident": _NUMBER,
    "validation": (dict,),
    "validation.tokens": (list,),
    "evaluated": _TEXT + _NOTHING,
    "evaluations": (list,),
    "environment": (dict,),
    "config": (dict,),
    "config.optim": (dict,),
    "config.optim.lr": _NUMBER,
}
"""The keys that a report needs, and the types of their values."""
_NAMES: dict[type, str] = {
    str: "text",
    dict: "a mapping",
    list: "a list",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}

SUITE = "suite/"
"""Begins the tags of `evaluate_suites`: `suite/LABEL/NUMBER`."""


@dataclass(frozen=True, slots=True)
class Result:
    """A result file."""

    file: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def variant(self) -> Variant:
        return Variant(self.content["design"], tuple(self.content["settings"].items()))

    @property
    def rate(self) -> float:
        """The peak learning rate of the run."""
        return self.content["config"]["optim"]["lr"]

    @property
    def loss(self) -> float | None:
        """The last validation loss in training, nats per token; None if it is not finite."""
        return self.content["loss"]

    @property
    def code(self) -> str:
        return self.content["code"]

    @property
    def evaluated(self) -> str | None:
        """Hash of the evaluations and their code; None: not evaluated."""
        return self.content["evaluated"]

    @property
    def tokens_per_s(self) -> float | None:
        return self.content["tokens_per_s"]

    @property
    def suites(self) -> dict[str, list[tuple[int, float | None]]]:
        """(tokens, value) of each tag of `evaluate_suites`, such as `suite/copying/accuracy`."""
        return self.content.get("suites", {})  # early results have none

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """(tokens, value) of a tag of validation or of a suite in training, those that were not finite left out."""
        if tag in self.suites:
            points: Iterable[tuple[int, float | None]] = self.suites[tag]
        else:
            validation = self.content["validation"]
            points = zip(validation["tokens"], validation.get(tag, []), strict=False)
        return [(t, v) for t, v in points if v is not None and math.isfinite(v)]


def evaluated_as(commands: Sequence[Sequence[str]], code: str) -> str:
    """The hash that `Result.evaluated` has after these evaluations."""
    words = [[Path(word).name if "/" in word else word for word in command] for command in commands]
    return data_hash([code, words])


def read_result(file: Path) -> Result:
    """Read a result file.

    Raises:
        UserError: for a file that is not one, that lacks a key, or whose name is that of another point.
    """
    content = read_object(file)
    if content.get("format") != FORMAT:
        raise UserError(f"{file}: format is {content.get('format')!r}; allowed: {FORMAT}, a result of a study")
    for key, types in _KEYS.items():
        value: Any = content
        for part in key.split("."):
            if part not in value:
                raise UserError(f"{file}: not a result of a study: {key} is missing")
            value = value[part]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{file}: {key} is {shorten(repr(value), 80)}; allowed: {_allowed(types)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{file}: {key} is {value}; allowed: finite numbers")
    if (name := point_name(content)) != file.stem:
        raise UserError(f"{file}: has the result of the point {name}; allowed: a file of that name, {name}.json")
    return Result(file, content)


def _allowed(types: Sequence[type]) -> str:
    """`a number or null`."""
    return " or ".join(_NAMES[kind] for kind in types if not (kind is int and float in types))


def point_name(content: dict[str, Any]) -> str:
    """The name of the point that a result declares."""
    variant = Variant(content["design"], tuple(content["settings"].items()))
    point = Point(variant, content["tokens"], content["seed"], content["rate"], content["declared"], content["code"])
    return point.name


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, by name. Files that cannot be read are logged and left out."""
    return read_folder(folder)[0]


def read_folder(folder: Path) -> tuple[list[Result], list[str]]:
    """`read_results`, and the files that were left out: their names in the folder, each with the reason."""
    found, left_out = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(read_result(file))
        except UserError as error:
            log.warning("left out: %s", error)
            left_out.append(str(error).replace(f"{folder}/", ""))
    return found, left_out


def result_of(
    point: Point, run: RunFolder, match: CacheMatch | None, seconds: float | None, *, diverged: bool = False
) -> dict[str, Any]:
    """The result of a finished run.

    Args:
        point: the point.
        run: its run.
        match: the change of its cache.
        seconds: from the start of the process that finished it to its end.
        diverged: the run ended early because its gradients were not finite. Its loss is then null.

    Raises:
        UserError: for a run without a validation after its last step.
    """
    config, rows = read_yaml(run.config_file), list(run.metrics())
    validated = [row for row in rows if "val/loss" in row]
    last = run.early_stop() or config["train"]["steps"]
    if not diverged and (not validated or validated[-1]["step"] != last):
        raise UserError(f"{run.path}: has no validation after its last step, {last}")
    tags = sorted({tag for row in validated for tag in row if tag.startswith("val")})
    probed = sorted({tag for row in rows for tag in row if tag.startswith(SUITE) and not tag.endswith("/seconds")})
    environment = {name: text for name, text in run.environment().items() if name != "command"}
    shortened = _without_folders(config)
    digests = run.data_digests()
    speed = median_speed(row.get("throughput/tokens_per_s") for row in rows)
    return {
        "format": FORMAT,
        "design": point.variant.design,
        "settings": dict(point.variant.settings),
        "tokens": point.tokens,
        "seed": point.seed,
        "rate": point.rate,
        "search": point.search,
        "declared": point.declared,
        "code": point.code,
        "commit": environment.pop("commit", None) or os.environ.get(COMMIT),
        "config_sha256": config_hash(config),
        "data": None if digests is None else digests.train,
        "text": None if digests is None else _scored(digests),
        "loss": None if diverged else validated[-1]["val/loss"],
        "trained_tokens": rows[-1]["tokens"] if rows else 0,
        "tokens_per_s": None if speed is None else round(speed, 1),
        "seconds": None if seconds is None else round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "match": None if match is None else {"wanted": str(match.wanted), "reached": match.reached, "kv": match.kv},
        "summary": {key: value for key, value in run.summary().items() if key != "name"},
        "validation": {
            "tokens": [row["tokens"] for row in validated],
            **{tag: [_rounded(row.get(tag)) for row in validated] for tag in tags},
        },
        "suites": {tag: [(row["tokens"], _rounded(row[tag])) for row in rows if tag in row] for tag in probed},
        "training": _thinned([(row["tokens"], row["train/loss"]) for row in rows if row.get("train/loss") is not None]),
        "evaluated": None,
        "evaluations": [],
        "environment": environment,
        "config": shortened,
    }


def _scored(digests: DataDigests) -> str | None:
    """The label of the main validation set, whose loss is the result's."""
    return next((text_label("validation", digest) for digest in digests.validation.values()), None)


def write_result(file: Path, content: dict[str, Any]) -> None:
    """Write a result atomically."""
    write_atomic(file, json.dumps(content, indent=1) + "\n")


def with_evaluations(content: dict[str, Any], records: list[dict[str, Any]], evaluated: str | None) -> dict[str, Any]:
    """A result with the records of its evaluations, each once; `evaluated` is None while some have not ended.

    Of paths only the last part is kept, so that results of two machines have the same labels.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        record = {key: value for key, value in record.items() if key not in ("versions", "path", "errors")}
        record["data"] = Path(record["data"]).name if record.get("data") else None
        if isinstance(settings := record.get("settings"), dict):
            record["settings"] = {key: _last_part(value) for key, value in settings.items()}
        if record not in kept:
            kept.append(record)
    return {**content, "evaluated": evaluated, "evaluations": kept}


def _last_part(value: Any) -> Any:
    """A path without its folder; any other value as it is."""
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A config without folders of the machine."""
    kept = {key: value for key, value in config.items() if key not in ("runs_dir", "name")}
    data = dict(config["data"])
    data["path"] = Path(data["path"]).name if data.get("path") else None
    data["validation"] = {name: Path(folder).name for name, folder in (data.get("validation") or {}).items()}
    data["mix"] = {Path(folder).name: weight for folder, weight in (data.get("mix") or {}).items()}
    return {**kept, "data": data}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _thinned(points: list[tuple[int, float]]) -> dict[str, list[float]]:
    """At most `_TRAINING_ROWS` points at equal distances, the last one among them."""
    every = -(-len(points) // _TRAINING_ROWS) or 1
    kept = points[::-1][::every][::-1]
    return {"tokens": [t for t, _ in kept], "loss": [float(f"{v:.{_DIGITS}g}") for _, v in kept]}


def config_text(content: dict[str, Any]) -> str:
    """The config of a result as YAML."""
    return yaml.safe_dump(content["config"], sort_keys=False)
