"""A student's first weights from its teacher's, without training.

Everything outside of K/V is copied. Then, by `init.method`:

- `copy`: owners have the projections of the same layer of the teacher; fusion weights start as in the plan;
- `mean`: owners have the mean of the projections of all layers that read them;
- `aligned`: the same, after the KV heads of each layer are aligned with the owner's, by the weights alone;
- `ridge`: KV heads are aligned by keys and values on a calibration text, shared projections are regressed onto those of
  all their readers, and readers are fitted to the result;
- `fit`: owners as in copy, and readers fitted to them: fusion weights, queries, outputs;
- `svd`: latents.

With the teacher's plan the student is a copy of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV
from cllm.plan.plan import KVPlan, Latent
from cllm.uptrain.calibrate import Batches
from cllm.uptrain.decoder import TracedDecoder, attention_of
from cllm.uptrain.fit import fit_readers, text_grams
from cllm.uptrain.fold import fold_values, share_values
from cllm.uptrain.heads import Alignment, Grams, align_owner, align_reader, heads_of
from cllm.uptrain.merge import merge_heads, merged_layers
from cllm.uptrain.outputs import refit_outputs
from cllm.uptrain.owners import OwnerStart, copy_owners, fit_owners
from cllm.uptrain.project import PARTS, anchors, average_owners, check_bases, check_plans, copy_rest, teacher_owners
from cllm.uptrain.ridge import fit_shared, shared_groups
from cllm.uptrain.svd import check_latents, make_latents


@dataclass(frozen=True, slots=True)
class StudentInit:
    """Results of `init_student` besides the student's weights."""

    owners: dict[int, OwnKV] = field(default_factory=dict)
    """For every layer the K/V projections that go with its queries and output: the teacher's, aligned."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative squared errors of fits, by layer and part."""


@torch.no_grad()
def init_student(student: Decoder, teacher: TracedDecoder, settings: InitFrom, batches: Batches = ()) -> StudentInit:
    """Overwrite all weights of `student`, on the device that both are on.

    Args:
        student: of the teacher's shape, with any plan.
        teacher: evaluates the calibration text.
        settings: `init` of a config.
        batches: calibration text, for `ridge`, `fit` and `svd`.

    Raises:
        UserError: for plans that the method cannot connect, naming the layer.
    """
    if student.plan == teacher.plan and settings.heads == "mean":  # else `merge_heads` refuses
        student.load_state_dict(teacher.state_dict())
        return StudentInit()
    check_plans(student.plan, teacher.plan)
    check_bases(student.config, teacher.config)
    latent = bool(student.plan.reading(Latent))
    if latent != (settings.method == "svd"):
        allowed = "svd" if latent else "copy, mean, aligned, ridge, fit"
        raise UserError(
            f"init.method is {settings.method}, and the plan has {'' if latent else 'no '}latents; allowed: {allowed}"
        )
    if latent:
        check_latents(student, teacher, calibrated=bool(batches))
    copy_rest(student, teacher)
    owners = teacher_owners(student.plan, teacher)
    errors: dict[str, float] = {}
    merged = merged_layers(owners, teacher) if settings.heads == "merge" else []
    if settings.heads == "merge":
        errors |= merge_heads(student, teacher, owners, batches)
    starts = copy_owners(student, teacher, owners)
    _check_text(starts, settings.method)
    if settings.fold != "none":
        folds = fold_values(student.plan, teacher, owners, batches)
        _align_all(student, owners, folds)
        for j in starts.keys() & folds.keys():
            starts[j].copy()
    if settings.method in ("ridge", "fit"):
        errors |= fit_owners(starts.values(), teacher, batches, ridge=settings.ridge)
    if settings.method == "mean":
        average_owners(student, owners)
    elif settings.method == "aligned":
        _align_all(student, owners, _alignments(student, teacher, owners, settings, batches))
        average_owners(student, owners)
    elif settings.method in ("ridge", "fit"):
        alignments = _alignments(student, teacher, owners, settings, batches)
        if settings.method == "ridge":
            if not shared_groups(student):
                raise UserError(
                    "init.method is ridge, but no layer of model.kv shares another's slot; allowed: copy, mean, fit"
                )
            _align_all(student, owners, alignments)
            errors |= fit_shared(student, teacher, owners, batches, ridge=settings.ridge)
            alignments = {}
        changed = [j for j, start in starts.items() if start.reads_text] if settings.method == "fit" else []
        if settings.fold != "none":
            changed += share_values(starts, student, teacher, owners, batches, settings)
        alignments, more = fit_readers(student, teacher, owners, alignments, batches, settings, changed)
        for j in starts.keys() & alignments.keys():
            starts[j].reorder(alignments[j].order)
        _align_all(student, owners, alignments)
        errors |= more
        new = sorted({*alignments, *merged})
        if settings.outputs != "none" and new:
            layers = range(new[0], len(student.plan)) if settings.outputs == "all" else new
            errors |= refit_outputs(student, teacher, layers, batches, ridge=settings.ridge)
    elif settings.method == "svd":
        errors |= make_latents(student, teacher, batches, keep=settings.rope_pairs, ridge=settings.ridge)
    return StudentInit(owners, errors)


def _check_text(starts: Mapping[int, OwnerStart], method: str) -> None:
    for j, start in starts.items():
        if start.needs_text and method != "fit":
            raise UserError(
                f"init.method is {method}, and layer {j} owns {start.source.text}, whose projection is fitted on text; "
                "allowed: fit"
            )


def _alignments(
    student: Decoder, teacher: TracedDecoder, owners: dict[int, OwnKV], settings: InitFrom, batches: Batches
) -> dict[int, Alignment]:
    """Alignments of layers with their anchors. Heads of slots that another layer reads stay as they are."""
    plan = student.plan
    layers = [i for i in plan.inexact if i not in plan.shared]
    if settings.align == "none":
        return {}
    if settings.method == "aligned":
        grams = {i: _weight_grams(plan, owners, i) for i in layers}
    else:
        grams = text_grams(plan, teacher, owners, layers, batches)
    full, rotate_keys = settings.align != "heads", not student.config.qk_norm
    own = {i: [part for part, j in zip(PARTS, anchors(plan, i), strict=True) if i == j] for i in layers}
    return {i: grams[i].alignment(full=full, rotate_keys=rotate_keys, own=own[i]) for i in layers}


def _weight_grams(plan: KVPlan, owners: dict[int, OwnKV], i: int) -> Grams:
    of_keys, of_values = (owners[j] for j in anchors(plan, i))
    d = owners[i].head_dim
    linears = (of_keys.k_proj, owners[i].k_proj, of_values.v_proj, owners[i].v_proj)
    return Grams.of(*(heads_of(linear, d) for linear in linears))


def _align_all(student: Decoder, owners: dict[int, OwnKV], alignments: dict[int, Alignment]) -> None:
    for i, alignment in alignments.items():
        align_reader(attention_of(student, i), alignment)
        align_owner(owners[i], alignment)
