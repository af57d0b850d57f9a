"""Recognise a design that was measured in a model of another size.

Two models have the same design if their plans are equal once both have `REFERENCE_LAYERS` layers and one KV head:

- Settings at their defaults stay at their defaults, as half of all layers does.
- A setting that counts layers (`OfDepth.COUNT`) is a share of them: `n_lower: 8` of 24 layers is `n_lower: 4` of 12,
  and not `n_lower: 8` of 12. If the share is no whole number of `REFERENCE_LAYERS`, a multiple of that depth takes it.
- Other numbers stay as they are: a period such as `factor`, tokens of a window, single layers such as `warmup`.

Some plans are equal only to plans of the same depth: those spelled out in `layers`, those whose settings name layers
(`OfDepth.NUMBERS`), and those in which the share of slots, slots / layers, would differ by a layer or more. With
`warmup: 2` lckv has 3 slots whatever its depth, so its loss with 12 layers says nothing about 24.

Plans with latents, or with different numbers of KV heads, are equal only to plans with the same heads: no rule says
how a latent grows with the model.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.plan import KVPlan
from cllm.plan.presets import PRESETS, preset_names
from cllm.plan.presets.base import OfDepth

REFERENCE_LAYERS = 48
"""Depth of the plans that are compared: longer than periods are."""
_DEEPEST = 480
"""Most layers of a plan that is compared; the time that a plan takes grows with their square."""
_HEAD_DIM = 64
_HEADS = "n_kv_heads"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The size of a model, as far as it is known. None: not known."""

    n_layers: int | None = None
    n_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> Size:
        """That of a model."""
        shape = config.shape
        return cls(n_layers=shape.n_layers, n_heads=shape.n_heads, head_dim=shape.head_dim)


def query_heads_per_kv_head(config: ModelConfig) -> int | None:
    """Query heads for each KV head; None if owners have no KV heads (latents) or different numbers of them."""
    plan = config.plan()
    counts = {getattr(plan.owned(slot), _HEADS, None) for slot in plan.slots}
    if len(counts) != 1 or (count := counts.pop()) is None:
        return None
    return config.n_heads // count


def plan_at(kv: dict[str, Any], *, layers: int, heads: int, head_dim: int = _HEAD_DIM) -> KVPlan | None:
    """The plan of the settings `kv` of `model.kv` in a model of this shape; None if they do not fit it."""
    shape = {"d_model": heads * head_dim, "head_dim": head_dim, "n_layers": layers, "n_heads": heads}
    try:
        return ModelConfig.model_validate({**shape, "kv": kv}).plan()
    except (ValidationError, UserError):
        return None


def plan_key(kv: dict[str, Any], ratio: int | None, size: Size) -> str | None:
    """A text that is equal for equal designs (see above), whatever their depth and number of heads.

    Args:
        kv: settings of `model.kv`; with a ratio, the number of KV heads is ignored.
        ratio: as `query_heads_per_kv_head`.
        size: of the model that has the plan.

    Returns:
        None for settings that fit neither the reference depth nor, if it is known, the model's own.

    Raises:
        UserError: if the plan depends on a size that is not known.
    """
    return _key(json.dumps(kv, sort_keys=True), ratio, size)


@functools.lru_cache(maxsize=4096)
def _key(text: str, ratio: int | None, size: Size) -> str | None:
    kv: dict[str, Any] = json.loads(text)
    if ratio is None or "layers" in kv:
        heads, head_dim = _known(size.n_heads, "n_heads"), _known(size.head_dim, "head_dim")
        width = f"{heads} heads of {head_dim}"
    else:
        heads, head_dim, width = ratio, _HEAD_DIM, str(ratio)
        kv = {**kv, _HEADS: 1}

    def plan(settings: dict[str, Any], layers: int) -> KVPlan | None:
        return plan_at(settings, layers=layers, heads=heads, head_dim=head_dim)

    own = None if size.n_layers is None else plan(kv, size.n_layers)
    scaled = _at_reference(kv, size)
    found = None if scaled is None else plan(*scaled)
    if own is not None and (found is None or not _have_equal_slots(own, found)):
        found = own
    return None if found is None else f"{width}: {found!r}"


def _at_reference(kv: dict[str, Any], size: Size) -> tuple[dict[str, Any], int] | None:
    """The settings at the reference depth, or a multiple of it, and that depth; None if they have a meaning at the
    model's own depth only."""
    if "layers" in kv:
        _known(size.n_layers, "n_layers")
        return None
    preset = PRESETS.get(kv.get("preset", ""))
    marked = preset.of_depth() if preset is not None else {}
    given = {name: kind for name, kind in marked.items() if kv.get(name) is not None}
    if not given:
        return kv, REFERENCE_LAYERS
    n_layers = _known(size.n_layers, "n_layers", because=f", which {next(iter(given))} depends on")
    if OfDepth.NUMBERS in given.values():
        return None
    shares = {name: Fraction(kv[name], n_layers) for name in given}
    depth = math.lcm(REFERENCE_LAYERS, *(share.denominator for share in shares.values()))
    if depth > _DEEPEST:
        return None
    return {**kv, **{name: int(share * depth) for name, share in shares.items()}}, depth


def _known(value: int | None, name: str, *, because: str = "") -> int:
    if value is None:
        raise UserError(f"{name} is missing{because}; give that of the measured model")
    return value


def _have_equal_slots(one: KVPlan, other: KVPlan) -> bool:
    """Whether slots / layers differ by less than a layer."""
    shares = [Fraction(len(plan.slots), len(plan)) for plan in (one, other)]
    return abs(shares[0] - shares[1]) < Fraction(1, min(len(one), len(other)))


def own_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of `model.kv` that make a design: without defaults, and without the number of KV heads if all owners
    have the same.

    A setting is a default if the plan is the same without it. So `n_lower: 6` of 12 layers, where the preset takes
    half of the layers, is half of them at any other depth too. A plan that is spelled out in `layers` is that of a
    preset with default settings if the two are the same.
    """
    ratio = query_heads_per_kv_head(config)
    kept = config.kv.model_dump(mode="json")
    if "layers" in kept:
        heads = {} if ratio is None else {_HEADS: config.n_heads // ratio}
        presets = ({"preset": name, **heads} for name in preset_names())
        kept = next((kv for kv in presets if _is_plan_of(config, kv)), kept)
    else:
        for name in [name for name in kept if name != "preset"]:
            fewer = {key: value for key, value in kept.items() if key != name}
            kept = fewer if _is_plan_of(config, fewer) else kept
    return {key: value for key, value in kept.items() if key != _HEADS or ratio is None}


def _is_plan_of(config: ModelConfig, kv: dict[str, Any]) -> bool:
    """Whether the settings `kv` of `model.kv` make the plan that the model has."""
    try:
        return ModelConfig.model_validate({**config.model_dump(mode="json"), "kv": kv}).plan() == config.plan()
    except (ValidationError, UserError):
        return False


def config_key(config: ModelConfig) -> str | None:
    """`plan_key` of a model."""
    return plan_key(own_settings(config), query_heads_per_kv_head(config), Size.of(config))


def mha_key() -> str:
    """`plan_key` of mha with a KV head for every query head, against which losses of designs are changes."""
    key = plan_key({"preset": "mha"}, 1, Size())
    assert key is not None
    return key
