"""Loops: layers of later turns have the weights of the first, under one name, and other plans are refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.families.write import _check_plan
from cllm.hub.model import CLLMForCausalLM
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder, count_parameters, layer_flops_per_token
from cllm.plan.describe import plan_table
from cllm.train.float8 import convert_blocks
from cllm.train.strategy import make_strategy

YOCO_U = {"preset": "yoco_u", "window": 3}  # of 8 layers, 2 are in each of 3 turns
OWN = {"n_kv_heads": 2}
TWICE = {"layers": 0, "times": 2}
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}


def test_turns_have_one_set_of_weights_with_one_name(tiny_config):
    torch.manual_seed(0)
    model = build_decoder(tiny_config(kv=YOCO_U))
    names = [name for name, _ in model.named_parameters()]
    assert list(model.state_dict()) == names
    assert {int(name.split(".")[1]) for name in names if name.startswith("blocks.")} == {0, 1, 6, 7}
    for i in (2, 3, 4, 5):
        mine, first = (dict(model.blocks[j].named_parameters()) for j in (i, i % 2))
        assert mine.keys() == first.keys()
        assert all(mine[name] is first[name] for name in mine)
    unshared = count_parameters(Decoder(tiny_config(kv={"preset": "yoco", "n_lower": 6, "window": 3})))
    layer = sum(p.numel() for p in model.blocks[0].parameters())
    assert count_parameters(model) == unshared - 4 * layer
    flops = layer_flops_per_token(model, 16)
    assert flops[:6] == flops[:1] * 6, "each turn computes"
    other = Decoder(tiny_config(kv=YOCO_U))
    other.load_state_dict(model.state_dict())
    ids = torch.arange(9)[None]
    expected = model(ids)
    assert torch.equal(other(ids), expected)
    assert torch.equal(copy.deepcopy(model)(ids), expected)
    with torch.no_grad():
        copy.deepcopy(model).blocks[4].mlp.up_proj.weight.zero_()
        assert torch.equal(model(ids), expected)
    assert "layers 2-5 have the weights of layers 0-1: a loop of 3 turns" in plan_table(model.plan)


def test_match_params_widens_the_layers_that_exist(tiny_config):
    config = tiny_config(d_model=48, kv=YOCO_U, match_params=True)
    target = count_parameters(Decoder(tiny_config(d_model=48)))
    assert count_parameters(build_decoder(config)) == pytest.approx(target, rel=0.005)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (
            {"layers": [{"layers": "0-7", "own": {}}], "loop": {"layers": "0-3", "times": 3}},
            r"kv\.loop: 3 turns of 4 layers from layer 0 end at layer 11, but .* allowed: .* 12 or more",
        ),
        (
            {"layers": [{"layers": "0-7", "own": {}}], "loop": {"layers": [0, 2], "times": 2}},
            r"kv\.loop\.layers is \[0, 2\]; allowed: layers in a row",
        ),
        (
            {"layers": [{"layers": "0-7", "own": {}}], "loop": {"layers": -1, "times": 2}},
            r"kv\.loop\.layers is -1; allowed: layers in a row from 0 on",
        ),
        ({"layers": [{"layers": "0-7", "own": {}}], "loop": {"layers": 0, "times": 1}}, r"kv\.loop\.times"),
        (
            {"layers": [{"layers": 0, "own": OWN}, {"layers": "1-7", "own": {}}], "loop": {"layers": 0, "times": 2}},
            "layer 1: owns 4 KV heads, and layer 0, whose weights it has in model.kv.loop, 2 KV heads",
        ),
        (
            {
                "layers": [
                    {"layers": [0, 2, 3, 4, 5, 6, 7], "own": {}},
                    {"layers": 1, "read": {"share": 0}},
                ],
                "loop": {"layers": 1, "times": 2},
            },
            "layer 2: owns 4 KV heads, and layer 1, .*, owns nothing; allowed: nothing",
        ),
        (
            {
                "layers": [{"layers": 0, "retention": {}}, {"layers": "1-7", "own": {}}],
                "loop": {"layers": 0, "times": 2},
            },
            "layer 1: owns 4 KV heads, and layer 0, .*, recurrent state; allowed: the same, or nothing",
        ),
        (
            {
                "layers": [
                    {"layers": [0, 3, 4, 5, 6, 7], "own": {}},
                    {"layers": 1, "latent": LATENT},
                    {"layers": 2, "read": {"share": 0}},
                ],
                "loop": {"layers": 1, "times": 2},
            },
            r"layer 2: reads 4 KV heads, and layer 1, .*, latent 6 \+ 2; allowed: slots of the same kind",
        ),
        ({"preset": "mha", "loop": {"layers": 0, "times": 2}}, r"kv\.loop"),
        ({"preset": "yoco_u", "times": 9}, "n_layers is 8, which counts 9 turns of 0 lower layers .*; allowed: 10 or"),
        ({"preset": "yoco_u", "n_lower": 3}, "n_layers is 8, which counts 3 turns of 3 lower layers .*; allowed: 10"),
    ],
)
def test_loops_whose_turns_cannot_share_weights_are_refused(kv, message):
    with pytest.raises(UserError, match=message):
        validate(ModelConfig, {"d_model": 32, "n_layers": 8, "n_heads": 4, "kv": kv})


def test_what_loads_or_replaces_weights_layer_by_layer_refuses_a_loop(tiny_config, monkeypatch):
    config = tiny_config(kv=YOCO_U)
    with pytest.raises(UserError, match=r"kv\.loop: layers 2-5 have the weights"):
        _check_plan(config.plan())
    with pytest.raises(UserError, match=r"train\.fp8 is rowwise, but layers 2-5"):
        convert_blocks(Decoder(config), "rowwise", emulate=True)
    monkeypatch.setattr("cllm.train.strategy.check_zero", lambda launch: None)
    zero = SimpleNamespace(zero_stage=2, strategy="zero2")
    with pytest.raises(UserError, match=r"train\.strategy is zero2, but layers 2-5 .* allowed: auto, single, ddp"):
        make_strategy(zero, SimpleNamespace(model=config))


def test_adapters_in_a_loop_are_refused(tiny_config):
    peft = pytest.importorskip("peft")
    ids = torch.arange(6)[None]
    for layers, fails in (([0, 7], True), ([6, 7], False)):
        model = CLLMForCausalLM(CLLMConfig(model=tiny_config(kv=YOCO_U)))
        options = {"layers_to_transform": layers, "layers_pattern": "blocks", "target_modules": ["q_proj"]}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        if not fails:
            assert adapted(input_ids=ids).logits.shape == (1, 6, 32)
            continue
        with pytest.raises(UserError, match=r"blocks\.0\.attention\.q_proj was replaced .* layer 2, a later turn"):
            adapted(input_ids=ids)
