"""A student's projections from a teacher's, without text: copied, or averaged over the layers that read them.

The *group* of an owner is every layer that reads its keys (or values), fusing layers included. `copy` keeps the owner's
projection. `mean` averages those of the group's teacher layers (MLKV, arXiv 2406.09297; SwiftKV, arXiv 2410.03960);
`aligned` does the same after each layer is aligned with the owner (heads.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.decoder import Decoder
from cllm.model.initial import draw_weights
from cllm.model.sources import OwnKV, Part
from cllm.plan.describe import origin_text
from cllm.plan.plan import KVPlan, Source
from cllm.uptrain.decoder import OWN_KV, attention_of, block_of, owner_of
from cllm.uptrain.heads import heads_of, set_heads

PARTS: tuple[Part, Part] = ("k", "v")


def check_no_loop(plan: KVPlan) -> None:
    """Raise `UserError` for a student whose plan has a loop."""
    if plan.loop is not None:
        raise UserError(
            f"model.kv.loop: {plan.loop.text}, for which init.from has no weights; allowed: plans without a loop"
        )


def check_plans(student: KVPlan, teacher: KVPlan) -> None:
    """Refuse a student's plan whose projections cannot be computed from the teacher's.

    Raises:
        UserError: naming a layer of the teacher that reads anything but two projections of its own input, or a layer of
            the student with a recurrent state, with heads of another size, or with a number of KV heads that does not
            divide the teacher's.
    """
    for i in range(len(teacher)):
        if not teacher.reads_itself(i):
            where, other = _where(student, teacher)
            raise UserError(
                f"init.from: layer {i} of the model to start from {origin_text(teacher, i)}; allowed {where}: models "
                f"in which {OWN_KV}{other}"
            )
    for i in range(len(student)):
        own, source = teacher.owned(i), student.source(i)
        if student.reads_at_once(i):
            raise UserError(
                f"model.kv: layer {i} reads several slots at once, {student.keys(i).text(i)}, which no method starts "
                "from another model; allowed with init.from: layers that read one slot, or fuse several"
            )
        if source.is_state:
            raise UserError(f"model.kv: layer {i} has a {source.noun}, which cannot be made from keys and values")
        if source.kv_heads is not None and own.kv_heads is not None and own.kv_heads % source.kv_heads:
            raise UserError(
                f"model.kv: layer {i} reads {source.kv_heads} KV heads, but the model that init.from names has "
                f"{own.kv_heads}; set n_kv_heads to that, or to a number that divides it"
            )
        owned = student.layers[i].own
        _check_head_sizes(i, own, source, owned)
        if owned is not None and not owned.is_copyable:
            raise UserError(
                f"model.kv: layer {i} owns {owned.text}, which cannot be made from keys and values of another model"
            )
        if owned is not None and owned.is_plain and own.normalises and not owned.normalises:
            raise UserError(
                f"model.kv: layer {i} has no kv_norm, but that of the model that init.from names has; set kv_norm: true"
            )


def _where(student: KVPlan, teacher: KVPlan) -> tuple[str, str]:
    """Where a model is needed whose layers all have keys and values of their own, and another way, for a message."""
    if student == teacher:
        other = "; or init.heads mean and uptrain.curriculum_steps 0"
        return "with init.heads merge or uptrain.curriculum_steps", other
    other = "" if teacher.loop is not None else "; or that model's plan in model.kv"  # `check_no_loop` refuses loops
    return "for a plan other than its own", other


def check_bases(student: ModelConfig, teacher: ModelConfig) -> None:
    """Refuse a student in which a layer's queries or keys rotate with another RoPE base than in the teacher.

    Raises:
        UserError: naming the layer, for models with `rope.windowed_theta`.
    """
    rope, mine, theirs = student.rope, student.plan(), teacher.plan()
    for i in range(len(mine)):
        windowed = teacher.rope.is_windowed(theirs, theirs.key_slots(i)[0])
        own = mine.layers[i].own
        owned = [("owns", i)] if own is not None and "keys" in own.halves else []
        for verb, slot in (("reads", mine.key_slots(i)[0]), *owned):
            if rope.is_windowed(mine, slot) != windowed:
                kind, other = ("all tokens", "a window") if windowed else ("a window", "all tokens")
                raise UserError(
                    f"model.kv: layer {i} {verb} a slot that keeps {kind}, but the model that init.from names has one "
                    f"that keeps {other} there, and rope.windowed_theta gives each kind its RoPE; allowed: the same "
                    "kind in each layer, so only layers of one kind share a slot"
                )


def _check_head_sizes(i: int, theirs: Source, source: Source, owned: Source | None) -> None:
    """Queries and projections of layer `i` keep the head size that they have in the teacher."""
    if not source.is_plain and theirs.head_dim is not None:
        raise UserError(
            f"model.kv: layer {i} reads a {source.noun}, but the model that init.from names has heads of "
            f"{theirs.head_size_text} channels there; allowed: layers with heads of model.head_dim channels"
        )
    for verb, mine in (("reads", source), ("owns", owned)):
        if mine is not None and mine.is_plain and mine.head_dim != theirs.head_dim:
            raise UserError(
                f"model.kv: layer {i} {verb} heads of {mine.head_size_text} channels, but the model that init.from "
                f"names has {theirs.head_size_text} there; allowed: the same, so only layers of one head size share a "
                "slot"
            )


def readers(plan: KVPlan, owner: int, part: Part) -> list[int]:
    """The layers that read the keys (`k`) or values (`v`) of `owner`."""
    return plan.readers("keys" if part == "k" else "values")[owner]


def anchors(plan: KVPlan, i: int) -> tuple[int, int]:
    """The owners that layer `i` is aligned with, of keys and of values.

    For fused reads these are the last source of keys and the first of values, the point at which fusion starts.
    """
    return plan.keys(i).layers[-1], plan.values(i).layers[0]


@torch.no_grad()
def copy_rest(student: Decoder, teacher: Decoder) -> None:
    """Copy everything outside of K/V: embedding, head, norms, MLPs; queries and outputs of layers without latents."""
    student.embed.load_state_dict(teacher.embed.state_dict())
    student.norm.load_state_dict(teacher.norm.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())
    for i in student.plan.inputs:  # as the next layer normalises that output
        norm = owner_of(teacher, i + 1).norm or block_of(teacher, i + 1).attention_norm
        student.stream_norms[str(i)].load_state_dict(norm.state_dict())
    for i in range(len(student.plan)):
        mine, theirs = block_of(student, i), block_of(teacher, i)
        for name, module in mine.named_children():
            if name != "attention":
                module.load_state_dict(theirs.get_submodule(name).state_dict())
        if isinstance(mine.attention, Attention):
            attention = attention_of(teacher, i)
            _load(mine.attention.q_proj, attention.q_proj)
            _load(mine.attention.q_norm, attention.q_norm)
            _load(mine.attention.o_proj, attention.o_proj)
            for read in (mine.attention.keys, mine.attention.values):
                draw_weights(read, student.config)


def _load(mine: nn.Module | None, theirs: nn.Module | None) -> None:
    if mine is not None and theirs is not None:
        mine.load_state_dict(theirs.state_dict())


@torch.no_grad()
def teacher_owners(student: KVPlan, teacher: Decoder) -> dict[int, OwnKV]:
    """Copies of the teacher's projections, for every layer of the student that reads keys and values.

    If the student has fewer KV heads, each is the mean of consecutive heads of the teacher (GQA, arXiv 2305.13245).
    """
    found: dict[int, OwnKV] = {}
    for i in range(len(student)):
        source = student.source(i)
        if source.kv_heads is None:
            continue
        theirs = owner_of(teacher, i)
        owner = copy.deepcopy(theirs).requires_grad_(False)
        for name in ("k_proj", "v_proj"):
            linear: nn.Linear = getattr(theirs, name)
            pooled = heads_of(linear, theirs.head_dim).unflatten(0, (source.kv_heads, -1)).mean(1)
            fewer = nn.Linear(
                linear.in_features,
                pooled.shape[0] * pooled.shape[1],
                bias=linear.bias is not None,
                device=pooled.device,
            )
            set_heads(fewer, pooled)
            setattr(owner, name, fewer.requires_grad_(False))
        found[i] = owner
    return found


@torch.no_grad()
def average_owners(student: Decoder, owners: Mapping[int, OwnKV]) -> None:
    """Set every owner to the mean of the teacher's projections over its group; the same for gains of key norms."""
    for j in student.plan.owners:
        mine = block_of(student, j).attention.owner
        if not isinstance(mine, OwnKV):
            continue
        for part, name in (("k", "k_proj"), ("v", "v_proj")):
            group: list[nn.Linear] = [getattr(owners[i], name) for i in readers(student.plan, j, part)]  # type: ignore[arg-type]
            if group:
                set_heads(getattr(mine, name), torch.stack([heads_of(m, mine.head_dim) for m in group]).mean(0))
        if mine.k_norm is not None:
            norms = [owners[i].k_norm for i in readers(student.plan, j, "k")]
            gains: list[torch.Tensor] = [norm.weight for norm in norms if norm is not None]
            if gains:
                mine.k_norm.weight.copy_(torch.stack(gains).mean(0))
