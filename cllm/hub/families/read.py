"""`config.json` of a Hugging Face folder as a `ModelConfig`, or a refusal that names the key.

transformers' config classes fill in defaults, and read both spellings of RoPE (`rope_parameters`, and the older
`rope_theta` with `rope_scaling`).
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.files import shorten
from cllm.hub.families.refused import REFUSED, features
from cllm.hub.families.table import FAMILIES, Family, Weight, weights
from cllm.trust import check_model_folder, read_object, reason

CONFIG_FILE = "config.json"

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (True, None),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "per_layer_config": (None, {}),
    "use_bidirectional_attention": (False, None),
}
"""Keys with one meaning in all families, and the values that the decoder can compute."""

_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_GELU: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}
"""The same for the activation of MLPs, in Gemma and in other families. Gemma 1 says "gelu" and means the other."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
"""The types of layers under `layer_types`."""

_LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of DeepSeek's latents; `rms_norm_eps` does not set it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyCheckpoint:
    """A checkpoint folder of another family, its weights not read yet."""

    folder: Path
    family: str
    """Its `model_type`."""
    config: ModelConfig
    weights: tuple[Weight, ...]
    """Every tensor of the decoder and its source; with tied embeddings all but the head."""
    token_ids: dict[str, int | list[int] | None]
    """`bos_token_id`, `eos_token_id` and `pad_token_id`."""


def read_family(folder: str | Path) -> FamilyCheckpoint:
    """Read the `config.json` of the checkpoint in `folder`.

    The plan is a preset (mha, gqa, mqa, mla) if all layers are alike, and explicit if windows differ. MLA needs dense
    MLPs only (DeepSeek-V2, arXiv 2405.04434). Its yarn may scale the softmax by another factor than head_dim^-0.5; this
    becomes a factor on the query projections. In Gemma's, 1 + weight becomes the weight of a norm, and the scale of
    scores a factor on the norm of queries.

    Raises:
        UserError: naming the file, the key, its value and what is allowed, for an unknown family, and for features that
            the decoder cannot compute exactly: experts, other activations, biases on outputs and MLPs, dropout, caps on
            logits, quantised weights, other kinds of RoPE, RoPE on part of the channels, settings of single layers.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    raw = _read(file)
    check_model_folder(folder)
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        if str(name) in REFUSED and (lacking := ", ".join(features(str(name), raw))):
            raise UserError(f"{file}: model_type is {name}, which this decoder cannot compute: it has {lacking}")
        # No suggestion: the nearest name is often an older family, not a correction.
        raise UserError(f"{file}: model_type is {shorten(repr(name))}; allowed: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    if family.prefix:
        raw = _text_config(file, name, raw)
    for key, allowed in {**_ALLOWED, **(_GELU if family.gemma else _SILU)}.items():
        _require(file, raw, key, allowed)
    _check_rope_type(file, raw, family)
    hf = _hf_config(file, raw["model_type"], raw)
    options = _latent_options(file, raw, hf) if family.latent else _options(file, raw, hf, family)
    config = _model_config(file, hf, {"rope": _rope(file, hf, family), **options})
    interleaved = family.latent and not (family.interleave_key and not hf.rope_interleave)
    token_ids = {f"{kind}_token_id": getattr(hf, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    table = weights(
        config,
        interleaved=interleaved,
        query_scale=_query_scale(file, hf, family),
        norm_offset=1.0 if family.gemma else 0.0,
    )
    table = [replace(weight, source=family.prefix + weight.source) for weight in table]
    return FamilyCheckpoint(folder=folder, family=name, config=config, weights=tuple(table), token_ids=token_ids)


def _text_config(file: Path, name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model in that of a model with other inputs, with what the latter says of both."""
    text = raw.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(text, dict) or kind != f"{name}_text":
        raise UserError(f"{file}: text_config: model_type is {shorten(json.dumps(kind))}; allowed: {name}_text")
    of_both = ("tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")
    return text | {key: raw[key] for key in of_both if raw.get(key) is not None}


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"{file}: missing, so {file.parent} is no Hugging Face checkpoint folder")
    return read_object(file)


def _require(file: Path, values: Any, key: str, allowed: tuple[Any, ...], why: str = "") -> None:
    """Refuse a `key` whose value is not among `allowed`; `values` is a mapping that may lack it, or an object."""
    found = values.get(key, allowed[0]) if isinstance(values, dict) else getattr(values, key)
    if found not in allowed:
        words = ["null" if value is None else json.dumps(value) for value in allowed]
        raise UserError(
            f"{file}: {key} is {shorten(json.dumps(found))}; allowed: {' or '.join(words)}{why and f' ({why})'}"
        )


