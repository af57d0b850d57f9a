"""The plan spelled out in YAML, a few entries that together name every layer once.

model:
  n_layers: 24
  kv:
    layers:
      - {layers: 0-11,  own: {}}
      - {layers: 12-23, keys: {fuse: [0, 11]}, values: {fuse: [0, 11]}}
"""

from __future__ import annotations

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.plan import (
    Fuse,
    FusionInit,
    Granularity,
    KVPlan,
    Latent,
    LayerPlan,
    Own,
    Read,
    Retention,
    Share,
    layer_range,
    ranges,
)
from cllm.plan.shape import IterationsConfig, Shape
from cllm.section import MAX_HEADS, MAX_TOKENS, MAX_WIDTH, Section


class OwnConfig(Section):
    """The layer projects its own keys and values."""

    n_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """KV heads; null: as many as query heads."""
    kv_norm: bool = False
    """An RMSNorm of their own for K and V."""


class LatentConfig(Section):
    """The layer owns a low-rank latent (MLA)."""

    kv_lora_rank: int = Field(ge=1, le=MAX_WIDTH)
    """Width of the cached latent."""
    q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Rank of the query projection; null: full rank."""
    qk_nope_head_dim: int = Field(ge=1, le=MAX_WIDTH)
    """Channels of a query head without position."""
    qk_rope_head_dim: int = Field(ge=2, le=MAX_WIDTH, multiple_of=2)
    """Channels of the decoupled RoPE key."""
    v_head_dim: int = Field(ge=1, le=MAX_WIDTH)
    """Channels of a value head."""


class RetentionConfig(Section):
    """The layer keeps a recurrent state (gated retention)."""


class ReadConfig(Section):
    """Where keys or values come from: `{share: 11}` or `{fuse: [0, 11]}`."""

    share: int | None = None
    """The owner whose slot is read as it is."""
    fuse: list[int] | None = None
    """The owners whose slots are summed with learned weights."""
    granularity: Granularity | None = None
    """With `fuse`: `channel` (default) or `scalar`."""
    per_head: bool | None = None
    """With `fuse`: weights of its own for every KV head (default false)."""
    init: FusionInit | None = None
    """With `fuse`: `lite` (default), `mean` or `randn`."""

    def read(self, where: str) -> Read:
        if (self.share is None) == (self.fuse is None):
            raise PlanError(f"{where}: needs either share or fuse, and not both")
        options = {k: v for k in ("granularity", "per_head", "init") if (v := getattr(self, k)) is not None}
        if self.fuse is not None:
            return Fuse(tuple(self.fuse), **options)
        if options:
            raise PlanError(f"{where}: {', '.join(options)} go with fuse, not with share")
        assert self.share is not None
        return Share(self.share)


class LayerConfig(Section):
    """One entry of `model.kv.layers`."""

    layers: int | str | list[int]
    """The layers that this entry describes: 3, "0-11" or [0, 2, 4]."""
    own: OwnConfig | None = None
    """The layers own keys and values; `own: {}` is enough."""
    latent: LatentConfig | None = None
    """The layers own a latent."""
    retention: RetentionConfig | None = None
    """The layers keep a recurrent state."""
    keys: ReadConfig | None = None
    """Where the keys come from; an owner may leave it out."""
    values: ReadConfig | None = None
    """Where the values come from; an owner may leave it out."""
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window in tokens; null: full attention."""

    def plan(self, index: int, shape: Shape) -> LayerPlan:
        owned = [s for s in (self.own, self.latent, self.retention) if s is not None]
        if len(owned) > 1:
            raise PlanError(f"layer {index}: names more than one of own, latent, retention")
        source = owned[0] if owned else None
        own: Own | Latent | Retention | None = None
        if isinstance(source, OwnConfig):
            own = Own(n_kv_heads=source.n_kv_heads or shape.n_heads, kv_norm=source.kv_norm)
        elif isinstance(source, LatentConfig):
            own = Latent(**source.model_dump())
        elif isinstance(source, RetentionConfig):
            own = Retention()
        keys = self.keys.read(f"layer {index}: keys") if self.keys else None
        values = self.values.read(f"layer {index}: values") if self.values else None
        if own is None and (keys is None or values is None):
            missing = " and ".join(name for name, read in (("keys", keys), ("values", values)) if read is None)
            raise PlanError(f"layer {index}: owns nothing and does not say where its {missing} come from")
        return LayerPlan(own=own, keys=keys, values=values, window=self.window)


class Explicit(Section):
    """The plan spelled out, layer by layer."""

    layers: list[LayerConfig] = Field(min_length=1)
    """Entries that together name every layer of the model once."""
    iterations: IterationsConfig | None = None
    """Passes over cyclic layers; a plan that reads from a layer above needs it."""

    def expand(self, shape: Shape) -> KVPlan:
        found: dict[int, LayerPlan] = {}
        for entry in self.layers:
            for i in layer_range(entry.layers):
                if i in found:
                    raise PlanError(f"layer {i}: described twice in model.kv.layers")
                if not 0 <= i < shape.n_layers:
                    raise PlanError(
                        f"layer {i}: in model.kv.layers, but the model has layers 0 to {shape.n_layers - 1}"
                    )
                found[i] = entry.plan(i, shape)
        missing = [i for i in range(shape.n_layers) if i not in found]
        if missing:
            raise PlanError(f"layer {missing[0]}: not described in model.kv.layers (missing: [{ranges(missing)}])")
        iterations = self.iterations.plan() if self.iterations else None
        return KVPlan.of([found[i] for i in range(shape.n_layers)], iterations)
