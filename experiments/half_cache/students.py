"""Students: their plans, the starts to try, and their configs for train.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "uptrain"
PLANS: dict[str, dict[str, Any]] = {
    "cla2": {"preset": "cla", "factor": 2, "kv_norm": False},
    "fusedkv": {"preset": "fusedkv"},
    "fusedkv_rich": {"preset": "fusedkv", "keys": "complex", "values": "matrix"},
    "fusedkv_lite": {"preset": "fusedkv_lite"},
    "acrosskv": {"preset": "swiftkv", "n_lower": 12, "group": 6},
    "swiftkv": {"preset": "swiftkv"},
    "kv_tie": {"preset": "kv_tie"},
    "xmla": {"preset": "xmla", "factor": 2},
    "svformer": {"preset": "svformer"},
    "trailing": {"preset": "trailing"},
    "control": {"preset": "gqa"},
}
"""`model.kv` without `n_kv_heads`, for a teacher of 30 layers. swiftkv keeps the whole cache and saves prefill.
`control` is the teacher's own plan: what the training text does without any sharing."""
DEFAULT = ("control", "fusedkv", "fusedkv_rich", "cla2", "acrosskv", "kv_tie", "xmla")
"""Students of the default command."""
STARTS: dict[str, dict[str, Any]] = {
    "copy": {"method": "copy"},
    "fit": {"method": "fit"},
    "fit+outputs": {"method": "fit", "outputs": "all", "ridge": 1e-3},
    "fit+mean": {"method": "fit", "fold": "mean"},
    "fit+joint": {"method": "fit", "fold": "joint"},
    "fit+joint+outputs": {"method": "fit", "fold": "joint", "outputs": "all", "ridge": 1e-3},
    "svd": {"method": "svd"},
}
"""`init` by name. Latents start by svd, keys and values by the others."""
LATENT = ("xmla",)
"""Students that cache latents."""


def starts_of(name: str, starts: Sequence[str]) -> list[str]:
    """Those of `starts` that suit a student: svd alone for latents, and copied weights for the control."""
    if name == "control":
        return ["copy"]
    return ["svd"] if name in LATENT else [start for start in starts if start != "svd"]


def check_names(names: list[str], allowed: dict[str, Any], option: str) -> None:
    """Raise `UserError` for a name that `allowed` lacks."""
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} {name}: allowed: {', '.join(allowed)}")


def student_data(
    name: str,
    start: str,
    *,
    teacher: Path,
    data: Path,
    n_heads: int,
    kv_heads: int,
    out: Path,
    gpu: bool,
    tokens: int,
    overrides: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """A config of train.py as plain data: that of configs/uptrain/smollm2_to_NAME.yaml, or of cla2 with another plan.

    Args:
        overrides: values by section, such as `{"optim": {"lr": 1e-4}}`.
    """
    file = CONFIGS / f"smollm2_to_{name}.yaml"
    file = file if file.exists() else CONFIGS / "smollm2_to_cla2.yaml"
    config: dict[str, Any] = read_yaml(file)
    config |= {"name": name, "runs_dir": str(out / "runs")}
    plan = {"bytes": kv_heads / n_heads / 2} if name in LATENT else {"n_kv_heads": kv_heads}
    config["model"] = {"kv": {**PLANS[name], **plan}}
    kept = config["init"]
    config["init"] = {**STARTS[start], "from": str(teacher)}
    if STARTS[start]["method"] != "copy":
        config["init"]["calibration_sequences"] = kept["calibration_sequences"]
    config["data"] |= {"path": str(data), "num_workers": 1 if gpu else 0}
    config["train"] |= {"accelerator": "gpu" if gpu else "cpu", "devices": 1}
    for section, values in overrides.items():
        config[section] |= {key: value for key, value in values.items() if value is not None}
    if STARTS[start]["method"] == "copy":
        config["init"].pop("calibration_sequences", None)
    steps = max(tokens // (config["train"]["global_batch"] * config["data"]["seq_len"]), 1)
    config["train"] |= {
        "steps": steps,
        "validate_every": max(steps // 8, 1),
        "checkpoint_every": max(steps // 8, 1),
        "keep_checkpoints": 1,
        "log_every": 10,
    }
    config["optim"]["min_lr"] = config["optim"]["lr"] / 10
    config["optim"]["warmup_steps"] = min(config["optim"]["warmup_steps"], max(steps // 10, 1))
    return config
