"""The known families, and the names of the decoder's tensors in their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cllm.config import ModelConfig
from cllm.plan.plan import Latent, Share


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Features of a `model_type`."""

    architecture: str
    """The model class that `config.json` names."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    qk_norm: bool = False
    """Norms on each head's queries and keys."""
    windows: Literal["none", "same", "any"] = "none"
    """Sliding windows: on no layer; the same on all layers; or on those that `layer_types` names."""
    gemma: bool = False
    """An MLP gated by GELU, scaled embeddings, and norms that multiply by 1 + weight."""
    norms_after: bool = False
    """Norms also on the outputs of attention and MLP."""
    rope_by_layer_type: bool = False
    """One RoPE for layers with a window and one for the others."""
    prefix: str = ""
    """Precedes the names of all tensors in the files. A family with a prefix has other inputs beside text, and the
    config of its text model is under `text_config`."""
    other_inputs: tuple[str, ...] = ()
    """First parts of the names of tensors that only other inputs need; they are not read."""
    latent: bool = False
    """Multi-head latent attention, its RoPE channels interleaved."""
    interleave_key: bool = False
    """Whether `rope_interleave` in config.json can turn interleaving off."""


_GEMMA_3 = Family(
    architecture="Gemma3ForCausalLM",
    windows="any",
    qk_norm=True,
    gemma=True,
    norms_after=True,
    rope_by_layer_type=True,
)
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM", windows="same"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", windows="any", qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", windows="any", qk_norm=True),
    "gemma": Family(architecture="GemmaForCausalLM", gemma=True),
    "gemma3_text": _GEMMA_3,
    "gemma3": replace(
        _GEMMA_3,
        architecture="Gemma3ForConditionalGeneration",
        prefix="language_model.",
        other_inputs=("vision_tower.", "multi_modal_projector."),
    ),
    "deepseek_v2": Family(architecture="DeepseekV2ForCausalLM", latent=True),
    "deepseek_v3": Family(architecture="DeepseekV3ForCausalLM", latent=True, interleave_key=True),
}
"""By `model_type`, in the order in which an export tries them."""

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Interleaved:
    """The order of the rows of a projection whose RoPE channels are pairs (2j, 2j+1), as in DeepSeek's checkpoints.

    The rows are `groups` equal groups; the first `plain` rows of each have no position. A call reorders the others to
    this decoder's pairs (j, j + d/2). Queries and keys are reordered alike, so scores do not change.
    """

    groups: int
    plain: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` (rows, ...) with its rows reordered."""
        rows = tensor.unflatten(0, (self.groups, -1))
        plain, rotated = rows[:, : self.plain], rows[:, self.plain :]
        return torch.cat((plain, rotated[:, 0::2], rotated[:, 1::2]), dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A tensor: its name in the decoder's state dict and in the checkpoint, and how the one becomes the other."""

    target: str
    source: str
    order: Interleaved | None = None
    """None: the rows stay as they are."""
    offset: float = 0.0
    """Added to the checkpoint's tensor."""
    scale: float = 1.0
    """A factor on the checkpoint's tensor, after `offset`."""


def weights(
    config: ModelConfig, *, interleaved: bool = False, query_scale: float = 1.0, norm_offset: float = 0.0
) -> list[Weight]:
    """All tensors of a decoder in which every layer owns its slot; without the head if embeddings are tied.

    Args:
        config: of the decoder.
        interleaved: see `Interleaved`; for latents only.
        query_scale: a factor on scores. It goes into the norm of queries if `qk_norm` is on, or else their projection.
        norm_offset: number that the family's norms add to their weights.
    """
    table = [
        Weight(target="embed.weight", source=EMBED),
        Weight(target="norm.weight", source="model.norm.weight", offset=norm_offset),
    ]
    if not config.tie_embeddings:
        table.append(Weight(target="head.weight", source=HEAD))
    plan = config.plan()
    latents = plan.reading(Latent)
    for i in range(config.n_layers):
        assert plan.keys(i) == plan.values(i) == Share(i), f"layer {i} reads {plan.keys(i)} and {plan.values(i)}"
        latent = latents.get(i)
        if latent is None:
            assert plan.owned(i).is_plain, f"layer {i} owns {plan.owned(i)}"
            attention = _keys_values(config, query_scale, norm_offset)
        else:
            attention = _latent(config, latent, interleaved, query_scale)
        table += [
            replace(weight, target=f"blocks.{i}.{weight.target}", source=f"model.layers.{i}.{weight.source}")
            for weight in (*attention, *_rest(config, norm_offset))
        ]
    return table


def _rest(config: ModelConfig, norm_offset: float) -> list[Weight]:
    norms = {"attention_norm": "input_layernorm"}
    if config.norms_after:
        norms["after_attention_norm"] = "post_attention_layernorm"
        norms["mlp_norm"] = "pre_feedforward_layernorm"
        norms["after_mlp_norm"] = "post_feedforward_layernorm"
    else:
        norms["mlp_norm"] = "post_attention_layernorm"
    return [
        *(Weight(target=f"{a}.weight", source=f"{b}.weight", offset=norm_offset) for a, b in norms.items()),
        *(Weight(target=f"mlp.{p}_proj.weight", source=f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
    ]


def _keys_values(config: ModelConfig, query_scale: float, norm_offset: float) -> list[Weight]:
    parts = ["q_proj.weight", "owner.k_proj.weight", "owner.v_proj.weight", "o_proj.weight"]
    if config.q_bias:
        parts.append("q_proj.bias")
    if config.kv_bias:
        parts += ["owner.k_proj.bias", "owner.v_proj.bias"]
    if config.qk_norm:
        parts += ["q_norm.weight", "owner.k_norm.weight"]
    scaled = "q_norm." if config.qk_norm else "q_proj."
    return [
        Weight(
            target=f"attention.{part}",
            source=f"self_attn.{part.removeprefix('owner.')}",
            offset=norm_offset if "_norm." in part else 0.0,
            scale=query_scale if part.startswith(scaled) else 1.0,
        )
        for part in parts
    ]


def _latent(config: ModelConfig, latent: Latent, interleaved: bool, query_scale: float) -> list[Weight]:
    names = {
        "owner.down_proj": "kv_a_proj_with_mqa",
        "owner.norm": "kv_a_layernorm",
        "kv_up_proj": "kv_b_proj",
        "o_proj": "o_proj",
        "q_proj": "q_proj",
    }
    if latent.q_lora_rank is not None:
        names |= {"q_down_proj": "q_a_proj", "q_norm": "q_a_layernorm", "q_proj": "q_b_proj"}
    orders = {
        "owner.down_proj": Interleaved(groups=1, plain=latent.kv_lora_rank),
        "q_proj": Interleaved(groups=config.n_heads, plain=latent.qk_nope_head_dim),
    }
    return [
        Weight(
            target=f"attention.{ours}.weight",
            source=f"self_attn.{theirs}.weight",
            order=orders.get(ours) if interleaved else None,
            scale=query_scale if ours == "q_proj" else 1.0,
        )
        for ours, theirs in names.items()
    ]
