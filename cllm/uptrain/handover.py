"""From the teacher's attention to the student's: a layer's output is (1 - λ) teacher's + λ student's, λ from 0 to 1.

It suits every plan, latents included, and every initial weight, because only outputs are mixed (`curriculum.py` mixes
keys and values instead). At λ = 0 the student computes exactly what the teacher does. The teacher's attention is frozen
and reads the student's own residual stream. It is not part of the student, and is not computed once λ is 1.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cllm.config import Rope
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.context import Context
from cllm.model.decoder import Decoder
from cllm.uptrain.curriculum import OWN, MixedIn
from cllm.uptrain.decoder import attention_of, block_of


class HandedOver(MixedIn, nn.Module):
    """Attention whose output is mixed with that of the teacher's attention in training."""

    teacher_rope: Rope | None
    """The teacher's RoPE if it differs from the student's."""

    def forward(self, residual: Tensor, normed: Tensor, slots: Any, context: Context, *more: Any, **local: Any) -> Any:
        out, own = super().forward(residual, normed, slots, context, *more, **local)
        if self.over or not self.training:
            return out, own
        if self.teacher_rope is not None:
            context = replace(context, rope_config=self.teacher_rope, _rope={}, _slot_rope={})
        theirs = getattr(self, OWN)(residual, normed, (), context)[0]
        return torch.lerp(theirs.float(), out.float(), self.share.float()).to(out.dtype), own


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
"""`HandedOver` combined with each class of attention, once, so that compiled code is shared."""


def _handed_over(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"HandedOver{kind.__name__}", (HandedOver, kind), {})
    return _CLASSES[kind]


def changed_layers(student: Decoder, teacher: Decoder) -> list[int]:
    """The layers of `student` whose slot or reads are not those of the teacher's layer."""
    pairs = zip(student.plan.layers, teacher.plan.layers, strict=True)
    return [i for i, (mine, theirs) in enumerate(pairs) if mine != theirs]


def add_handover(student: Decoder, teacher: Decoder) -> None:
    """Mix the outputs of attention in the layers of `student` that differ from the teacher's.

    Raises:
        UserError: if no layer differs, or a layer projects another layer's output and the teacher's keys and values
            have a norm of their own, whose input such a layer does not get.
    """
    layers = changed_layers(student, teacher)
    if not layers:
        raise UserError("uptrain.curriculum_steps: every layer of model.kv reads as the teacher's does; allowed: 0")
    rope = None if student.config.rope == teacher.config.rope else teacher.config.rope
    for i in layers:
        theirs, mine = attention_of(teacher, i), block_of(student, i).attention
        own = student.plan.layers[i].own
        if own is not None and own.input is not None and teacher.plan.owned(i).normalises:
            raise UserError(
                f"uptrain.curriculum_mix is outputs, but layer {i} projects the output of layer {own.input}, and the "
                "teacher's kv_norm needs the layer's own input; allowed with it: slots, or curriculum_steps 0"
            )
        mine.__class__ = _handed_over(type(mine))  # type: ignore[assignment]
        assert isinstance(mine, HandedOver)
        mine.teacher_rope = rope
        mine.mix_in()
        setattr(mine, OWN, _frozen(theirs))


def _frozen(attention: Attention) -> Attention:
    return copy.deepcopy(attention).train().requires_grad_(False)
