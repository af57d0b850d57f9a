"""Settings with which a student has begun, compared with those of the command that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.errors import UserError

_FREE = {
    ("", "name"), ("", "runs_dir"), ("data", "num_workers"), ("train", "accelerator"), ("train", "devices"),
    ("train", "cuda_graph"), ("train", "validate_every"), ("train", "checkpoint_every"),
}  # fmt: skip
"""Settings that may differ when a run goes on, by section and key; those of `init` may too, apart from `from`."""

_DERIVED = {("optim", "min_lr"), ("optim", "warmup_steps"), ("uptrain", "curriculum_steps")}
"""Settings that follow from others, which an error names first."""


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], file: Path, *, start: bool = False) -> None:
    """Raise `UserError` if the config `old`, in `file`, trains a student in another way than `new`.

    With `start` only settings that matter to the loss before training are compared, all those of `init` included.
    """

    def values(config: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
        sections = {key: value if isinstance(value, dict) else {} for key, value in config.items()}
        pairs = {("", key): value for key, value in config.items() if not isinstance(value, dict)}
        pairs |= {(section, key): value for section, of in sections.items() for key, value in of.items()}
        if start:
            pairs = {k: v for k, v in pairs.items() if k[0] in ("model", "data", "init")}
        return {k: v for k, v in pairs.items() if k not in _FREE and (start or k[0] != "init" or k[1] == "from")}

    before, after = values(old), values(new)
    for key in sorted(before.keys() | after.keys(), key=lambda key: (key in _DERIVED, key)):
        a, b = before.get(key), after.get(key)
        if key in (("init", "from"), ("data", "path")):  # a folder may have moved
            a, b = (Path(x).resolve() for x in (a or "", b or ""))
            a = a if a.exists() else b
        if a != b:
            raise UserError(
                f"{file}: has {'.'.join(filter(None, key))} {a}, and this command {b}; allowed: the options that the "
                "run began with, or another --out"
            )
