"""The parts of a model that training treats differently: K/V projections, queries, outputs, fusion weights, others."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from cllm.model.sources import Reader

ModelPart = Literal["kv", "queries", "outputs", "fusion", "rest"]
"""kv: projections that write keys and values or latents, up-projections of latents, their norms, and norms of layer
outputs that higher layers project; queries and outputs: those projections of attention, with their norms; fusion:
weights of fused reads; rest: embeddings, feed-forward layers, norms of blocks, and the head."""
PARTS: tuple[ModelPart, ...] = get_args(ModelPart)
_CHILDREN: dict[str, ModelPart] = {
    **dict.fromkeys(("owner", "local", "k_proj", "v_proj", "kv_up_proj"), "kv"),
    **dict.fromkeys(("q_proj", "q_norm", "q_down_proj"), "queries"),
    "o_proj": "outputs",
}
"""Parts of the submodules of a layer's attention, by name."""


def parts_of(model: nn.Module) -> dict[int, ModelPart]:
    """The part of every parameter, by `id`.

    Args:
        model: a `Decoder`. In another module, parameters outside of reads of slots and `blocks.I.attention` are `rest`.
    """
    found: dict[int, ModelPart] = {}
    for name, parameter in model.named_parameters():
        match name.split("."):
            case ["stream_norms", *_]:
                found[id(parameter)] = "kv"
            case ["blocks", _, "attention", child, *_]:
                found[id(parameter)] = _CHILDREN.get(child, "rest")
            case _:
                found[id(parameter)] = "rest"
    for module in model.modules():
        if isinstance(module, Reader):
            found |= dict.fromkeys((id(p) for p in module.parameters()), "fusion")
    return found


def has_fusion_weights(model: nn.Module) -> bool:
    """Whether a part of `model` is fusion weights."""
    return "fusion" in parts_of(model).values()
