"""Students of models like Gemma 3: slots that keep a window rotate with another RoPE base than the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.hub.export import export_run
from cllm.hub.loading import load_exported
from cllm.runs import load_run
from cllm.train.run import train
from cllm.uptrain.calibrate import observe
from cllm.uptrain.complete import load_config
from cllm.uptrain.curriculum import add_curriculum, set_progress
from cllm.uptrain.decoder import owner_of
from cllm.uptrain.handover import add_handover
from cllm.uptrain.init import init_student
from cllm.uptrain.project import teacher_owners
from cllm.uptrain.search import Sharing, share_plan
from cllm.uptrain.teacher import check_student, load_teacher, student_model

WINDOW, FULL = {"own": {"n_kv_heads": 2}, "window": 6}, {"own": {"n_kv_heads": 2}}
TEACHER: dict[str, Any] = {"layers": [{"layers": [0, 1], **WINDOW}, {"layers": [2, 3], **FULL}]}
SHARED: dict[str, Any] = {
    "layers": [
        {"layers": 0, **WINDOW},
        {"layers": 1, "keys": {"fuse": [0]}, "values": {"share": 0}, "window": 6},
        {"layers": 2, **FULL},
        {"layers": 3, "keys": {"share": 2}, "values": {"fuse": [2]}},
    ]
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GEMMA: dict[str, Any] = {"norms_after": True, "mlp_activation": "gelu_tanh", "scale_embeddings": True, "qk_norm": True}
ROPE = {"theta": 1000.0, "windowed_theta": 10.0}


@pytest.fixture
def teacher(make_teacher, tiny_config):
    return make_teacher(tiny_config(kv=TEACHER, n_layers=4, rope=ROPE, **GEMMA))


@pytest.mark.parametrize("method", ["copy", "mean", "aligned", "ridge", "fit"])
def test_a_student_whose_layers_share_one_kind_starts(
    method, make_teacher, tiny_config, new_student, ids, text
) -> None:
    """The two layers of each kind are made alike, so that sharing loses nothing: every method gives the teacher.

    Ridge regresses keys after their norm, which is not exact with `qk_norm`.
    """
    options = GEMMA | {"qk_norm": method != "ridge"}
    teacher = make_teacher(tiny_config(kv=TEACHER, n_layers=4, rope=ROPE, **options))
    for low, high in ((0, 1), (2, 3)):
        teacher.blocks[high].load_state_dict(teacher.blocks[low].state_dict())
        teacher.blocks[low].after_attention_norm.weight.zero_()
        teacher.blocks[low].after_mlp_norm.weight.zero_()
    student = new_student(teacher, SHARED)
    init_student(student, teacher, InitFrom(method=method), text)
    torch.testing.assert_close(student(ids), teacher(ids), atol=1e-3, rtol=1e-3)


def test_keys_on_a_text_are_those_of_the_pass(teacher, text, monkeypatch) -> None:
    """With the base of each layer: what calibration sees is what the layer has written."""
    written = []
    for i in range(4):
        forward = owner_of(teacher, i).forward

        def recorded(*arguments: Any, forward: Any = forward) -> Any:
            written.append(forward(*arguments))
            return written[-1]

        monkeypatch.setattr(owner_of(teacher, i), "forward", recorded)
    seen = next(iter(observe(teacher, text[:1])))
    expected = [slot.k for slot in written]
    for i in range(4):
        keys, _ = seen.slot(i, owner_of(teacher, i))
        assert torch.equal(keys, expected[i].flatten(0, 1).permute(1, 2, 0))


@pytest.mark.parametrize("mix", ["slots", "outputs"])
def test_a_curriculum_begins_at_the_teacher(mix, teacher, new_student, ids, text) -> None:
    student = new_student(teacher, SHARED)
    if mix == "slots":
        add_curriculum(student, teacher_owners(student.plan, teacher))
    init_student(student, teacher, InitFrom(method="copy"), ())
    if mix == "outputs":
        add_handover(student, teacher)
    student.train()
    set_progress(student, 0, 4)
    with torch.no_grad():
        torch.testing.assert_close(student(ids), teacher(ids), atol=1e-4, rtol=1e-3)


def test_latents_keep_the_highest_frequencies_of_both_bases(teacher, new_student, ids, text) -> None:
    kv = {"layers": [{"layers": [0, 1], "latent": LATENT, "window": 6}, {"layers": [2, 3], "latent": LATENT}]}
    rope = student_model(teacher.config, kv, rope_pairs="high")["rope"]
    assert (rope["theta"], rope["windowed_theta"]) == (1000.0**0.5, 10.0**0.5)
    student = new_student(teacher, kv)
    init_student(student, teacher, InitFrom(method="svd", rope_pairs="high"), text)
    assert student(ids).isfinite().all()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "reads": (
        {"layers": [{"layers": 0, **WINDOW}, {"layers": [1, 2, 3], "read": {"share": 0}, "window": 6}]},
        "copy",
        "layer 2 reads a slot that keeps a window, but the model that init.from names has one that keeps all tokens",
    ),
    "all": (
        {"layers": [{"layers": [0, 1, 2, 3], **FULL}]},
        "copy",
        "layer 0 reads a slot that keeps all tokens, but the model that init.from names has one that keeps a window",
    ),
    "latents": (
        {"layers": [{"layers": [0, 1, 2, 3], "latent": LATENT}]},
        "svd",
        "layer 0 reads a slot that keeps all tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_base_is_refused_by_layer(case, teacher, new_student, text) -> None:
    kv, method, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        init_student(new_student(teacher, kv), teacher, InitFrom(method=method), text)
    assert message in str(error.value)


def test_keys_that_others_read_have_the_base_of_their_layer(make_teacher, tiny_config, new_student, text) -> None:
    """Layer 2 reads all tokens, as before, but owns a window for layer 3."""
    layers = [{"layers": [0, 3], **WINDOW}, {"layers": [1, 2], **FULL}]
    teacher = make_teacher(tiny_config(kv={"layers": layers}, n_layers=4, rope=ROPE, **GEMMA))
    kv = {
        "layers": [
            *({"layers": 0, **WINDOW}, {"layers": 1, **FULL}),
            {"layers": 2, **WINDOW, "keys": {"share": 1}, "values": {"share": 1}},
            {"layers": 3, "read": {"share": 2}, "window": 6},
        ]
    }
    with pytest.raises(UserError, match="layer 2 owns a slot that keeps a window, but"):
        init_student(new_student(teacher, kv), teacher, InitFrom(method="copy"), text)


def test_a_shorter_context_is_no_advice_where_windows_have_a_base(tiny_config) -> None:
    config = tiny_config(kv=TEACHER, n_layers=4, rope=ROPE, **GEMMA)
    student = config.model_validate(student_model(config, {"preset": "gqa", "n_kv_heads": 2}, rope_pairs="uniform"))
    with pytest.raises(UserError, match=r"write the plan as model.kv.layers with `window: 6`$"):
        check_student(student, config, path=Path("gemma"), rope_pairs="uniform")


def test_values_have_no_base(teacher, new_student, text) -> None:
    half = {"layers": 3, "own": {"n_kv_heads": 2, "only": "values"}, "keys": {"share": 2}, "window": 6}
    init_student(new_student(teacher, {"layers": [*SHARED["layers"][:3], half]}), teacher, InitFrom(method="fit"), text)


def test_a_search_shares_layers_of_one_kind(teacher, text) -> None:
    plan = share_plan(teacher, text, Sharing(owners=2))
    assert plan.owners == (0, 2)


def test_outputs_behind_a_norm_are_not_refitted(teacher, new_student, text) -> None:
    settings = InitFrom.model_validate({"method": "fit", "outputs": "shared"})
    with pytest.raises(UserError, match=r"init\.outputs refits .* model\.norms_after .*; allowed: none"):
        init_student(new_student(teacher, SHARED), teacher, settings, text)


def test_a_gemma_3_is_uptrained_into_layers_that_share_in_pairs(prepared: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8}
    kinds = ["sliding_attention"] * 4 + ["full_attention"] * 2
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds, query_pre_attn_scalar=12)).eval()
    model.save_pretrained(tmp_path / "gemma")
    ids = torch.randint(1, 320, (2, 32))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(load_teacher(tmp_path / "gemma").decoder(ids), expected, atol=1e-4, rtol=1e-4)
    entries = []
    for i in (0, 2, 4):
        window = {"window": 8} if i < 4 else {}
        entries += [
            {"layers": i, "own": {"n_kv_heads": 2}, **window},
            {"layers": i + 1, "read": {"share": i}, **window},
        ]
    section = {
        "model": {"kv": {"layers": entries}},
        "data": {"path": str(prepared), "seq_len": 32},
        "init": {"from": str(tmp_path / "gemma"), "method": "fit", "calibration_sequences": 4},
        "train": {"accelerator": "cpu", "steps": 8, "micro_batch": 2, "global_batch": 2, "log_every": 1},
        "optim": {"warmup_steps": 0, "lr": 1e-3},
        "uptrain": {"loss": {"kl": 1.0}},
        "runs_dir": str(tmp_path / "runs"),
        "name": "gemma",
    }
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(section))
    run = train(load_config([tmp_path / "student.yaml"], []))
    losses = [row["train/loss"] for row in run.metrics() if "train/loss" in row]
    assert losses[-1] < losses[0]
    trained, saved, _ = load_run(run.path)
    assert saved.model.rope.windowed_theta == 10000.0
    assert trained.plan.owners == (0, 2, 4)
    export_run(run.path, tmp_path / "out")
    exported = load_exported(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, trained.eval()(ids))
