"""Attention layer by layer on the teacher's residual stream: the outputs that `uptrain.loss.attention` compares.

Layer i of the student gets the stream that enters layer i of the teacher, and the slots that the student's owners
write from the teacher's stream. So errors of lower layers do not reach higher ones, and each layer learns to replace
one layer of the teacher (as the hidden-state alignment of MOHAWK, arXiv 2408.10189, does for other mixers). Only
attention is computed, without feed-forward layers and logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.uptrain.decoder import TracedDecoder, block_of


@dataclass(frozen=True, slots=True)
class Recorded:
    """Attention of a teacher during one forward pass."""

    inputs: list[Tensor] = field(default_factory=list)
    """The residual stream (B, T, d_model) before each layer."""
    outputs: list[Tensor] = field(default_factory=list)
    """The output (B, T, d_model) of attention in each layer."""


@contextlib.contextmanager
def recorded(teacher: Decoder, active: bool = True) -> Iterator[Recorded | None]:
    """Record the attention of `teacher` in the forward pass within; None unless `active`."""
    if not active:
        yield None
        return
    seen = Recorded()
    hooks = []
    for i in range(len(teacher.blocks)):
        block = block_of(teacher, i)
        hooks.append(block.register_forward_pre_hook(lambda _, inputs: seen.inputs.append(inputs[0])))
        hooks.append(block.attention.register_forward_hook(lambda *args: seen.outputs.append(args[2][0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_attention_loss(student: Decoder) -> None:
    """Raise `UserError` for a plan in which a layer reads a slot from above: its outputs need several passes."""
    if spans := student.plan.cyclic_spans():
        raise UserError(
            f"uptrain.loss.attention: layer {spans[0][0]} of model.kv reads a slot from above; allowed with it: plans "
            "whose layers read themselves or lower layers"
        )


def attention_outputs(
    student: TracedDecoder,
    seen: Recorded,
    input_ids: Tensor,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> list[Tensor]:
    """The output (B, T, d_model) of attention in each layer of `student`, on the stream of the teacher in `seen`."""
    context = student.start_context(input_ids, positions, document_ids)
    slots: dict[int, Slot] = {}
    outputs: list[Tensor] = []
    for i, x in enumerate(seen.inputs):
        block, own = block_of(student, i), student.plan.layers[i].own
        residual = x
        if own is not None and own.input is not None:
            residual = student.stream_norms[str(own.input)](seen.inputs[own.input + 1])
        read = [slots[j] for j in student.plan.reads_others(i)]
        output, slot = block.attention(residual, block.attention_norm(x), read, context)
        if slot is not None:
            slots[i] = slot
        outputs.append(output)
    return outputs
