"""A transformers model in memory as a decoder of cllm, which shares its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cllm.errors import UserError
from cllm.hub.families.load import converted
from cllm.hub.families.read import read_family
from cllm.model.decoder import Decoder
from cllm.model.sizes import meta_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel, folder: str | Path) -> Decoder:
    """The decoder with the weights of a model that was loaded from `folder`, on its device, in evaluation mode.

    Its logits are those of the model up to rounding. Tensors are shared, except for those that the family stores in
    another order or scale, or less a constant.

    Raises:
        UserError: as `read_family` does, and for a model whose tensors are not those of its config.json.
    """
    checkpoint = read_family(folder)
    stored: dict[str, Tensor] = model.state_dict()
    decoder = meta_decoder(checkpoint.config)
    expected = decoder.state_dict()
    state: dict[str, Tensor] = {}
    for weight in checkpoint.weights:
        tensor = stored.get(weight.source)
        if tensor is None or tensor.shape != expected[weight.target].shape or not tensor.is_floating_point():
            raise UserError(
                f"{folder}: {weight.source} is no tensor of {list(expected[weight.target].shape)} in memory"
            )
        state[weight.target] = converted(tensor, weight, None)
    if checkpoint.config.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    decoder.load_state_dict(state, assign=True)
    if checkpoint.config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    return decoder.requires_grad_(False).eval()
