"""Settings of the decoder: `model:`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cllm.plan.plan import MAX_LAYERS, KVPlan
from cllm.plan.presets import MHA, Preset
from cllm.plan.schema import KVConfig
from cllm.plan.shape import Shape
from cllm.section import MAX_HEADS, MAX_TOKENS, MAX_WIDTH, Section


class RopeScaling(Section):
    """Scaling of RoPE to contexts longer than the model was trained on."""

    type: Literal["linear", "llama3", "yarn"]
    """Method: `linear` (position interpolation), `llama3` (Llama 3.1) or `yarn` (arXiv 2309.00071)."""
    factor: float = Field(gt=0)
    """Ratio of the context after scaling to the one before."""
    original_max_seq_len: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Context before scaling, in tokens; required for llama3 and yarn."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths longer than original_max_seq_len / this are multiplied by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths shorter than original_max_seq_len / this are unchanged."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: channels that rotate more often than this within the original context are unchanged."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: wavelengths of channels that rotate less often than this within the original context are multiplied by
    `factor`."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: multiplies cos and sin; null: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _needs_original(self) -> Self:
        if self.type != "linear" and self.original_max_seq_len is None:
            raise ValueError(f"rope scaling {self.type} needs original_max_seq_len, the context before scaling")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; it must exceed low_freq_factor {self.low_freq_factor}"
            )
        return self


class Rope(Section):
    """Rotary position embedding, rotate-half layout: channels j and j + d/2 form a pair."""

    theta: float = Field(10000.0, gt=0)
    """Base of the wavelengths: channel pair j has 2π theta^(2j / head_dim)."""
    scaling: RopeScaling | None = None
    """Scaling to a longer context; null: none."""
    windowed_theta: float | None = Field(None, gt=0)
    """Base of slots that keep a window, without scaling (Gemma 3: 10000); null: as all others. Queries have the base of
    the slot that they read."""

    def is_windowed(self, plan: KVPlan, slot: int) -> bool:
        """Whether the keys of a slot of `plan` rotate with `windowed_theta`."""
        return self.windowed_theta is not None and plan.kept(slot) is not None

    def of(self, windowed: bool) -> Rope:
        """The base and scaling for keys that are `windowed` as `is_windowed` says, and for others."""
        return Rope(theta=self.windowed_theta) if windowed and self.windowed_theta is not None else self


class Init(Section):
    """Initial weights, drawn from normal distributions with mean 0."""

    std: float = Field(0.02, gt=0, le=100)
    """Standard deviation of embeddings and projections. With more than 100, products of hidden states overflow."""
    scale_residual: bool = True
    """Divide the standard deviation of projections that write to the residual stream by sqrt(2 n_layers) (GPT-2)."""


class ModelConfig(Section):
    """The decoder."""

    vocab_size: int | None = Field(None, ge=2, le=MAX_TOKENS)
    """Vocabulary size, the rows of the embedding; null: the tokenizer's size, rounded up to a multiple of 64."""
    d_model: int = Field(ge=2, le=MAX_WIDTH)
    """Width of the residual stream."""
    n_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Number of decoder layers."""
    n_heads: int = Field(ge=1, le=MAX_HEADS)
    """Number of query heads in a layer."""
    head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH, multiple_of=2)
    """Channels of a query, key or value head; null: d_model / n_heads."""
    d_ff: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the gated feed-forward layer; null: 8/3 d_model, rounded up to a multiple of 64."""
    mlp_activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the feed-forward layer's gate: silu (SwiGLU), or gelu_tanh, GELU in its tanh approximation
    (Gemma)."""
    max_seq_len: int = Field(2048, ge=1, le=MAX_TOKENS)
    """Longest context, in tokens."""
    rope: Rope = Field(default_factory=Rope)
    """Rotary position embedding."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    norms_after: bool = False
    """RMSNorm also on the outputs of attention and of the feed-forward layer, before they are added to the residual
    stream (Gemma 2 and 3)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before RoPE (Qwen3). Without effect on latents, which have their
    own."""
    q_bias: bool = False
    """Bias on query projections (Qwen2)."""
    kv_bias: bool = False
    """Bias on key and value projections (Qwen2)."""
    tie_embeddings: bool = False
    """Use the embedding as the output head."""
    scale_embeddings: bool = False
    """Multiply the embeddings of tokens, but not the head, by sqrt(d_model) (Gemma)."""
    init: Init = Field(default_factory=Init)
    """Initial weights."""
    match_params: bool = False
    """Widen d_ff until the model has as many parameters as it would have with mha, within 0.5 %. Without it, designs
    that share have fewer, because layers without own K/V have no K/V projections."""
    kv: KVConfig = Field(default_factory=MHA)
    """The KV plan: a preset by name, or `layers`."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; set head_dim or change either"
                )
            if self.d_model // self.n_heads % 2:
                raise ValueError(
                    f"d_model {self.d_model} / n_heads {self.n_heads} gives an odd head_dim; RoPE rotates channel pairs"
                )
        plan = self.plan()
        for i, layer in enumerate(plan.layers):
            for own in (layer.own, layer.local):
                n_kv = getattr(own, "n_kv_heads", None)
                if n_kv is not None and self.n_heads % n_kv:
                    raise ValueError(f"layer {i}: n_heads {self.n_heads} is not a multiple of n_kv_heads {n_kv}")
        if self.rope.windowed_theta is not None:
            self._check_bases(plan)
        return self

    def _check_bases(self, plan: KVPlan) -> None:
        """Refuse a layer whose queries would meet keys of two RoPE bases, or that mixes keys of two."""
        for i in range(len(plan)):
            for what, slots in (("reads", plan.key_slots(i)), ("mixes", (*plan.mixes(i), i) if plan.mixes(i) else ())):
                layers: dict[bool, list[int]] = {}
                for slot in slots:
                    layers.setdefault(self.rope.is_windowed(plan, slot), []).append(slot % len(plan))
                if len(layers) == 2:
                    raise ValueError(
                        f"layer {i}: {what} keys of slots that keep a window (of layers {layers[True]}) and of slots "
                        f"that keep all tokens (of layers {layers[False]}), to which rope.windowed_theta "
                        f"{self.rope.windowed_theta} gives different RoPE; allowed: slots of one kind, or "
                        "rope.windowed_theta null"
                    )

    @property
    def design(self) -> str:
        """The name of the KV plan: its preset, or `layers` for a plan without one."""
        return self.kv.preset if isinstance(self.kv, Preset) else "layers"

    @property
    def beyond_llama(self) -> dict[str, Any]:
        """The settings in which a layer or the embedding does not compute what Llama's does, by key, with values.

        Biases, `qk_norm` and scalings of RoPE are left out: many programs for Llama have them too.
        """
        found = {key: getattr(self, key) for key in ("mlp_activation", "norms_after", "scale_embeddings")}
        found["rope.windowed_theta"] = self.rope.windowed_theta
        return {key: value for key, value in found.items() if value not in ("silu", False, None)}

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def resolved_d_ff(self) -> int:
        """`d_ff` as given, or its default; before `match_params`."""
        return self.d_ff or (8 * self.d_model // 3 + 63) // 64 * 64

    @property
    def shape(self) -> Shape:
        return Shape(n_layers=self.n_layers, n_heads=self.n_heads, head_dim=self.resolved_head_dim)

    def plan(self) -> KVPlan:
        """The KV plan, expanded and checked."""
        return self.kv.expand(self.shape)
