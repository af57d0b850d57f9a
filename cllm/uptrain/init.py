"""A student's first weights from a teacher's, without training.

All that is not K/V is copied. Then, by `init.method`:

- `copy`: every owner projects what the teacher's layer does; fusion weights start as the plan says;
- `mean`: every owner projects the mean of the teacher's layers that read it;
- `aligned`: the same after the KV heads of each layer were turned onto the owner's, by the weights alone;
- `ridge`: layers are turned by what they make of a calibration text, shared projections regressed onto all that read
  them, and readers fitted to the result;
- `fit`: owners as in copy, and readers fitted to them: fusion weights, queries, outputs;
- `svd`: latents.

With the teacher's own plan there is nothing to choose, and the student is the teacher.
"""

from __future__ import annotations

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
from cllm.uptrain.heads import Grams, Turn, heads_of, turn_owner, turn_reader
from cllm.uptrain.project import anchors, average_owners, check_plans, copy_owners, copy_rest, teacher_owners
from cllm.uptrain.ridge import fit_shared, shared_groups
from cllm.uptrain.svd import check_latents, make_latents


@dataclass(frozen=True, slots=True)
class Initialised:
    """What was done to a student."""

    owners: dict[int, OwnKV] = field(default_factory=dict)
    """For every layer, K/V projections of its own that go with its queries and output: the teacher's, turned."""
    errors: dict[str, float] = field(default_factory=dict)
    """What fits left over, relative, by layer and part."""


@torch.no_grad()
def initialise(student: Decoder, teacher: TracedDecoder, settings: InitFrom, batches: Batches = ()) -> Initialised:
    """Overwrite all weights of `student`, on whatever device both are.

    Args:
        student: of the teacher's shape, with any plan.
        teacher: evaluates the calibration text.
        settings: `init` of a config.
        batches: calibration text, for `ridge`, `fit` and `svd`.

    Raises:
        UserError: for plans between which the method is not defined, naming the layer.
    """
    if student.plan == teacher.plan:
        student.load_state_dict(teacher.state_dict())
        return Initialised()
    check_plans(student.plan, teacher.plan)
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
    copy_owners(student, teacher, owners)
    errors: dict[str, float] = {}
    if settings.method == "mean":
        average_owners(student, owners)
    elif settings.method == "aligned":
        _turn_all(student, owners, _turns(student, teacher, owners, settings, batches))
        average_owners(student, owners)
    elif settings.method in ("ridge", "fit"):
        turns = _turns(student, teacher, owners, settings, batches)
        if settings.method == "ridge":
            errors = _regress(student, teacher, owners, turns, settings, batches)
            turns = {}
        found, more = fit_readers(student, teacher, owners, turns, batches, ridge=settings.ridge, align=settings.align)
        _turn_all(student, owners, found)
        errors = errors | more
    elif settings.method == "svd":
        errors = make_latents(student, teacher, batches, keep=settings.rope_pairs)
    return Initialised(owners, errors)


def _turns(
    student: Decoder, teacher: TracedDecoder, owners: dict[int, OwnKV], settings: InitFrom, batches: Batches
) -> dict[int, Turn]:
    """For the layers that own nothing. Owners keep their heads as they are: they are what others are turned onto."""
    plan = student.plan
    layers = plan.borrowers
    if settings.align == "none":
        return {}
    if settings.method == "aligned":
        grams = {i: _weight_grams(plan, owners, i) for i in layers}
    else:
        grams = text_grams(plan, teacher, owners, layers, batches)
    full, turn_keys = settings.align != "heads", not student.config.qk_norm
    return {i: grams[i].turn(full=full, turn_keys=turn_keys) for i in layers}


def _weight_grams(plan: KVPlan, owners: dict[int, OwnKV], i: int) -> Grams:
    of_keys, of_values = (owners[j] for j in anchors(plan, i))
    d = owners[i].head_dim
    linears = (of_keys.k_proj, owners[i].k_proj, of_values.v_proj, owners[i].v_proj)
    return Grams.of(*(heads_of(linear, d) for linear in linears))


def _turn_all(student: Decoder, owners: dict[int, OwnKV], turns: dict[int, Turn]) -> None:
    for i, turn in turns.items():
        turn_reader(attention_of(student, i), turn)
        turn_owner(owners[i], turn)


def _regress(
    student: Decoder,
    teacher: TracedDecoder,
    owners: dict[int, OwnKV],
    turns: dict[int, Turn],
    settings: InitFrom,
    batches: Batches,
) -> dict[str, float]:
    if not shared_groups(student):
        raise UserError(
            "init.method is ridge, but no layer of model.kv shares another's slot; allowed: copy, mean, fit"
        )
    _turn_all(student, owners, turns)
    return fit_shared(student, teacher, owners, batches, ridge=settings.ridge)
