"""KV plans as words on a command line: NAME[:KEY=VALUE,...], such as `gqa:n_kv_heads=4`."""

from __future__ import annotations

import re
from pathlib import Path

from cllm.config.shipped import CONFIGS
from cllm.errors import UserError, nearest

PLANS = CONFIGS / "kv"


def plan_names() -> list[str]:
    """The names of plans: those of the files in configs/kv/."""
    return sorted(file.stem for file in PLANS.glob("*.yaml"))


def parse_plan(word: str, *, label: str = "--designs ") -> tuple[Path, dict[str, str]]:
    """`NAME[:KEY=VALUE,...]` as a file of configs/kv/ and settings of `model.kv`; `label` begins messages.

    Raises:
        UserError: for a word of another form, or a name without a file in configs/kv/.
    """
    name, colon, text = word.partition(":")
    known = plan_names()
    if name not in known:
        raise UserError(f"{label}{word}: configs/kv/ has no {name}.yaml; {nearest(name, known)}")
    settings: dict[str, str] = {}
    for part in re.split(r",(?![^\[]*\])", text) if colon else []:  # a comma inside brackets belongs to a list
        key, equals, value = part.partition("=")
        if not key or not equals:
            raise UserError(f"{label}{word}: {part!r} is not of the form KEY=VALUE")
        settings[key] = value
    return PLANS / f"{name}.yaml", settings
