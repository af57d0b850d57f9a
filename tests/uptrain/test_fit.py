"""Least squares on a text: planted weights come back, and no fit leaves more than where it started."""

from __future__ import annotations

import pytest
import torch

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.model.sources import FusedRead
from cllm.uptrain.calibrate import observe
from cllm.uptrain.decoder import attention_of, block_of, owner_of
from cllm.uptrain.fit import ReadSums, fit_readers
from cllm.uptrain.heads import heads_of, set_heads, to_channels, to_pairs
from cllm.uptrain.init import init_student
from cllm.uptrain.owners import copy_owners
from cllm.uptrain.project import copy_rest, teacher_owners
from cllm.uptrain.ridge import fit_shared, solve


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
@pytest.mark.parametrize("align", ["none", "turn"])
def test_planted_fusion_weights_are_recovered(
    tiny_config, make_teacher, new_student, text, per_head: bool, granularity: str, align: str
) -> None:
    # Attention and MLP add nothing, so every layer sees the same, and sums of projections are sums of keys and values.
    teacher = make_teacher(tiny_config(n_layers=4))
    for block in teacher.blocks:
        block.attention.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        block.attention_norm.weight.copy_(teacher.blocks[0].attention_norm.weight)
    kv = {"preset": "fusedkv", "granularity": granularity, "per_head": per_head}
    student = new_student(teacher, kv)
    draw = torch.Generator().manual_seed(5)
    planted = {}
    for i in (2, 3):
        for part, name in (("keys", "k_proj"), ("values", "v_proj")):
            read = getattr(attention_of(student, i), part)
            assert isinstance(read, FusedRead)
            planted[i, part] = weight = 0.5 + torch.rand(read.weight.shape, generator=draw)
            channels = torch.cat((weight, weight), -1) if read.tied_pairs else weight
            heads = [heads_of(getattr(owner_of(teacher, j), name), 8) for j in (0, 1)]
            fused = sum(w[..., None] * h for w, h in zip(channels, heads, strict=True))
            set_heads(getattr(owner_of(teacher, i), name), fused)
    found = init_student(student, teacher, InitFrom(method="fit", align=align, ridge=0.0), text)
    assert max(found.errors.values()) < 1e-10
    for (i, part), weight in planted.items():
        torch.testing.assert_close(getattr(attention_of(student, i), part).weight, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("align", ["none", "map"])
def test_planted_complex_and_matrix_weights_are_recovered(tiny_config, make_teacher, new_student, text, align: str):
    teacher = make_teacher(tiny_config(n_layers=4, kv={"preset": "gqa", "n_kv_heads": 2}))
    for block in teacher.blocks:  # all layers see the same
        block.attention.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        block.attention_norm.weight.copy_(teacher.blocks[0].attention_norm.weight)
    student = new_student(teacher, {"preset": "fusedkv", "keys": "complex", "values": "matrix", "n_kv_heads": 2})
    draw, planted = torch.Generator().manual_seed(5), {}
    for i in (2, 3):
        k, v = (torch.randn(getattr(attention_of(student, i), n).weight.shape, generator=draw).double() for n in PARTS)
        planted[i] = (k, v)
        of_keys = [to_pairs(heads_of(owner_of(teacher, j).k_proj, 8)) for j in (0, 1)]
        fused = sum(torch.complex(*k[n].unbind(1))[..., None] * z for n, z in enumerate(of_keys))
        set_heads(owner_of(teacher, i).k_proj, to_channels(fused).float())
        of_values = [heads_of(owner_of(teacher, j).v_proj, 8).double() for j in (0, 1)]
        set_heads(owner_of(teacher, i).v_proj, sum(v[n].mT @ x for n, x in enumerate(of_values)).float())
    found = init_student(student, teacher, InitFrom(method="fit", align=align, ridge=0.0), text)
    assert max(found.errors.values()) < 1e-10
    for i, weights in planted.items():
        for name, weight in zip(PARTS, weights, strict=True):
            got = getattr(attention_of(student, i), name).weight.double()
            torch.testing.assert_close(got, weight, atol=1e-4, rtol=1e-4)
    ids = text[0]["input_ids"]
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-4, rtol=1e-4)


