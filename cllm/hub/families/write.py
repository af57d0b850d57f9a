"""A decoder as a Hugging Face checkpoint of another family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from cllm.config import ModelConfig, RopeScaling
from cllm.errors import UserError, nearest
from cllm.files import usual_permissions
from cllm.hub.families.read import CONFIG_FILE
from cllm.hub.families.table import FAMILIES, Family, weights
from cllm.model.sizes import meta_decoder, model_d_ff
from cllm.plan.plan import KVPlan

_WRITABLE = tuple(name for name, family in FAMILIES.items() if not (family.latent or family.gemma))


def export_family(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    family: str | None = None,
    *,
    token_ids: Mapping[str, int | list[int] | None] | None = None,
    max_shard_size: int | str = "5GB",
) -> str:
    """Write `config` and `tensors` as config.json and safetensors that transformers loads.

    Args:
        config: of a decoder in which every layer reads its own keys and values, with one number of KV heads.
        tensors: the decoder's state dict, in any dtype; with tied embeddings `head.weight` may be missing.
        folder: is made if necessary; must not hold a checkpoint.
        family: `llama`, `mistral`, `qwen2` or `qwen3`; None: the first that fits.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for config.json; missing ones become null.
        max_shard_size: bytes, or a number with a unit; larger checkpoints are split into shards with an index.

    Returns:
        The family.

    Raises:
        UserError: naming the layer that shares, fuses, or owns a latent or a state; the field that the family lacks;
            the tensor that is missing, unknown or of another shape; or the folder that holds a checkpoint.
    """
    folder = Path(folder)
    plan = config.plan()
    _check_plan(plan)
    name = _choose(config, plan, family)
    _check_tensors(config, tensors)
    in_use = [*folder.glob(CONFIG_FILE), *folder.glob("*.safetensors*"), *folder.glob("*.bin*")]
    if in_use:
        raise UserError(f"{in_use[0]}: exists already; export to a folder without a checkpoint")
    named = _unaliased({weight.source: tensors[weight.target] for weight in weights(config)})
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(named, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    usual_permissions(folder)
    # Last, so that a folder with a config.json is complete.
    _hf_config(config, plan, name, token_ids or {}, {tensor.dtype for tensor in named.values()}).save_pretrained(folder)
    return name


def _unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with copies of those that share memory, of which only one would be written."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _check_plan(plan: KVPlan) -> None:
    if plan.loop is not None:
        raise UserError(
            f"model.kv.loop: {plan.loop.text}; in {', '.join(_WRITABLE)} checkpoints every layer has weights of its own"
        )
    for i in range(len(plan)):
        for what, read in (("keys", plan.keys(i)), ("values", plan.values(i))):
            if plan.reads_at_once(i):
                raise UserError(f"layer {i}: reads several slots, {read.text(i)}; {_ELSEWHERE}")
            if not read.is_stored:
                raise UserError(f"layer {i}: fuses {what} of layers {list(read.layers)}; {_ELSEWHERE}")
            if read.layers != (i,):
                raise UserError(f"layer {i}: shares the {what} of layer {read.layers[0]}; {_ELSEWHERE}")
    heads = set()
    for i in range(len(plan)):
        own = plan.owned(i)
        if not own.is_plain:
            raise UserError(f"layer {i}: owns a {own.noun}; {_ELSEWHERE}")
        if not own.is_ordinary:
            raise UserError(f"layer {i}: owns {own.text}; {_ELSEWHERE}")
        if own.normalises:
            raise UserError(f"layer {i}: has a norm of its own for keys and values (kv_norm); {_ELSEWHERE}")
        if own.head_dim is not None:
            raise UserError(f"layer {i}: has heads of {own.head_dim} channels, not of model.head_dim; {_ELSEWHERE}")
        heads.add(own.kv_heads)
        if len(heads) > 1:
            raise UserError(f"layer {i}: has {own.kv_heads} KV heads, the layers below have others; {_ELSEWHERE}")


_ELSEWHERE = (
    f"in {', '.join(_WRITABLE)} checkpoints every layer reads keys and values of its own, all with one number of heads "
    "and one head size"
)


def _choose(config: ModelConfig, plan: KVPlan, family: str | None) -> str:
    if family is not None and family not in _WRITABLE:
        raise UserError(f"family is {family!r}; {nearest(family, _WRITABLE)}")
    misfits = {name: _misfit(name, config, plan) for name in ([family] if family else _WRITABLE)}
    for name, misfit in misfits.items():
        if misfit is None:
            return name
    raise UserError("; ".join(f"cannot be written as {name}: {misfit}" for name, misfit in misfits.items()))


def _misfit(name: str, config: ModelConfig, plan: KVPlan) -> str | None:
    """The first field of `config` that the family lacks, as a message; None if all fit."""
    family: Family = FAMILIES[name]
    for field, value in config.beyond_llama.items():
        return f"model.{field} is {str(value).lower()}, which no family has that can be written"
    for field, theirs in (("q_bias", family.qkv_bias), ("kv_bias", family.qkv_bias), ("qk_norm", family.qk_norm)):
        if getattr(config, field) != theirs:
            return f"model.{field} is {str(not theirs).lower()}, there it is {str(theirs).lower()}"
    windows = [layer.window for layer in plan.layers]
    for i, window in enumerate(windows):
        if window is not None and family.windows == "none":
            return f"layer {i} has a window of {window}, there no layer has one"
        if window != windows[0] and family.windows == "same":
            return f"layer {i} has window {window} and layer 0 {windows[0]}, there all are equal"
    if len({window for window in windows if window is not None}) > 1:
        return f"windows are {windows}, there all windows are of one size"
    # transformers' LlamaConfig requires it, even with head_dim.
    if name == "llama" and config.d_model % config.n_heads:
        return f"model.d_model {config.d_model} is not a multiple of model.n_heads {config.n_heads}"
    return None


def _check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in meta_decoder(config).state_dict().items()}
    if config.tie_embeddings:
        expected.pop("head.weight")
        head = tensors.get("head.weight")
        if head is not None and "embed.weight" in tensors and not torch.equal(head, tensors["embed.weight"]):
            raise UserError("tensor head.weight differs from embed.weight, but model.tie_embeddings is true")
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"tensor {name} is missing; the decoder of this config has it")
        if tensors[name].shape != shape:
            raise UserError(f"tensor {name} is {list(tensors[name].shape)}; it should be {list(shape)}")
    for name in tensors:
        if name not in expected and not (config.tie_embeddings and name == "head.weight"):
            raise UserError(f"tensor {name} is no part of the decoder of this config")


def _hf_config(
    config: ModelConfig,
    plan: KVPlan,
    name: str,
    token_ids: Mapping[str, int | list[int] | None],
    dtypes: set[torch.dtype],
) -> Any:
    from transformers import CONFIG_MAPPING

    family = FAMILIES[name]
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": model_d_ff(config),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": plan.owned(0).kv_heads,
        "head_dim": config.resolved_head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init.std,
        "rope_parameters": {"rope_theta": config.rope.theta, **_rope_parameters(config.rope.scaling)},
        "architectures": [family.architecture],
        **{f"{kind}_token_id": token_ids.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")},
    }
    if len(dtypes) == 1:
        options["dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    windows = [layer.window for layer in plan.layers]
    size = next((window for window in windows if window is not None), None)
    if family.windows == "same":
        options["sliding_window"] = size
    elif family.windows == "any":
        options |= {"use_sliding_window": size is not None, "sliding_window": size}
        options["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return CONFIG_MAPPING[name](**options)


def _rope_parameters(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    given: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return given
    given["original_max_position_embeddings"] = scaling.original_max_seq_len
    fields = ["low_freq_factor", "high_freq_factor"] if scaling.type == "llama3" else ["beta_fast", "beta_slow"]
    given |= {field: getattr(scaling, field) for field in fields}
    if scaling.type == "yarn" and scaling.attention_factor is not None:
        given["attention_factor"] = scaling.attention_factor
    return given
