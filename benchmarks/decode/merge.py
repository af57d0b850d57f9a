"""Results of several decoding benchmarks as one, for work that was split over several commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UserError


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The results in `files`, in their order. Of rows with the same design and point only the first is used.

    Every row keeps the bound of its own file; `copies` has the copy bandwidths by file.

    Raises:
        UserError: for a file that `--out` did not write, or that has another GPU, torch or settings than the first.
    """
    result: dict[str, Any] = {}
    for file in files:
        try:
            part = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--merge {file}: cannot be read: {error}") from None
        if not isinstance(part, dict) or not {"rows", "capacity", "copy_bytes_per_s", "settings"} <= part.keys():
            raise UserError(f"--merge {file}: not a file that benchmarks.decode --out wrote")
        if not result:
            result = part | {
                "rows": [],
                "capacity": [],
                "generated": [],
                "configs": {},
                "not_measured": [],
                "clocks": [],
                "copies": {},
            }
        for key in ("device", "settings"):
            if part[key] != result[key]:
                raise UserError(
                    f"--merge {file}: {key} is {part[key]}, and {result[key]} in {files[0]}; allowed: equal"
                )
        for key in ("gpus", "torch"):
            one, other = (which["environment"].get(key) for which in (result, part))
            if one != other:
                raise UserError(f"--merge {file}: {key} is {other}, and {one} in {files[0]}; allowed: equal")
        result["copies"][file.name] = part["copy_bytes_per_s"]
        result["configs"] |= part["configs"]
        for key in ("not_measured", "clocks"):
            result[key] += part[key]
        result["stopped"] = result["stopped"] or part["stopped"]
        _add(result["rows"], part["rows"], ("design", "context", "batch"))
        _add(result["capacity"], part["capacity"], ("design", "budget_bytes", "batch_context"))
        _add(result["generated"], part.get("generated", []), ("design", "context", "batch"))
    return result


def _add(rows: list[dict[str, Any]], more: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    known = {tuple(row[key] for key in keys) for row in rows}
    rows += [row for row in more if tuple(row[key] for key in keys) not in known]