def _check_rope_type(file: Path, raw: dict[str, Any], family: Family) -> None:
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key) or {}
    if family.rope_by_layer_type and isinstance(given, dict) and given.keys() <= {_FULL, _SLIDING}:
        for kind, parameters in given.items():
            _check_rope(file, raw, f"{key}: {kind}", parameters or {})
    elif family.rope_by_layer_type and isinstance(given, dict) and any(isinstance(v, dict) for v in given.values()):
        raise UserError(f"{file}: {key} has the keys {shorten(json.dumps(list(given)))}; allowed: {_FULL}, {_SLIDING}")
    else:
        _check_rope(file, raw, key, given)


def _check_rope(file: Path, raw: dict[str, Any], key: str, given: Any) -> None:
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{file}: {key} is {shorten(json.dumps(given))}; allowed: one set of parameters for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    known = ("default", "linear", "llama3", "yarn")
    if kind not in known:
        raise UserError(f"{file}: {key}: rope_type is {shorten(json.dumps(kind))}; allowed: {', '.join(known)}")
    for where, values in ((CONFIG_FILE, raw), (key, given)):
        if values.get("partial_rotary_factor", 1) not in (1, None):
            part = values["partial_rotary_factor"]
            raise UserError(f"{file}: {where}: partial_rotary_factor is {part}; allowed: 1 (RoPE on all channels)")


