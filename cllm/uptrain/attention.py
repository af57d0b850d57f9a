"""Attention layer by layer on the teacher's residual stream: the outputs that `uptrain.loss.attention` compares.

Layer i of the student gets the stream that enters layer i of the teacher, and the slots that the student's owners
write from the teacher's stream. So errors of lower layers do not reach higher ones, and each layer learns to replace
one layer of the teacher (as the hidden-state alignment of MOHAWK, arXiv 2408.10189, does for other mixers). Only
attention is computed, without feed-forward layers and logits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.uptrain.decoder import TracedDecoder, block_of


def check_attention_loss(student: Decoder) -> None:
    """Raise `UserError` for a plan in which a layer reads a slot from above: its outputs need several passes."""
    if spans := student.plan.cyclic_spans():
        raise UserError(
            f"uptrain.loss.attention: layer {spans[0][0]} of model.kv reads a slot from above; allowed with it: plans "
            "whose layers read themselves or lower layers"
        )


def attention_outputs(
    model: TracedDecoder,
    streams: Sequence[Tensor],
    input_ids: Tensor,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> list[Tensor]:
    """The output (B, T, d_model) of attention in each layer of `model`, on the residual stream of a teacher.

    Args:
        model: a student, or the teacher itself.
        streams: the residual stream (B, T, d_model) before each layer of the teacher, `states` of `Decoder.hidden`.
            Hooks are no substitute: compiled blocks do not call those that come after their first call.
        input_ids, positions, document_ids: as in `Decoder.hidden`.
    """
    context = model.start_context(input_ids, positions, document_ids)
    slots: dict[int, Slot] = {}
    outputs: list[Tensor] = []
    for i, x in enumerate(streams):
        block, own = block_of(model, i), model.plan.layers[i].own
        residual = x
        if own is not None and own.input is not None:
            residual = model.stream_norms[str(own.input)](streams[own.input + 1])
        read = [slots[j] for j in model.reads_others(i)]
        output, slot = model.attend(block, residual, x, read, context)
        if slot is not None:
            slots[i] = slot
        outputs.append(output)
    return outputs
