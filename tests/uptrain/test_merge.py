"""KV heads merged into fewer: exact for heads that are copies in other coordinates, and below the mean otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cllm.config import ModelConfig
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.uptrain.decoder import attention_of, owner_of
from cllm.uptrain.heads import heads_of, set_heads, to_channels, to_pairs
from cllm.uptrain.init import init_student
from cllm.uptrain.merge import cluster, merge_heads
from cllm.uptrain.project import teacher_owners

CONFIG = ModelConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=32, vocab_size=32)
MERGE = InitFrom.model_validate({"heads": "merge", "calibration_sequences": 4})


def loss_of(student, teacher, ids: Tensor) -> float:
    with torch.no_grad():
        return float((student(ids) - teacher(ids)).square().mean())


def test_heads_that_are_copies_in_other_coordinates_are_merged_exactly(make_teacher, new_student, text, ids) -> None:
    """Head 2 is head 0, and head 3 head 1, with pairs turned and scaled by other factors and values mapped."""
    teacher = make_teacher(CONFIG)
    generator = torch.Generator().manual_seed(3)
    for i in range(3):
        owner = owner_of(teacher, i)
        k, v = (heads_of(linear, 8).double() for linear in (owner.k_proj, owner.v_proj))
        factors = torch.randn(2, 4, 1, dtype=torch.complex128, generator=generator)
        maps = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
        k[2:], v[2:] = to_channels(to_pairs(k[:2]) * factors), maps @ v[:2]
        set_heads(owner.k_proj, k.float())
        set_heads(owner.v_proj, v.float())
    student, mean = (new_student(teacher, {"preset": "gqa", "n_kv_heads": 2}) for _ in range(2))
    start = init_student(student, teacher, MERGE, text)
    torch.testing.assert_close(student(ids), teacher(ids), atol=2e-4, rtol=1e-3)
    assert max(start.errors.values()) < 1e-9
    assert {name.split(" ", 2)[2] for name in start.errors} == {"merged keys", "merged values"}
    init_student(mean, teacher, InitFrom())
    assert loss_of(mean, teacher, ids) > 100 * loss_of(student, teacher, ids)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv", [{"preset": "gqa", "n_kv_heads": 1}, {"preset": "fusedkv", "n_kv_heads": 2}])
def test_a_merged_start_is_below_that_of_means(make_teacher, new_student, text, ids, kv, qk_norm) -> None:
    teacher = make_teacher(CONFIG.model_copy(update={"qk_norm": qk_norm}))
    merged, mean = (new_student(teacher, kv) for _ in range(2))
    method = "fit" if kv["preset"] == "fusedkv" else "copy"
    for student, heads in ((merged, "merge"), (mean, "mean")):
        settings = {"heads": heads, "method": method, "calibration_sequences": 4}
        init_student(student, teacher, InitFrom.model_validate(settings), text)
    assert loss_of(merged, teacher, ids) < loss_of(mean, teacher, ids)


def test_no_shared_head_of_values_has_less_error_on_the_text(make_teacher, new_student, text) -> None:
    """The error |O (v_h - B_h v)|² on the text is the reported one, and no direction lowers it."""
    teacher = make_teacher(CONFIG)
    student = new_student(teacher, {"preset": "gqa", "n_kv_heads": 2})
    owners = teacher_owners(student.plan, teacher)
    with torch.no_grad():
        attention_of(student, 0).q_proj.load_state_dict(attention_of(teacher, 0).q_proj.state_dict())
        attention_of(student, 0).o_proj.load_state_dict(attention_of(teacher, 0).o_proj.state_dict())
    lost = merge_heads(student, teacher, owners, text)["layer 0 merged values"]
    ids = torch.cat([batch["input_ids"] for batch in text])
    x = teacher.blocks[0].attention_norm(teacher.embed(ids)).flatten(0, 1)
    theirs = heads_of(owner_of(teacher, 0).v_proj, 8) @ x.T  # 4, D, N
    mine = heads_of(owners[0].v_proj, 8) @ x.T
    columns = attention_of(teacher, 0).o_proj.weight.unflatten(1, (4, 8)).transpose(0, 1)
    new = attention_of(student, 0).o_proj.weight.unflatten(1, (4, 8)).transpose(0, 1)
    before = [o @ v for o, v in zip(columns, theirs, strict=True)]
    after = [new[h] @ mine[h // 2] for h in range(4)]

    def error(order: list[int], after: list[Tensor]) -> float:
        gaps = [(before[h] - a).square().sum() for h, a in zip(order, after, strict=True)]
        return torch.stack(gaps).sum().item() / sum(b.square().sum().item() for b in before)

    orders = [[a, b, c, d] for a, b, c, d in ([0, 1, 2, 3], [0, 2, 1, 3], [2, 1, 0, 3], [0, 3, 2, 1], [3, 1, 2, 0])]
    order = min(orders, key=lambda order: error(order, after))
    assert error(order, after) == pytest.approx(lost, rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        turned = [a + 0.05 * torch.randn(32, 8, generator=generator) @ mine[h // 2] for h, a in enumerate(after)]
        assert error(order, turned) > lost


def test_a_plan_with_all_heads_or_without_heads_has_nothing_to_merge(make_teacher, new_student, text) -> None:
    teacher = make_teacher(CONFIG)
    same = {"preset": "mha", "kv_norm": False}
    for kv, method in (({"preset": "cla", "kv_norm": False}, "fit"), ({"preset": "mla"}, "svd"), (same, "copy")):
        settings = InitFrom.model_validate({"method": method, "heads": "merge", "calibration_sequences": 4})
        with pytest.raises(UserError, match=r"init.heads is merge, but no layer of model.kv has fewer KV heads"):
            init_student(new_student(teacher, kv), teacher, settings, text)


def test_clusters_hold_the_heads_that_belong_together() -> None:
    together = [[0, 5, 7], [1, 3, 4], [2, 6, 8]]
    affinity = torch.zeros(9, 9)
    for heads in together:
        for a in heads:
            affinity[a, heads] = 1.0
    assert sorted(map(sorted, cluster(affinity, 3))) == together
    assert cluster(torch.zeros(4, 4), 4) == [[0], [1], [2], [3]]
