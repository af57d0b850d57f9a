"""An aligned layer computes the same as before, and matching undoes a known alignment."""

from __future__ import annotations

import pytest
import torch

from cllm.config.uptraining import InitFrom
from cllm.uptrain.decoder import attention_of, owner_of
from cllm.uptrain.heads import Alignment, Grams, align_owner, align_reader, heads_of
from cllm.uptrain.init import init_student

SHAPES = [{}, {"kv": {"preset": "gqa", "n_kv_heads": 2}}, {"q_bias": True, "kv_bias": True}]


def random_alignment(n_heads: int, head_dim: int, *, lengths: bool) -> Alignment:
    """An alignment that changes everything; lengths only with `lengths`."""
    draw = torch.Generator().manual_seed(3)
    angles = torch.rand(n_heads, head_dim // 2, generator=draw, dtype=torch.float64) * 6.28
    square = torch.randn(n_heads, head_dim, head_dim, generator=draw, dtype=torch.float64)
    maps = square + 4 * torch.eye(head_dim) if lengths else torch.linalg.qr(square)[0]
    sizes = 0.5 + torch.rand(angles.shape, generator=draw, dtype=torch.float64) if lengths else torch.ones_like(angles)
    return Alignment(torch.randperm(n_heads, generator=draw).tolist(), torch.polar(sizes, angles), maps)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_aligned_layer_computes_the_same(tiny_config, make_teacher, ids, shape, lengths: bool) -> None:
    model = make_teacher(tiny_config(n_layers=2, **shape))
    before = model(ids)
    owner = owner_of(model, 1)
    alignment = random_alignment(len(heads_of(owner.k_proj, 8)), 8, lengths=lengths)
    keys = owner.k_proj.weight.clone()
    align_owner(owner, alignment)
    align_reader(attention_of(model, 1), alignment)
    assert not torch.allclose(owner.k_proj.weight, keys, atol=0.1)
    torch.testing.assert_close(model(ids), before, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_aligning_undoes_orders_phases_and_rotations_exactly(
    tiny_config, make_teacher, new_student, ids, shape
) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, **shape))
    for i in (1, 3):  # what layer i projects is what layer i - 1 does, under another order and in other coordinates
        own, below = owner_of(teacher, i), owner_of(teacher, i - 1)
        own.k_proj.load_state_dict(below.k_proj.state_dict())
        own.v_proj.load_state_dict(below.v_proj.state_dict())
        align_owner(own, random_alignment(len(heads_of(own.k_proj, 8)), 8, lengths=False))
    heads = {"n_kv_heads": len(heads_of(owner_of(teacher, 0).k_proj, 8))}
    student = new_student(teacher, {"preset": "cla", "kv_norm": False, **heads})
    init_student(student, teacher, InitFrom(method="aligned"))
    for i in (0, 2):
        for name in ("k_proj", "v_proj"):
            mine, theirs = (getattr(owner_of(model, i), name).weight for model in (student, teacher))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for i in (1, 3):  # and so the reader, given its own layer's input, computes what the teacher's layer does
        x, k, v = torch.randn(5, 24), owner_of(teacher, i).k_proj, owner_of(teacher, i).v_proj
        q = attention_of(teacher, i).q_proj(x).unflatten(-1, (4, 8))
        mine_q = attention_of(student, i).q_proj(x).unflatten(-1, (4, 8))
        groups = 4 // heads["n_kv_heads"]
        theirs_k = k(x).unflatten(-1, (-1, 8)).repeat_interleave(groups, 1)
        shared_k = owner_of(student, i - 1).k_proj(x).unflatten(-1, (-1, 8)).repeat_interleave(groups, 1)
        theirs_scores, my_scores = (q * theirs_k).sum(-1), (mine_q * shared_k).sum(-1)
        torch.testing.assert_close(my_scores.sort(-1)[0], theirs_scores.sort(-1)[0], atol=1e-4, rtol=1e-4)
        theirs_out = attention_of(teacher, i).o_proj(
            v(x).unflatten(-1, (-1, 8)).repeat_interleave(groups, 1).flatten(1)
        )
        shared_v = owner_of(student, i - 1).v_proj(x).unflatten(-1, (-1, 8)).repeat_interleave(groups, 1).flatten(1)
        torch.testing.assert_close(attention_of(student, i).o_proj(shared_v), theirs_out, atol=1e-4, rtol=1e-4)


def test_norms_on_keys_leave_their_channels_alone(tiny_config, make_teacher, new_student) -> None:
    teacher = make_teacher(tiny_config(n_layers=2, qk_norm=True))
    student = new_student(teacher, {"preset": "cla", "kv_norm": False})
    init_student(student, teacher, InitFrom(method="aligned"))
    rows = attention_of(student, 1).q_proj.weight.unflatten(0, (4, 8))
    theirs = attention_of(teacher, 1).q_proj.weight.unflatten(0, (4, 8))
    assert all(any(torch.equal(row, other) for other in theirs) for row in rows), "query heads are only reordered"


def test_a_matched_order_beats_the_order_as_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, 8, 30, generator=draw) for _ in range(2))
    order = torch.randperm(6, generator=draw)
    alignment = Grams.of(k, k[order], v, v[order]).alignment(full=False, rotate_keys=False)
    assert order[alignment.order].tolist() == list(range(6))
