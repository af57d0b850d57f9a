"""Check records of evaluations that other programs, or people, may have written.

A record is a JSON object of one suite and task, `--posthoc` spec and run. Keys that are missing are never read, so only
what is there is checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.files import shorten
from cllm.trust import read_object

_TEXTS = ("suite", "run", "spec", "task", "set", "design", "checkpoint", "path")
_POSITIVE = ("perplexity", "uncompressed_perplexity", "ratio_to_own", "ratio_to_mha", "bytes_per_token",
             "bf16_bytes_per_token", "own_bf16_bytes_per_token", "mha_bf16_bytes_per_token")  # fmt: skip
_NOT_NEGATIVE = ("questions", "host_bytes_per_token", "bf16_host_bytes_per_token")
_ERROR = "_stderr"


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, other than NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def optional_number(content: Mapping[str, Any], where: Path | str, *keys: str) -> float | None:
    """The number at the nested `keys`; None if it is null or missing. Raises `UserError` for anything else."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is not None and not is_number(value):
        raise _wrong(where, ".".join(keys), value, "a number")
    return value


def check_record(record: Mapping[str, Any], where: Path | str) -> None:
    """Raise `UserError`, naming `where` and the key, for a value of a record that has another type than its key."""
    for key in _TEXTS:
        if not isinstance(record.get(key), str | None):
            raise _wrong(where, key, record[key], "a text")
    if not isinstance(record.get("settings"), dict | None):
        raise _wrong(where, "settings", record["settings"], "an object")
    for key, value in record.items():
        positive = key in _POSITIVE
        if value is None or not (positive or key.endswith(_ERROR) or key in _NOT_NEGATIVE):
            continue
        if not is_number(value) or value < 0 or (positive and not value):
            raise _wrong(where, key, value, "a positive number" if positive else "a number of 0 or more")


def read_record(file: Path) -> dict[str, Any]:
    """The record in a file. Raises `UserError`, naming the file, for one that cannot be read or has a wrong value."""
    record = read_object(file)
    check_record(record, file)
    return record


def _wrong(where: Path | str, key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{where}: {key} is {shorten(repr(value))}; allowed: {allowed}")
