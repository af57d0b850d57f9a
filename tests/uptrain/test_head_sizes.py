"""Students of models whose layers have heads of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.uptrain.curriculum import add_curriculum, set_progress
from cllm.uptrain.init import init_student
from cllm.uptrain.project import teacher_owners
from cllm.uptrain.search import Sharing, fusion_plan, share_plan

TEACHER: dict[str, Any] = {
    "layers": [
        {"layers": [0, 1], "own": {"n_kv_heads": 2}},
        {"layers": [2, 3], "own": {"n_kv_heads": 1, "head_dim": 16}},
    ]
}
SHARED: dict[str, Any] = {
    "layers": [
        {"layers": 0, "own": {"n_kv_heads": 2}},
        {"layers": 1, "keys": {"fuse": [0]}, "values": {"share": 0}},
        {"layers": 2, "own": {"n_kv_heads": 1, "head_dim": 16}},
        {"layers": 3, "keys": {"share": 2}, "values": {"fuse": [2]}},
    ]
}
HALVES: dict[str, Any] = {
    "layers": [
        {"layers": 0, "own": {"n_kv_heads": 2, "tie": "kv"}},
        {"layers": 1, "own": {"n_kv_heads": 2, "input": 0}},
        {"layers": 2, "own": {"n_kv_heads": 1, "head_dim": 16}},
        {"layers": 3, "own": {"n_kv_heads": 1, "head_dim": 16, "only": "keys"}, "values": {"share": 2}},
    ]
}


@pytest.fixture
def teacher(make_teacher, tiny_config):
    return make_teacher(tiny_config(kv=TEACHER, n_layers=4))


@pytest.mark.parametrize("method", ["copy", "mean", "aligned", "ridge", "fit"])
def test_a_student_whose_layers_share_one_size_starts(method, teacher, new_student, ids, text) -> None:
    """The two layers of each size are made alike, so that sharing loses nothing: every method gives the teacher."""
    for low, high in ((0, 1), (2, 3)):
        teacher.blocks[high].load_state_dict(teacher.blocks[low].state_dict())
        teacher.blocks[low].attention.o_proj.weight.zero_()
        teacher.blocks[low].mlp.down_proj.weight.zero_()
    student = new_student(teacher, SHARED)
    init_student(student, teacher, InitFrom(method=method), text)
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-3, rtol=1e-3)


def test_other_forms_are_fitted_in_each_size(teacher, new_student, ids, text) -> None:
    fresh, student = new_student(teacher, HALVES), new_student(teacher, HALVES)
    init_student(student, teacher, InitFrom(method="fit"), text)
    with torch.no_grad():
        error, before = ((s(ids) - teacher(ids)).square().mean() for s in (student, fresh))
    assert error < before / 2


def test_a_curriculum_begins_at_the_layers_own_keys_and_values(teacher, new_student, ids) -> None:
    fused = {"keys": {"fuse": [2], "granularity": "complex"}, "values": {"fuse": [2], "granularity": "matrix"}}
    student = new_student(teacher, {"layers": [*SHARED["layers"][:3], {"layers": 3, **fused}]})
    add_curriculum(student, teacher_owners(student.plan, teacher))
    init_student(student, teacher, InitFrom(method="copy"), ())
    student.train()
    set_progress(student, 0, 4)
    with torch.no_grad():
        torch.testing.assert_close(student(ids), teacher(ids), atol=1e-5, rtol=1e-4)


REFUSED = {
    "reads": (
        {"layers": [{"layers": "0-3", "own": {"n_kv_heads": 1}}]},
        "copy",
        "layer 2 reads heads of model.head_dim channels, but the model that init.from names has 16 there",
    ),
    "owns": (
        {"layers": [*SHARED["layers"][:2], {"layers": [2, 3], "own": {"n_kv_heads": 1, "head_dim": 6}}]},
        "copy",
        "layer 2 reads heads of 6 channels, but the model that init.from names has 16 there",
    ),
    "shares with a layer of another size": (
        {
            "layers": [
                {"layers": [0, 1], "own": {"n_kv_heads": 1}},
                {"layers": [2, 3], "keys": {"share": 1}, "values": {"share": 0}},
            ]
        },
        "copy",
        "layer 2 reads heads of model.head_dim channels, but the model that init.from names has 16 there",
    ),
    "latents": (
        {"preset": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        "svd",
        "layer 2 reads a latent, but the model that init.from names has heads of 16 channels there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_size_is_refused_by_layer(case, teacher, new_student, text) -> None:
    kv, method, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        init_student(new_student(teacher, kv), teacher, InitFrom(method=method), text)
    assert message in str(error.value)


def test_a_search_compares_layers_of_one_size(teacher, text) -> None:
    message = "init.from: layer 2 has 1 KV head of 16 and layer 0 2 KV heads; allowed"
    with pytest.raises(UserError, match=message):
        share_plan(teacher, text, Sharing(owners=2))
    with pytest.raises(UserError, match=message):
        fusion_plan(teacher, teacher.plan, text, ridge=1e-4)
