"""Recognise a plan that was measured at another size: by its plan at a reference depth and one KV head."""

from __future__ import annotations

import functools
import json
from typing import Any

from pydantic import ValidationError

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.plan import KVPlan

REFERENCE_LAYERS = 24
"""Depth of the plans that are compared. Models of any depth have the key of the same design at this depth."""
_HEAD_DIM = 64


def query_heads_per_kv_head(config: ModelConfig) -> int | None:
    """Query heads for each KV head; None if owners have no KV heads (latents) or different numbers of them."""
    plan = config.plan()
    counts = {getattr(plan.owned(slot), "n_kv_heads", None) for slot in plan.slots}
    if len(counts) != 1 or (count := counts.pop()) is None:
        return None
    return config.n_heads // count


def plan_at(kv: dict[str, Any], *, heads: int, n_kv_heads: int | None) -> KVPlan | None:
    """The plan of the settings `kv` of `model.kv` at the reference depth; None if they do not fit it."""
    settings = {**kv, "n_kv_heads": n_kv_heads} if n_kv_heads is not None else kv
    shape = {"d_model": heads * _HEAD_DIM, "head_dim": _HEAD_DIM, "n_layers": REFERENCE_LAYERS, "n_heads": heads}
    try:
        return ModelConfig.model_validate({**shape, "kv": settings}).plan()
    except (ValidationError, UserError):
        return None


@functools.lru_cache(maxsize=4096)
def _key(kv: str, ratio: int | None) -> str | None:
    plan = plan_at(json.loads(kv), heads=ratio or 16, n_kv_heads=None if ratio is None else 1)
    return None if plan is None else f"{ratio}: {plan!r}"


def plan_key(kv: dict[str, Any], ratio: int | None) -> str | None:
    """A text that is equal for equal designs, whatever their depth and number of heads.

    Args:
        kv: settings of `model.kv`; the number of KV heads is ignored.
        ratio: as `query_heads_per_kv_head`.

    Returns:
        None for a plan that has no equivalent at the reference depth, such as one spelled out for other layers.
    """
    rest = {name: value for name, value in kv.items() if name != "n_kv_heads"}
    return _key(json.dumps(rest, sort_keys=True), ratio)


def own_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of `model.kv` that make a design: without the number of KV heads and without defaults.

    A setting is a default if the plan is the same without it. So `n_lower: 6` of 12 layers, where the preset takes
    half of the layers, is half of them at any other depth too.
    """
    plan = repr(config.plan())
    kept = config.kv.model_dump(mode="json")
    for name in [name for name in kept if name != "preset"]:
        fewer = {key: value for key, value in kept.items() if key != name}
        try:
            same = repr(ModelConfig.model_validate({**config.model_dump(mode="json"), "kv": fewer}).plan()) == plan
        except (ValidationError, UserError):
            continue
        kept = fewer if same else kept
    return {key: value for key, value in kept.items() if key != "n_kv_heads"}


def config_key(config: ModelConfig) -> str | None:
    """`plan_key` of a model."""
    return plan_key(own_settings(config), query_heads_per_kv_head(config))
