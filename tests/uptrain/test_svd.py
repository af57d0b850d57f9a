"""Latents from keys and values: exact where the structure allows it, better with more rank, refused where undefined."""

from __future__ import annotations

import pytest
import torch

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.uptrain.calibrate import observe
from cllm.uptrain.decoder import block_of, owner_of
from cllm.uptrain.heads import heads_of, set_heads, to_channels, to_pairs
from cllm.uptrain.init import init_student
from cllm.uptrain.svd import kept_pairs


def mla(rank: int = 24, rope: int = 8, nope: int = 8, value: int = 8, **more):
    return {
        "preset": "mla",
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        **more,
    }


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kv", [mla(), mla(rank=40), mla(nope=2, value=16)])
def test_full_rank_with_all_pairs_and_one_kv_head_is_exact(
    tiny_config, make_teacher, new_student, text, ids, kv, calibrated: bool
) -> None:
    teacher = make_teacher(tiny_config(n_layers=3, kv={"preset": "mqa"}))
    student = new_student(teacher, kv)
    init_student(student, teacher, InitFrom(method="svd"), text if calibrated else ())
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-3, rtol=1e-3)


def test_key_heads_that_differ_by_phases_and_sizes_are_one_rotated_head(
    tiny_config, make_teacher, new_student, text, ids
) -> None:
    teacher = make_teacher(tiny_config(n_layers=2, kv={"preset": "gqa", "n_kv_heads": 2}))
    for i in range(2):
        first = to_pairs(heads_of(owner_of(teacher, i).k_proj, 8)[:1])
        factor = torch.tensor([1.5, 1j, -0.5 + 2j, 0.3 - 1j], dtype=first.dtype)
        both = to_channels(torch.cat((first, first * factor[:, None])))
        set_heads(owner_of(teacher, i).k_proj, both.float())
    student = new_student(teacher, mla())
    init_student(student, teacher, InitFrom(method="svd"), text)
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("keep", ["high", "uniform"])
def test_kept_pairs_turn_at_the_frequencies_they_had(tiny_config, make_teacher, new_student, text, keep: str) -> None:
    # Only the kept pairs have any key, so that nothing is lost if each turns as it did.
    teacher = make_teacher(tiny_config(n_layers=2, kv={"preset": "mqa"}))
    for block in teacher.blocks:
        kept = torch.zeros(8)
        kept[kept_pairs(8, 4, keep)] = 1
        kept[[p + 4 for p in kept_pairs(8, 4, keep)]] = 1
        block.attention.owner.k_proj.weight.mul_(kept[:, None])
    student = new_student(teacher, mla(rope=4), rope_pairs=keep)
    init_student(student, teacher, InitFrom(method="svd", rope_pairs=keep), text)
    far = torch.randint(0, 32, (1, 60), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student(far), teacher(far), atol=1e-3, rtol=1e-3)


def test_more_rank_is_closer(tiny_config, make_teacher, new_student, text, ids) -> None:
    teacher = make_teacher(tiny_config(n_layers=3, kv={"preset": "gqa", "n_kv_heads": 2}))
    away, lost = [], []
    for rank in (2, 8, 16, 24):
        student = new_student(teacher, mla(rank=rank))
        found = init_student(student, teacher, InitFrom(method="svd"), text)
        lost.append(sum(found.errors.values()))
        away.append((student(ids).log_softmax(-1) - teacher(ids).log_softmax(-1)).square().mean().item())
    assert lost == sorted(lost, reverse=True)
    assert away == sorted(away, reverse=True)


def test_layers_with_linearly_related_inputs_share_one_latent_exactly(
    tiny_config, make_teacher, new_student, text, ids
) -> None:
    """Both layers see the same tokens through different gains, so that R is their ratio; every pair keeps its RoPE."""
    teacher = make_teacher(tiny_config(n_layers=2, kv={"preset": "mqa"}))
    block_of(teacher, 0).attention.o_proj.weight.zero_()
    block_of(teacher, 0).mlp.down_proj.weight.zero_()
    factor = torch.tensor([1.5, 1j, -0.5 + 2j, 0.3 - 1j], dtype=torch.complex128)
    gains = [block_of(teacher, i).attention_norm.weight for i in (0, 1)]
    first = to_pairs(heads_of(owner_of(teacher, 0).k_proj, 8)) * (gains[0] / gains[1])
    set_heads(owner_of(teacher, 1).k_proj, to_channels(first * factor[:, None]).float())
    student = new_student(teacher, mla(factor=2))
    found = init_student(student, teacher, InitFrom(method="svd"), text)
    assert max(found.errors.values()) < 1e-6
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-3, rtol=1e-3)