def _hf_config(file: Path, name: str, raw: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        # A copy, since the classes change their argument.
        return CONFIG_MAPPING[name].from_dict(json.loads(json.dumps(raw)))
    except Exception as error:  # of types that depend on the version of transformers
        raise UserError(f"{file}: not a valid {name} config: {reason(error)}") from None


def _model_config(file: Path, hf: Any, options: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(
            {
                "vocab_size": hf.vocab_size,
                "d_model": hf.hidden_size,
                "d_ff": hf.intermediate_size,
                "n_layers": hf.num_hidden_layers,
                "n_heads": hf.num_attention_heads,
                "max_seq_len": hf.max_position_embeddings,
                "norm_eps": hf.rms_norm_eps,
                "tie_embeddings": hf.tie_word_embeddings,
                "init": {"std": hf.initializer_range},
                **options,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the decoder's config"
        raise UserError(f"{file}: {key}: {first['msg']}") from None


def _number(file: Path, given: dict[str, Any], key: str, default: float | None = None) -> float:
    """A RoPE parameter; `default` if it is missing, null or 0."""
    value = given.get(key) or default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{file}: rope_parameters: {key} is {json.dumps(given.get(key))}; allowed: a positive number")
    return float(value)


def _rope(file: Path, hf: Any, family: Family) -> dict[str, Any]:
    """`model.rope`."""
    given = hf.rope_parameters
    more: dict[str, Any] = {}
    if family.rope_by_layer_type:
        given, windowed = given[_FULL], given[_SLIDING]
        _require(file, windowed, "rope_type", ("default",), f"of {_SLIDING}, whose RoPE is not scaled")
        more["windowed_theta"] = _number(file, windowed, "rope_theta")
    return {"theta": _number(file, given, "rope_theta"), "scaling": _scaling(file, given), **more}


def _scaling(file: Path, given: dict[str, Any]) -> dict[str, Any] | None:
    kind = given["rope_type"]
    if kind == "default":
        return None

    if kind == "linear":
        return {"type": kind, "factor": _number(file, given, "factor")}
    original = given.get("original_max_position_embeddings")
    if kind == "llama3":
        factors = {key: _number(file, given, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return {"type": kind, "original_max_seq_len": original, **factors}
    _require(file, given, "truncate", (True,), "the ramp of yarn starts and ends on whole channels")
    factor = _number(file, given, "factor")
    return {
        "type": kind,
        "original_max_seq_len": original,
        "factor": factor,
        "beta_fast": _number(file, given, "beta_fast", 32.0),
        "beta_slow": _number(file, given, "beta_slow", 1.0),
        "attention_factor": _attention_factor(file, given, factor),
    }


def _attention_factor(file: Path, given: dict[str, Any], factor: float) -> float | None:
    """The factor on cos and sin under yarn; None: the default, which the decoder shares with transformers."""
    if given.get("attention_factor") is not None:
        return _number(file, given, "attention_factor")
    upper, lower = given.get("mscale"), given.get("mscale_all_dim")
    if bool(upper) != bool(lower):
        raise UserError(
            f"{file}: rope_parameters: mscale is {json.dumps(upper)} and mscale_all_dim {json.dumps(lower)}; allowed: "
            "both or neither (what one alone means differs between implementations)"
        )
    return _mscale(factor, upper) / _mscale(factor, lower) if upper and lower else None


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _query_scale(file: Path, hf: Any, family: Family) -> float:
    """The factor of a model on the softmax scale head_dim^-0.5.

    Gemma 3 replaces the scale by query_pre_attn_scalar^-0.5. In DeepSeek's models with scaled RoPE the factor is that
    of mscale_all_dim, squared.
    """
    if (scalar := getattr(hf, "query_pre_attn_scalar", None)) is not None:
        if not scalar > 0:
            raise UserError(f"{file}: query_pre_attn_scalar is {scalar}; allowed: a positive number")
        return math.sqrt(hf.head_dim / scalar)
    given = hf.rope_parameters
    if not family.latent:
        return 1.0
    if given["rope_type"] == "default" or not given.get("mscale_all_dim"):
        return 1.0
    return _mscale(_number(file, given, "factor"), _number(file, given, "mscale_all_dim")) ** 2


def _options(file: Path, raw: dict[str, Any], hf: Any, family: Family) -> dict[str, Any]:
    """Fields of a model whose layers own keys and values."""
    heads = hf.num_attention_heads
    return {
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "qk_norm": family.qk_norm,
        "q_bias": family.qkv_bias,
        "kv_bias": family.qkv_bias,
        "norms_after": family.norms_after,
        "mlp_activation": "gelu_tanh" if family.gemma else "silu",
        "scale_embeddings": family.gemma,
        "kv": _kv(heads, hf.num_key_value_heads, _windows(file, raw, hf, family)),
    }


def _kv(heads: int, kv_heads: int, windows: list[int | None]) -> dict[str, Any]:
    """`model.kv`: a preset if all windows are equal, otherwise an entry for each run of equal layers."""
    if len(set(windows)) > 1:
        runs = [[i for i, _ in run] for _, run in itertools.groupby(enumerate(windows), key=lambda pair: pair[1])]
        entry = {"own": {"n_kv_heads": kv_heads}}
        return {"layers": [{"layers": f"{run[0]}-{run[-1]}", "window": windows[run[0]], **entry} for run in runs]}
    if kv_heads == heads:
        return {"preset": "mha", "window": windows[0]}
    return {"preset": "mqa" if kv_heads == 1 else "gqa", "n_kv_heads": kv_heads, "window": windows[0]}


def _windows(file: Path, raw: dict[str, Any], hf: Any, family: Family) -> list[int | None]:
    """The sliding window of each layer, as transformers' model of the family computes it."""
    window = getattr(hf, "sliding_window", None)
    if family.windows == "none":
        _require(file, raw, "sliding_window", (None,), f"{hf.model_type} has no sliding window")
    sliding = window is not None and family.windows == "same"
    kinds = [_SLIDING if sliding else _FULL] * hf.num_hidden_layers
    if family.windows == "any":
        kinds = hf.layer_types
    elif raw.get("layer_types") not in (None, kinds):
        raise UserError(
            f"{file}: layer_types is {shorten(json.dumps(raw['layer_types']))}; in a {hf.model_type} all are {kinds[0]}"
        )
    for i, kind in enumerate(kinds):
        if kind not in (_FULL, _SLIDING):
            raise UserError(f"{file}: layer_types[{i}] is {kind}; allowed: {_FULL}, {_SLIDING}")
        if kind == _SLIDING and window is None:
            raise UserError(
                f"{file}: layer_types[{i}] is {kind}, but there is no window: set sliding_window (and "
                "use_sliding_window)"
            )
    return [window if kind == _SLIDING else None for kind in kinds]


def _latent_options(file: Path, raw: dict[str, Any], hf: Any) -> dict[str, Any]:
    """Fields of a DeepSeek model whose MLPs are all dense."""
    layers = hf.num_hidden_layers
    if (hf.first_k_dense_replace or 0) < layers:
        raise UserError(
            f"{file}: first_k_dense_replace is {hf.first_k_dense_replace} of {layers} layers; the others are mixtures "
            f"of experts; allowed: {layers} or more"
        )
    _require(file, hf, "num_key_value_heads", (hf.num_attention_heads,), "a latent serves all heads")
    _require(file, hf, "rms_norm_eps", (_LATENT_NORM_EPS,), "the latents' norms have it, and the decoder has one")
    _windows(file, raw, hf, FAMILIES[hf.model_type])
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {"head_dim": hf.qk_nope_head_dim, "kv": {"preset": "mla", **{size: getattr(hf, size) for size in sizes}}}