def test_key_weights_are_tied_in_pairs_where_a_free_fit_would_differ(text) -> None:
    draw = torch.Generator().manual_seed(0)
    sources = [torch.randn(2, 8, 50, generator=draw) for _ in range(2)]
    untied = torch.rand(2, 1, 8, generator=draw)
    own = sum(w[0][:, None] * s for w, s in zip(untied, sources, strict=True))
    start = torch.zeros(2, 1, 4)
    fitted = ReadSums.of("k", sources, own).fit(start, torch.ones(2, 4), 0.0, learn=True, align="none")
    assert fitted.weight.shape == (2, 1, 4)
    # By hand: both channels of pair p are rows of one regression.
    for p in range(4):
        rows = torch.stack([torch.cat([s[:, p], s[:, p + 4]]).flatten() for s in sources]).double()
        target = torch.cat([own[:, p], own[:, p + 4]]).flatten().double()
        expected = torch.linalg.lstsq(rows.T, target[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.weight[:, 0, p], expected)


PLANS = [
    {"preset": "fusedkv"},
    {"preset": "fusedkv", "per_head": True, "granularity": "scalar"},
    {"preset": "fusedkv_lite"},
    {"preset": "cla", "kv_norm": False},
]
PARTS = ("keys", "values")


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"kv": {"preset": "gqa", "n_kv_heads": 2}, "kv_bias": True}])
@pytest.mark.parametrize("plan", PLANS)
def test_more_freedom_never_leaves_more(tiny_config, make_teacher, new_student, text, plan, shape) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, **shape))
    heads = teacher.plan.layers[0].own.n_kv_heads
    errors = {}
    for align in ("none", "turn", "map"):
        student = new_student(teacher, {**plan, "n_kv_heads": heads})
        errors[align] = init_student(student, teacher, InitFrom(method="fit", align=align), text).errors
    copied = new_student(teacher, {**plan, "n_kv_heads": heads})
    init_student(copied, teacher, InitFrom(method="copy"))
    for what, error in errors["none"].items():
        if "qk_norm" in shape and plan["preset"] == "fusedkv" and what.endswith("keys"):
            continue  # scaled to the length of normalised keys
        assert error <= residual(copied, teacher, text, what) + 1e-6, f"{what}: worse than copy"
    total = {align: sum(found.values()) for align, found in errors.items()}
    assert total["map"] <= total["turn"] + 1e-6
    assert total["turn"] <= total["none"] + 1e-6
    assert total["map"] < total["none"]


def test_fused_keys_keep_the_length_that_norms_give_them(tiny_config, make_teacher, new_student, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, qk_norm=True))
    student = new_student(teacher, {"preset": "fusedkv"})
    owners = teacher_owners(student.plan, teacher)
    init_student(student, teacher, InitFrom(method="fit"), text)
    squares = torch.zeros(2)
    for seen in observe(teacher, text):
        sources = [seen.slot(j, owner_of(student, j))[0] for j in (0, 1)]
        weights = attention_of(student, 3).keys.channel_weights()
        fused = sum(w[..., None] * s for w, s in zip(weights, sources, strict=True))
        squares += torch.stack([fused.square().sum(), seen.slot(3, owners[3])[0].square().sum()]).detach()
    torch.testing.assert_close(squares[0], squares[1], rtol=1e-4, atol=0.0)


def residual(student, teacher, text, what: str) -> float:
    """|own - read|² / |own|², from the tensors themselves."""
    _, layer, part = what.split()
    i, which = int(layer), 0 if part == "keys" else 1
    left = total = 0.0
    owners = teacher_owners(student.plan, teacher)
    for seen in observe(teacher, text):
        own = seen.slot(i, owners[i])[which].double()
        read = (student.plan.keys if which == 0 else student.plan.values)(i)
        sources = [seen.slot(j, owner_of(student, j))[which].double() for j in read.layers]
        module = getattr(attention_of(student, i), part)
        weights = module.channel_weights() if isinstance(module, FusedRead) else torch.ones(1, 1, 1)
        fused = sum(w[..., None] * s for w, s in zip(weights.double(), sources, strict=True))
        left, total = left + (own - fused).square().sum().item(), total + own.square().sum().item()
    return left / total


