"""Attention handed over from the teacher layer by layer, and the loss on its outputs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cllm.config import ModelConfig
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.uptrain.attention import attention_outputs, check_attention_loss
from cllm.uptrain.curriculum import set_progress
from cllm.uptrain.decoder import TracedDecoder, attention_of, block_of
from cllm.uptrain.handover import add_handover, changed_layers
from cllm.uptrain.init import init_student

CONFIG = ModelConfig(d_model=32, n_layers=4, n_heads=4, max_seq_len=32, vocab_size=32)
PLANS: dict[str, tuple[dict[str, Any], str, str]] = {
    "cla": ({"preset": "cla", "factor": 4, "kv_norm": False}, "fit", "high"),
    "merged": ({"preset": "fusedkv", "n_kv_heads": 2}, "fit", "high"),
    "latents": ({"preset": "xmla", "bytes": 0.125}, "svd", "high"),
    "from": ({"preset": "swiftkv", "n_lower": 1}, "fit", "high"),
}


def converted(make_teacher, new_student, text, name: str) -> tuple[TracedDecoder, TracedDecoder]:
    kv, method, pairs = PLANS[name]
    teacher = make_teacher(CONFIG)
    student = new_student(teacher, kv, pairs)
    heads = "merge" if name == "merged" else "mean"
    settings = InitFrom.model_validate({"method": method, "heads": heads, "calibration_sequences": 4})
    init_student(student, teacher, settings, text)
    return teacher, student


@pytest.mark.parametrize("name", PLANS)
def test_a_handover_begins_at_the_teacher_and_ends_at_the_student(make_teacher, new_student, text, ids, name) -> None:
    teacher, student = converted(make_teacher, new_student, text, name)
    names = set(student.state_dict())
    with torch.no_grad():
        plain = student(ids)
        add_handover(student, teacher)
        student.train()
        assert set_progress(student, 0, 4) == 0
        torch.testing.assert_close(student(ids), teacher(ids), atol=1e-5, rtol=1e-4)
        set_progress(student, 2, 4)
        middle = student(ids)
        assert not torch.allclose(middle, plain, atol=1e-3)
        assert not torch.allclose(middle, teacher(ids), atol=1e-3)
        assert set_progress(student, 4, 4) == 1
        assert torch.equal(student(ids), plain)
        set_progress(student, 0, 4)
        assert torch.equal(student.eval()(ids), plain), "evaluation is of the student"
    added = {name for name in student.state_dict() if name not in names}
    assert added
    assert all(".curriculum_own." in name for name in added)
    assert not any(p.requires_grad for name, p in student.named_parameters() if name in added)


def test_layers_change_from_the_top_one_after_the_other(make_teacher, new_student, text) -> None:
    teacher, student = converted(make_teacher, new_student, text, "cla")
    assert changed_layers(student, teacher) == [1, 2, 3]
    add_handover(student, teacher)

    def shares(step: int, order: str) -> list[float]:
        set_progress(student, step, 6, order)
        return [float(attention_of(student, i).share) for i in (1, 2, 3)]

    assert [shares(step, "top") for step in (0, 1, 3, 9)] == [[0, 0, 0], [0, 0, 0.5], [0, 0.5, 1], [1, 1, 1]]
    assert shares(2, "bottom") == [1, 0, 0]
    assert shares(3, "together") == [0.5, 0.5, 0.5]


def forward(model: TracedDecoder, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The input of every layer and the output of its attention in a forward pass, the latter from hooks."""
    streams: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = [
        block_of(model, i).attention.register_forward_hook(lambda *args: outputs.append(args[2][0]))
        for i in range(len(model.blocks))
    ]
    model.hidden(ids, states=streams)
    for hook in hooks:
        hook.remove()
    return streams, outputs


@pytest.mark.parametrize("name", PLANS)
def test_each_layers_attention_is_compared_on_the_teachers_stream(make_teacher, new_student, text, ids, name) -> None:
    teacher, student = converted(make_teacher, new_student, text, name)
    with torch.no_grad():
        streams, outputs = forward(teacher, ids)
        theirs = attention_outputs(teacher, streams, ids)
        for again, output in zip(theirs, outputs, strict=True):
            torch.testing.assert_close(again, output)
        mine = attention_outputs(student, streams, ids)
        _, own = forward(student, ids)  # layer 0 sees the same stream in both
        torch.testing.assert_close(mine[0], own[0])
        assert not torch.allclose(mine[3], own[3], atol=1e-4)
    other = [x + (i == 1) * torch.arange(32) for i, x in enumerate(streams)]
    moved = attention_outputs(student, other, ids)[3]  # the stream after layer 0, which all layers of "from" project
    assert torch.allclose(moved, mine[3]) == (1 not in student.plan.reads(3) and name != "from")
    changed = changed_layers(student, teacher)
    gaps = [float((a - b).square().sum()) for a, b in zip(mine, outputs, strict=True)]
    assert all((gap > 1e-6) == (i in changed) for i, gap in enumerate(gaps) if name != "from")
    mine = attention_outputs(
        student, streams, ids
    )  # with gradients, of one layer: not of layers below, but of its owner
    mine[3].sum().backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    owners = {f"blocks.{j}." for j in student.plan.reads(3)}
    assert "blocks.3.attention.o_proj.weight" in trained
    assert all(name.startswith(("blocks.3.", "stream_norms", *owners)) for name in trained)


def test_compiled_attention_is_shared_by_layers_and_the_same(
    make_teacher, new_student, text, ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = converted(make_teacher, new_student, text, "cla")
    with torch.no_grad():
        streams, _ = forward(teacher, ids)
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))

    def outputs_and_gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        outputs = attention_outputs(student, streams, ids)
        attention = [p for name, p in student.named_parameters() if "attention" in name]
        return outputs, list(torch.autograd.grad(sum(x.square().sum() for x in outputs), attention))

    plain = outputs_and_gradients()
    student.compile_blocks()
    for compiled, expected in zip(outputs_and_gradients(), plain, strict=True):
        torch.testing.assert_close(compiled, expected)
    assert graphs.frame_count == 2, "one for the layer that owns, one for the layers that read it"


def test_reads_from_above_are_refused(make_teacher, new_student) -> None:
    with pytest.raises(UserError, match=r"uptrain.loss.attention: layer 1 of model.kv reads a slot from above"):
        check_attention_loss(new_student(make_teacher(CONFIG), {"preset": "lckv"}))


def test_a_teachers_norm_of_keys_does_not_get_another_layers_output(make_teacher, new_student) -> None:
    teacher = make_teacher(CONFIG.model_copy(update={"kv": CONFIG.kv.model_copy(update={"kv_norm": True})}))
    student = new_student(teacher, {"preset": "swiftkv", "kv_norm": True})
    with pytest.raises(UserError, match=r"curriculum_mix is outputs, but layer 2 projects the output of layer 1"):
        add_handover(student, teacher)
