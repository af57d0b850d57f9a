"""KV plans as words on a command line: NAME[:KEY=VALUE,...], such as `gqa:n_kv_heads=4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cllm.config.shipped import CONFIGS
from cllm.errors import UserError, nearest
from cllm.key_values import read_options
from cllm.plan.presets import preset_names
from cllm.yaml_text import parse_word

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
    settings = dict(read_options(text, f"{label}{word}")) if colon else {}
    return PLANS / f"{name}.yaml", settings


def parse_preset(word: str, *, label: str = "--designs ") -> dict[str, Any]:
    """`NAME[:KEY=VALUE,...]` with the name of a preset as settings of `model.kv`; `label` begins messages.

    Raises:
        UserError: for a word of another form, an unknown preset, and a value that is no YAML.
    """
    name, colon, text = word.partition(":")
    if name not in preset_names():
        raise UserError(f"{label}{word}: unknown preset; {nearest(name, preset_names())}")
    kv: dict[str, Any] = {"preset": name}
    for key, value in read_options(text, f"{label}{word}") if colon else ():
        if key == "preset":
            raise UserError(f"{label}{word}: preset={value}: the name of the design is its preset; leave it out")
        kv[key] = parse_word(value, f"{label}{word}: {key}")
    return kv
