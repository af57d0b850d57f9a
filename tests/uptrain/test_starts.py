"""Starts of every kind of slot: exact where the teacher allows it, else the least squares that a slow method finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.model.value_folds import ValueSums, orthogonal_factor
from cllm.uptrain.calibrate import observe
from cllm.uptrain.decoder import OWN_KV, TracedDecoder, attention_of, block_of, owner_of
from cllm.uptrain.fold import _principal, alignment_of, fold_values
from cllm.uptrain.heads import align_owner, align_reader, heads_of, set_heads
from cllm.uptrain.init import init_student
from cllm.uptrain.outputs import refit_outputs
from cllm.uptrain.owners import tied_projection
from cllm.uptrain.project import check_plans, teacher_owners
from cllm.uptrain.search import Sharing

EXACT = InitFrom(method="fit", ridge=0.0)


@pytest.fixture
def text() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (4, 24), generator=draw)} for _ in range(3)]


def add_nothing(teacher: TracedDecoder, i: int) -> None:
    """Make layer `i` leave the residual stream as it is."""
    attention_of(teacher, i).o_proj.weight.zero_()
    block_of(teacher, i).mlp.down_proj.weight.zero_()


def started(new_student, teacher: TracedDecoder, kv: dict[str, Any], settings: InitFrom, text) -> TracedDecoder:
    student = new_student(teacher, kv)
    init_student(student, teacher, settings, text)
    return student


def apart(student: TracedDecoder, teacher: TracedDecoder, ids: Tensor) -> float:
    """Largest difference of logits."""
    with torch.no_grad():
        return float((student(ids) - teacher(ids)).abs().max())


@pytest.mark.parametrize("shape", [{}, {"kv_bias": True, "kv": {"preset": "gqa", "n_kv_heads": 2}}])
def test_another_layers_output_serves_where_the_layers_between_add_nothing(
    tiny_config, make_teacher, new_student, ids, text, shape
) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, **shape))
    add_nothing(teacher, 2)
    kv = {"preset": "swiftkv", "n_lower": 2, "n_kv_heads": teacher.plan.owned(0).kv_heads}
    assert apart(started(new_student, teacher, kv, EXACT, text), teacher, ids) < 1e-4
    assert apart(started(new_student, teacher, kv, InitFrom(), text), teacher, ids) > 1e-2


def test_projections_of_another_output_are_those_of_lstsq(tiny_config, make_teacher, new_student, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, qk_norm=True))
    student = started(new_student, teacher, {"preset": "swiftkv"}, InitFrom(method="fit", ridge=0, align="none"), text)
    xs, ys = [], []
    for seen in observe(teacher, text):
        xs.append(block_of(teacher, 2).attention_norm(seen.inputs[2]).flatten(0, 1))
        ys.append(owner_of(teacher, 3).v_proj(block_of(teacher, 3).attention_norm(seen.inputs[3])).flatten(0, 1))
    slow = torch.linalg.lstsq(torch.cat(xs).double(), torch.cat(ys).double()).solution.T
    torch.testing.assert_close(owner_of(student, 3).v_proj.weight.double(), slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"kv_bias": True, "kv": {"preset": "gqa", "n_kv_heads": 2}}])
def test_one_projection_serves_both_where_values_are_a_map_of_keys(
    tiny_config, make_teacher, new_student, ids, text, shape
) -> None:
    teacher = make_teacher(tiny_config(n_layers=3, **shape))
    draw = torch.Generator().manual_seed(3)
    for i in range(3):
        owner = owner_of(teacher, i)
        keys = heads_of(owner.k_proj, 8)
        set_heads(owner.v_proj, (torch.eye(8) + 0.3 * torch.randn(len(keys), 8, 8, generator=draw)) @ keys)
    kv = {"preset": "kv_tie", "n_kv_heads": teacher.plan.owned(0).kv_heads}
    student = started(new_student, teacher, kv, EXACT, text)
    if shape.get("qk_norm"):  # the norm of keys scales each token's values too: their map is not exact
        torch.testing.assert_close(attention_of(student, 1).owner.kv_proj.weight, owner_of(teacher, 1).k_proj.weight)
    else:
        assert apart(student, teacher, ids) < 1e-4
    with pytest.raises(UserError, match=r"method is copy, and layer 0 owns \d KV heads, K = V.*; allowed: fit"):
        started(new_student, teacher, kv, InitFrom(), text)


def test_the_tied_projection_is_the_least_squares_that_alternation_finds() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(4, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    x = torch.randn(50, 12, generator=draw, dtype=torch.float64)
    ks, vs = x @ k.T, 3 * x @ v.T
    weight, lost_k, lost_v = tied_projection(k, 3 * v, x.T @ x)
    n = x @ weight.T
    mapped = n @ torch.linalg.lstsq(n, vs).solution
    assert (ks - n).square().sum() / ks.square().sum() == pytest.approx(float(lost_k))
    assert (vs - mapped).square().sum() / vs.square().sum() == pytest.approx(float(lost_v))
    y = torch.cat((ks / ks.norm(), vs / vs.norm()), dim=1)
    n = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    for _ in range(600):  # maps of n for n, and n for maps
        maps = torch.linalg.lstsq(n, y).solution
        n = torch.linalg.lstsq(maps.T, y.T).solution.T
    assert (y - n @ maps).square().sum() == pytest.approx(float(lost_k + lost_v), rel=1e-3)


def test_layers_with_halves_map_the_values_that_they_share(tiny_config, make_teacher, new_student, ids, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=3))
    for i in (0, 1):
        add_nothing(teacher, i)
    draw = torch.Generator().manual_seed(3)
    order = [2, 0, 3, 1]
    for i in (1, 2):  # values of layer 0 under other maps and in another order of heads
        block_of(teacher, i).attention_norm.load_state_dict(block_of(teacher, 0).attention_norm.state_dict())
        values = heads_of(owner_of(teacher, 0).v_proj, 8)[order]
        set_heads(owner_of(teacher, i).v_proj, (torch.eye(8) + 0.3 * torch.randn(4, 8, 8, generator=draw)) @ values)
    assert apart(started(new_student, teacher, {"preset": "svformer"}, EXACT, text), teacher, ids) < 1e-4
    assert apart(started(new_student, teacher, {"preset": "svformer"}, InitFrom(), text), teacher, ids) > 1e-2


def test_mixtures_start_as_the_layers_own(tiny_config, make_teacher, new_student, ids, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=3))
    for method in ("copy", "fit"):
        kv = {"layers": [{"layers": 0, "own": {}}, {"layers": "1-2", "own": {"mix": [0]}}]}
        assert apart(started(new_student, teacher, kv, InitFrom(method=method), text), teacher, ids) < 1e-5


@pytest.mark.parametrize("half", ["keys", "values"])
def test_a_teacher_that_weights_its_own_slot_is_refused(tiny_config, make_teacher, new_student, half, text) -> None:
    """Its projections without the weights would be others."""
    layers = [{"layers": 0, "own": {}}, {"layers": "1-3", "own": {}}]
    layers[0][half] = {"fuse": [0]}
    teacher = make_teacher(tiny_config(n_layers=4, kv={"layers": layers}))
    for method in ("copy", "fit"):
        with pytest.raises(UserError, match=rf"init.from: layer 0 of the model to start from .* {half} by fuse 0"):
            started(new_student, teacher, {"preset": "cla"}, InitFrom(method=method), text)


LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
BOTH = {"layers": [{"layers": 0, "own": {}}, {"layers": "1-3", "read": {"join": [0, {"own": {"window": 4}}]}}]}
HAVE: list[tuple[dict[str, Any], int, str]] = [
    ({"layers": [{"layers": "0-3", "latent": LATENT}]}, 0, "owns a latent (latent 16 + 4)"),
    ({"preset": "kv_tie"}, 0, "owns a slot of keys and values (4 KV heads, K = V)"),
    (
        {"preset": "svformer"}, 1,
        "owns a slot of keys (4 KV heads, only keys) and reads keys of its own and values of layer 0",
    ),
    ({"preset": "yoco_pp", "n_owners": 3}, 1, "owns a slot of keys and values (4 KV heads, mix 0)"),
    ({"preset": "swiftkv"}, 2, "owns a slot of keys and values (4 KV heads, input 1)"),
    ({"preset": "yoco", "lower": "retention"}, 0, "owns a recurrent state"),
    ({"preset": "cla", "n_kv_heads": 2}, 1, "owns nothing and reads keys and values of layer 0"),
    ({"preset": "fusedkv_lite"}, 2, "owns nothing and reads keys of layer 1 and values of layer 0"),
    (
        {"preset": "resformer"}, 1,
        "owns a slot of keys and values (4 KV heads) and reads keys of its own and values by fuse 0 + 1",
    ),
    (BOTH, 1, "owns a slot of keys and values (4 KV heads) and reads several slots at once, join 0 + own last 4"),
]  # fmt: skip


@pytest.mark.parametrize(("kv", "layer", "has"), HAVE, ids=[f"{has}" for _, _, has in HAVE])
def test_a_teacher_without_keys_and_values_of_its_own_is_refused_with_its_slots(
    tiny_config, make_teacher, new_student, kv, layer, has
) -> None:
    """The message says what the layer has, what is needed, and another way."""
    config = tiny_config(n_layers=4, kv=kv)
    teacher = make_teacher(config)
    need = f"; allowed for a plan other than its own: models in which {OWN_KV}"
    with pytest.raises(UserError) as refusal:
        init_student(new_student(teacher, {"preset": "mha"}), teacher, InitFrom())
    begin = f"init.from: layer {layer} of the model to start from {has}"
    assert str(refusal.value) == f"{begin}{need}; or that model's plan in model.kv"
    same = new_student(teacher, kv)
    init_student(same, teacher, InitFrom())
    assert all(torch.equal(mine, teacher.state_dict()[name]) for name, mine in same.state_dict().items())
    with pytest.raises(UserError) as refusal:
        check_plans(teacher.plan, teacher.plan)
    assert str(refusal.value).startswith(f"{begin}; allowed with init.heads merge or uptrain.curriculum_steps: models")
    assert str(refusal.value).endswith(f"{OWN_KV}; or init.heads mean and uptrain.curriculum_steps 0")
    with pytest.raises(UserError) as refusal:
        Sharing(owners=1).check(config)
    assert str(refusal.value) == f"init.from: layer {layer} {has}; allowed: models in which {OWN_KV}"


def test_the_plan_of_a_looped_teacher_is_no_other_way(tiny_config, make_teacher, new_student) -> None:
    """Students with loops have no start at all."""
    teacher = make_teacher(tiny_config(n_layers=4, kv={"preset": "yoco_u", "times": 2, "window": 4}))
    with pytest.raises(UserError) as refusal:
        init_student(new_student(teacher, {"preset": "mha"}), teacher, InitFrom())
    assert str(refusal.value).endswith(OWN_KV)


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"kv": {"preset": "gqa", "n_kv_heads": 2}}])
def test_folding_values_changes_no_logit(tiny_config, make_teacher, new_student, ids, text, shape) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, **shape))
    kv = {"preset": "cla", "factor": 4, "n_kv_heads": teacher.plan.owned(0).kv_heads}
    plan = new_student(teacher, kv).plan
    folds = fold_values(plan, teacher, teacher_owners(plan, teacher), text)
    assert sorted(folds) == [1, 2, 3]
    folded = copy.deepcopy(teacher)
    for i, fold in folds.items():
        align_owner(owner_of(folded, i), fold)
        align_reader(attention_of(folded, i), fold)
    assert not torch.allclose(owner_of(folded, 2).v_proj.weight, owner_of(teacher, 2).v_proj.weight, atol=0.01)
    assert apart(folded, teacher, ids) < 1e-5


def test_folding_brings_heads_in_any_order_and_coordinates_back() -> None:
    draw = torch.Generator().manual_seed(0)
    anchor = torch.randn(4, 6, 80, generator=draw, dtype=torch.float64)
    order = torch.randperm(4, generator=draw)
    own = torch.randn(4, 6, 6, generator=draw, dtype=torch.float64) @ anchor[order]
    found = alignment_of(ValueSums.of(anchor, own))
    assert order[found.order].tolist() == list(range(4))
    torch.testing.assert_close(found.align_values(own), anchor, atol=0.02, rtol=0.02)  # up to the ridge of covariances


def test_joint_values_have_the_least_error_that_alternation_finds() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 1, 4, 12, generator=draw, dtype=torch.float64)
    x = torch.randn(12, 60, generator=draw, dtype=torch.float64)
    ys = [r[0] @ x / (r[0] @ x).norm() for r in rows]
    shared = (_principal(rows, x @ x.T)[0] @ x).T
    error = sum((y.T - shared @ torch.linalg.lstsq(shared, y.T).solution).square().sum() for y in ys)
    stacked = torch.cat(ys).T
    n = torch.randn(60, 4, generator=draw, dtype=torch.float64)
    for _ in range(600):
        maps = torch.linalg.lstsq(n, stacked).solution
        n = torch.linalg.lstsq(maps.T, stacked.T).solution.T
    assert (stacked - n @ maps).square().sum() == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("kv", ["cla", "fusedkv", "trailing", "svformer", "swiftkv", "kv_tie"])
def test_every_plan_starts_with_folds_and_refitted_outputs(
    tiny_config, make_teacher, new_student, ids, text, kv
) -> None:
    teacher = make_teacher(tiny_config(n_layers=4))
    options = {"group": 2} if kv == "swiftkv" else {}
    far = {}
    for name, settings in (
        ("fit", {}),
        ("mean", {"fold": "mean"}),
        ("joint", {"fold": "joint"}),
        ("outputs", {"outputs": "all", "ridge": 1e-6}),
    ):
        student = started(new_student, teacher, {"preset": kv, **options}, InitFrom(method="fit", **settings), text)
        with torch.no_grad(), student.record_layers() as mine, teacher.record_layers() as theirs:
            student(text[0]["input_ids"])
            teacher(text[0]["input_ids"])
        far[name] = ((mine[-1] - theirs[-1]).square().sum() / theirs[-1].square().sum()).item()
    assert far["outputs"] < far["fit"]
    assert max(far.values()) < 1.0


def test_refitted_outputs_are_those_of_lstsq(tiny_config, make_teacher, new_student, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=3))
    student = started(new_student, teacher, {"preset": "cla", "factor": 3}, InitFrom(method="fit"), text)
    before = copy.deepcopy(student)
    refit_outputs(student, teacher, [1], text, ridge=0.0)
    zs, ts = [], []
    for batch in text:
        inputs: list[Tensor] = []
        hooks = [
            attention_of(before, 1).o_proj.register_forward_pre_hook(lambda _, a: zs.append(a[0].flatten(0, 1))),
            attention_of(teacher, 1).register_forward_hook(lambda _, __, out: ts.append(out[0].flatten(0, 1))),
        ]
        before(batch["input_ids"])
        teacher.hidden(batch["input_ids"], states=inputs)
        mine: list[Tensor] = []
        before.hidden(batch["input_ids"], states=mine)
        zs.pop()
        size = (ts[-1] + inputs[1].flatten(0, 1)).norm(dim=-1, keepdim=True)
        ts[-1] = (ts[-1] + (inputs[1] - mine[1]).flatten(0, 1)) / size
        zs[-1] = zs[-1] / size
        for hook in hooks:
            hook.remove()
    slow = torch.linalg.lstsq(torch.cat(zs).double(), torch.cat(ts).double()).solution.T
    torch.testing.assert_close(attention_of(student, 1).o_proj.weight.double(), slow, atol=2e-3, rtol=2e-3)
    for i in (0, 2):
        torch.testing.assert_close(attention_of(student, i).o_proj.weight, attention_of(before, i).o_proj.weight)


def test_the_orthogonal_factor_is_that_of_the_decomposition_also_of_singular_matrices():
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-9
    x[2, :, 5:] *= 1e-7  # nearly singular
    u, _, wh = torch.linalg.svd(x)
    torch.testing.assert_close(orthogonal_factor(x), u @ wh, atol=1e-8, rtol=0)
    x[3, 0], x[3, 1, :, 2], x[3, 2] = 0, 0, torch.outer(x[0, 0, 0], x[0, 0, 1])
    found = orthogonal_factor(x)
    torch.testing.assert_close(found.mT @ found, torch.eye(12, dtype=torch.float64).expand_as(x), atol=1e-9, rtol=0)


def test_pairs_of_heads_are_folded_together_as_one_by_one():
    """T⁻¹ of every pair by the formula, with roots and decompositions of a single pair."""
    generator = torch.Generator().manual_seed(0)
    anchor, own = (torch.randn(3, 6, 40, dtype=torch.float64, generator=generator) for _ in range(2))
    sums = ValueSums.of(anchor, own)

    def root(s, power):
        values, vectors = torch.linalg.eigh(s + 1e-4 * s.diagonal().mean() * torch.eye(6, dtype=s.dtype))
        return vectors @ (values**power).diag() @ vectors.T

    order, inverses = sums.matched()
    for g, h in enumerate(order):
        s11, s22, s12 = sums.anchor[g], sums.own[h], sums.cross[g, h]
        u, _, wh = torch.linalg.svd(root(s11, -0.5) @ s12 @ root(s22, -0.5))
        torch.testing.assert_close(inverses[g], root(s11, -0.5) @ u @ wh @ root(s22, 0.5))