def test_the_reported_loss_of_a_moved_input_is_that_of_the_regression(tiny_config, make_teacher, new_student, text):
    teacher = make_teacher(tiny_config(n_layers=3))
    student = new_student(teacher, mla(factor=3))
    found = init_student(student, teacher, InitFrom(method="svd", ridge=0.0), text)
    seen = list(observe(teacher, text))
    y, x = (torch.cat([s.normed(i) for s in seen]).double() for i in (0, 2))
    owner = owner_of(teacher, 2)
    target = x @ torch.cat((owner.k_proj.weight, owner.v_proj.weight)).T.double()
    left = target - y @ torch.linalg.lstsq(y, target).solution
    wanted = float(left.square().sum() / target.square().sum())
    assert 0.01 < wanted < 1
    assert found.errors["layer 2 input"] == pytest.approx(wanted, rel=1e-4)


def test_norms_on_queries_and_keys_become_factors_measured_on_the_text(
    tiny_config, make_teacher, new_student, text, ids
):
    teacher = make_teacher(tiny_config(n_layers=2, qk_norm=True, kv={"preset": "mqa"}))
    student = new_student(teacher, mla())
    init_student(student, teacher, InitFrom(method="svd"), text)
    plain = new_student(teacher, mla())
    teacher.blocks[1].attention.q_norm.weight.mul_(4)  # a gain that the factor has to carry
    init_student(plain, teacher, InitFrom(method="svd"), text)
    assert not torch.allclose(plain.blocks[1].attention.q_proj.weight, student.blocks[1].attention.q_proj.weight)
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(-1, keepdim=True).sqrt() * teacher.blocks[1].attention_norm.weight
    theirs = teacher.blocks[1].attention
    sizes = theirs.q_norm(theirs.q_proj(x).unflatten(-1, (4, 8))).square().sum((0, 2))
    mine = plain.blocks[1].attention.q_proj(x).unflatten(-1, (4, 16))[..., 8:].square().sum((0, 2)) / 2  # scale 8 / 16
    torch.testing.assert_close(mine, sizes, rtol=0.3, atol=0.0)


@pytest.mark.parametrize(
    ("shape", "kv", "message"),
    [
        ({}, mla(value=4), "layer 0: v_head_dim is 4; allowed: 8 or more"),
        ({}, mla(rope=4, nope=2), "qk_nope_head_dim is 2; allowed with qk_rope_head_dim 4: 4 or more"),
        ({}, mla(q_lora_rank=8), "layer 0: q_lora_rank is 8; allowed: null"),
        ({}, mla(rope=10), "qk_rope_head_dim is 10"),
        ({"kv_bias": True}, mla(), "latents have no biases"),
    ],
)
def test_latents_that_cannot_be_made_are_refused(
    tiny_config, make_teacher, new_student, text, shape, kv, message
) -> None:
    teacher = make_teacher(tiny_config(n_layers=2, **shape))
    with pytest.raises(UserError, match=message):
        init_student(new_student(teacher, kv), teacher, InitFrom(method="svd"), text)


def test_methods_and_plans_that_do_not_go_together_are_refused(tiny_config, make_teacher, new_student) -> None:
    teacher = make_teacher(tiny_config(n_layers=2))
    with pytest.raises(UserError, match=r"init\.method is copy, and the plan has latents; allowed: svd"):
        init_student(new_student(teacher, mla()), teacher, InitFrom(method="copy"))
    with pytest.raises(UserError, match=r"init\.method is svd, and the plan has no latents"):
        init_student(new_student(teacher, {"preset": "cla", "kv_norm": False}), teacher, InitFrom(method="svd"))
    with pytest.raises(UserError, match="calibration_sequences is 0; latents that several layers read need 1 or more"):
        init_student(new_student(teacher, mla(factor=2)), teacher, InitFrom(method="svd"))
    uneven = make_teacher(tiny_config(n_layers=2, qk_norm=True))
    with pytest.raises(UserError, match="calibration_sequences is 0"):
        init_student(new_student(uneven, mla()), uneven, InitFrom(method="svd"))
    with pytest.raises(UserError, match="qk_rope_head_dim 6 does not divide head_dim 8"):
        kept_pairs(8, 6, "uniform")
