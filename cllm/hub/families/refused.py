"""Well-known families that the decoder cannot compute, and the features of a checkpoint that stand in the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cllm.files import shorten

Config = Mapping[str, Any]
"""`config.json`, or its `text_config`."""


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that models of a family have and the decoder has not."""

    text: str
    key: str | None = None
    """The key of config.json that decides whether a model has it; None: all models of the family have it."""
    default: Any = None
    """The value of the key if it is missing."""
    is_on: Callable[[Any, Config], bool] = lambda value, config: bool(value)
    """Whether a model with this value of the key, and this config, has it."""

    def found(self, config: Config) -> str | None:
        """The feature in words, with the key and its value; None if the model lacks it."""
        if self.key is None:
            return self.text
        value = config.get(self.key, self.default)
        return f"{self.text} ({self.key}: {shorten(json.dumps(value))})" if self.is_on(value, config) else None


def _is_other_activation(value: Any, config: Config) -> bool:
    return value not in ("silu", "swish", "gelu_pytorch_tanh")


def _is_sparse(value: Any, config: Config) -> bool:
    if value is None:  # the first ten layers of more than ten
        return int(config.get("num_hidden_layers", 35)) > 10
    return any(value) if isinstance(value, list) else value != 0


def _is_list_of_several(value: Any, config: Config) -> bool:
    return isinstance(value, list) and len({*map(str, value)}) > 1


def _rotates_a_part(value: Any, config: Config) -> bool:
    kinds = value.values() if isinstance(value, dict) else ()
    return value is None or any(isinstance(kind, dict) and kind.get("partial_rotary_factor", 1) != 1 for kind in kinds)


_EXPERTS = Feature("a mixture of experts")
_ACTIVATION = Feature(
    "an MLP gated by another function than SiLU and GELU",
    "hidden_activation",
    "gelu_pytorch_tanh",
    _is_other_activation,
)
_BIASES = Feature("biases on all projections of attention", "attention_bias", False)
_BIDIRECTIONAL = Feature("attention to later tokens", "use_bidirectional_attention")
_GEMMA_2 = (
    _ACTIVATION,
    _BIASES,
    _BIDIRECTIONAL,
    Feature("capped logits", "final_logit_softcapping", 30.0),
    Feature("capped scores", "attn_logit_softcapping", 50.0),
)
_GEMMA_3N_AND_4 = (
    _ACTIVATION,
    Feature("norms without weights on values"),
    Feature("inputs of their own for every layer", "hidden_size_per_layer_input", 256),
    _BIASES,
)
_GEMMA_3N = (
    *_GEMMA_3N_AND_4,
    Feature("several residual streams (AltUp)"),
    Feature("a low-rank branch beside each layer (LAuReL)"),
    Feature("sparse activations of the MLP", "activation_sparsity_pattern", None, _is_sparse),
    Feature("MLPs of several widths", "intermediate_size", None, _is_list_of_several),
    Feature("capped logits", "final_logit_softcapping", 30.0),
)
_GEMMA_4 = (
    *_GEMMA_3N_AND_4,
    Feature("RoPE that rotates a part of the channels", "rope_parameters", None, _rotates_a_part),
    Feature("a factor on the output of each layer"),
    Feature("keys and values of one projection with a norm each", "attention_k_eq_v", False),
    Feature("a mixture of experts beside the MLP", "enable_moe_block", False),
    Feature("MLPs of twice the width in layers that share", "use_double_wide_mlp", False),
    Feature("capped logits", "final_logit_softcapping", None),
    _BIDIRECTIONAL,
)
REFUSED: dict[str, tuple[Feature, ...]] = {
    "gemma2": _GEMMA_2,
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA_3N),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA_4),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), (_EXPERTS,)),
    **dict.fromkeys(("llama4", "llama4_text"), (_EXPERTS, Feature("layers without RoPE"))),
    "deepseek_v32": (_EXPERTS, Feature("attention to tokens that an indexer chooses")),
    "qwen3_next": (_EXPERTS, Feature("a recurrent state (gated delta rule) in most layers")),
    "gpt_oss": (_EXPERTS, Feature("sinks in its attention")),
}
"""By `model_type`, what the decoder lacks for it."""


def features(name: str, raw: Config) -> list[str]:
    """All that the decoder lacks for a model of the family `name` with this `config.json`, in words."""
    text = raw.get("text_config")
    config = text if isinstance(text, dict) else raw
    towers = [key.removesuffix("_config") for key in ("vision_config", "audio_config") if raw.get(key)]
    found = [words for feature in REFUSED[name] if (words := feature.found(config)) is not None]
    return found + ([f"encoders of other inputs ({', '.join(towers)})"] if towers else [])
