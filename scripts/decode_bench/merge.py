"""Rows of several benchmarks of decoding as one, so that runs that shared the work share a table and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UserError


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """What `bench_decode.py --out` wrote to `files`, in their order; a row that comes again is taken once, the first.

    Every row keeps the bound that was measured beside it; `copies` has the bandwidths by file.

    Raises:
        UserError: for a file that is none, or was measured with another GPU, torch or settings than the first.
    """
    found: dict[str, Any] = {}
    for file in files:
        try:
            part = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--merge {file}: cannot be read: {error}") from None
        if not isinstance(part, dict) or not {"rows", "capacity", "copy_bytes_per_s", "settings"} <= part.keys():
            raise UserError(f"--merge {file}: not a file that bench_decode.py --out wrote")
        if not found:
            found = part | {
                "rows": [],
                "capacity": [],
                "generated": [],
                "configs": {},
                "not_measured": [],
                "clocks": [],
                "copies": {},
            }
        for key in ("device", "settings"):
            if part[key] != found[key]:
                raise UserError(f"--merge {file}: {key} is {part[key]}, and {found[key]} in {files[0]}; allowed: equal")
        for key in ("gpus", "torch"):
            one, other = (which["environment"].get(key) for which in (found, part))
            if one != other:
                raise UserError(f"--merge {file}: {key} is {other}, and {one} in {files[0]}; allowed: equal")
        found["copies"][file.name] = part["copy_bytes_per_s"]
        found["configs"] |= part["configs"]
        for key in ("not_measured", "clocks"):
            found[key] += part[key]
        found["stopped"] = found["stopped"] or part["stopped"]
        _add(found["rows"], part["rows"], ("design", "context", "batch"))
        _add(found["capacity"], part["capacity"], ("design", "budget_bytes", "batch_context"))
        _add(found["generated"], part.get("generated", []), ("design", "context", "batch"))
    return found


def _add(rows: list[dict[str, Any]], more: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    have = {tuple(row[key] for key in keys) for row in rows}
    rows += [row for row in more if tuple(row[key] for key in keys) not in have]