def test_the_error_that_fit_reports_is_that_of_the_student_it_makes(
    tiny_config, make_teacher, new_student, text
) -> None:
    teacher = make_teacher(tiny_config(n_layers=4))
    student = new_student(teacher, {"preset": "fusedkv", "per_head": True})
    found = init_student(student, teacher, InitFrom(method="fit", align="none"), text)
    for what, error in found.errors.items():
        assert error == pytest.approx(residual(student, teacher, text, what), rel=1e-4)


@pytest.mark.parametrize("align", ["turn", "map"])
def test_a_layer_that_is_another_in_other_coordinates_is_fitted_exactly(
    tiny_config, make_teacher, new_student, ids, text, align: str
) -> None:
    teacher = make_teacher(tiny_config(n_layers=2))
    for block in teacher.blocks:  # both layers see the same
        block.attention_norm.weight.copy_(teacher.blocks[0].attention_norm.weight)
    block_of(teacher, 0).attention.o_proj.weight.zero_()
    block_of(teacher, 0).mlp.down_proj.weight.zero_()
    draw = torch.Generator().manual_seed(3)
    order = torch.randperm(4, generator=draw)
    rotation = torch.linalg.qr(torch.randn(4, 8, 8, generator=draw))[0]
    below, own = owner_of(teacher, 0), owner_of(teacher, 1)
    set_heads(own.k_proj, heads_of(below.k_proj, 8)[order])
    set_heads(own.v_proj, rotation @ heads_of(below.v_proj, 8)[order])
    student = new_student(teacher, {"preset": "cla", "kv_norm": False})
    found = init_student(student, teacher, InitFrom(method="fit", align=align), text)
    assert max(found.errors.values()) < 1e-6
    torch.testing.assert_close(student(ids), teacher(ids), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("shape", [{}, {"kv_bias": True}, {"kv": {"preset": "gqa", "n_kv_heads": 2}}])
def test_ridge_leaves_no_more_than_the_mean_or_the_owner_alone(
    tiny_config, make_teacher, new_student, text, shape
) -> None:
    teacher = make_teacher(tiny_config(n_layers=6, **shape))
    heads = teacher.plan.layers[0].own.n_kv_heads
    student = new_student(teacher, {"preset": "cla", "factor": 3, "kv_norm": False, "n_kv_heads": heads})
    owners = teacher_owners(student.plan, teacher)
    copy_rest(student, teacher)
    copy_owners(student, teacher, owners)
    errors = fit_shared(student, teacher, owners, text, ridge=1e-4)
    assert errors
    for what, error in errors.items():
        if what.endswith("after"):
            assert error < errors[what.replace("after", "before")]
    again = fit_shared(student, teacher, owners, text, ridge=0.0)
    for what, error in again.items():  # it is at its least already
        assert error == pytest.approx(errors[what.replace("before", "after")], abs=1e-3)


def test_ridge_is_refused_where_nothing_is_shared(tiny_config, make_teacher, new_student, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=4))
    with pytest.raises(UserError, match=r"no layer of model\.kv shares another"):
        init_student(new_student(teacher, {"preset": "fusedkv"}), teacher, InitFrom(method="ridge"), text)


def test_directions_that_the_text_has_not_seen_stay_at_the_start() -> None:
    a = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    b, start = torch.tensor([[4.0], [0.0]], dtype=torch.float64), torch.tensor([[7.0], [5.0]], dtype=torch.float64)
    torch.testing.assert_close(solve(a, b, start, 0.0), torch.tensor([[2.0], [5.0]], dtype=torch.float64))


def test_fitting_reads_nothing_where_every_layer_owns(tiny_config, make_teacher, text) -> None:
    teacher = make_teacher(tiny_config(n_layers=2))
    assert fit_readers(teacher, teacher, {}, {}, text, InitFrom(ridge=0.0, align="map")) == ({}, {})
