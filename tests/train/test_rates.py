"""Learning rates of parts of the model: which weight has which, with both optimizers, over the schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cllm.config import Config
from cllm.config.uptraining import TRAINED
from cllm.errors import UserError
from cllm.model.parts import PARTS, parts_of
from cllm.model.sizes import build_decoder
from cllm.train.optim import make_optimizer
from cllm.train.schedule import Schedule
from cllm.uptrain.trainable import make_trainable

STILL = ("--optim.lr", "1e-3", "--optim.min_lr", "1e-3", "--optim.warmup_steps", "0", "--model.vocab_size", "320")
RATES = (*STILL, "--optim.fusion_lr_multiplier", "7", "--optim.rates.kv", "3", "--optim.rates.outputs", "0.5")
EXPECTED = {"kv": 3e-3, "queries": 1e-3, "outputs": 5e-4, "fusion": 7e-3, "rest": 1e-3}


def test_the_parts_of_a_model_by_name(tiny: Callable[..., Config]) -> None:
    latents = build_decoder(tiny("--model.kv.preset", "mla", "--model.vocab_size", "320").model)
    fused = build_decoder(tiny("--model.kv.preset", "fusedkv", "--model.vocab_size", "320").model)
    stream = build_decoder(tiny("--model.kv.preset", "swiftkv", "--model.vocab_size", "320").model)
    found: dict[str, str] = {}
    for model in (latents, fused, stream):
        parts = parts_of(model)
        assert len(parts) == len(list(model.parameters()))
        found |= {name: parts[id(p)] for name, p in model.named_parameters()}
    assert set(found.values()) == set(PARTS)
    wanted = {
        "blocks.0.attention.owner.down_proj.weight": "kv",
        "blocks.0.attention.kv_up_proj.weight": "kv",
        "blocks.0.attention.owner.k_proj.weight": "kv",
        "stream_norms.1.weight": "kv",
        "blocks.3.attention.q_proj.weight": "queries",
        "blocks.3.attention.o_proj.weight": "outputs",
        "blocks.3.attention.keys.weight": "fusion",
        "blocks.3.attention_norm.weight": "rest",
        "blocks.3.mlp.gate_proj.weight": "rest",
        "embed.weight": "rest",
        "head.weight": "rest",
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_the_rate_of_its_part_and_its_decay(tiny: Callable[..., Config], name: str) -> None:
    config = tiny("--model.kv.preset", "fusedkv", *RATES, "--optim.name", name)
    model = build_decoder(config.model)
    optimizer, parts = make_optimizer(model, config.optim), parts_of(model)
    schedule = Schedule(optimizer, 10, config.optim)
    optimizer.step()  # without gradients
    schedule.step()
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = parts[id(parameter)]
            assert group["lr"] == pytest.approx(EXPECTED[part]), (group["name"], part)
            decays = parameter.ndim >= 2 and part != "fusion"
            assert group["weight_decay"] == (config.optim.weight_decay if decays else 0)
            seen.add(id(parameter))
    assert seen == {id(p) for p in model.parameters()}
    assert {"decay_kv", "decay_outputs"} & {g["name"] for g in optimizer.param_groups} or name == "muon"


def test_a_rate_changes_the_steps_of_its_part_alone(tiny: Callable[..., Config]) -> None:
    """The first step of AdamW moves every weight by its rate."""
    moved = {}
    for rate in ("1", "3"):
        config = tiny("--optim.weight_decay", "0", *STILL, "--optim.rates.kv", rate)
        torch.manual_seed(0)
        model = build_decoder(config.model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        make_optimizer(model, config.optim).step()
        moved[rate] = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
    for name, distance in moved["1"].items():
        assert distance == pytest.approx(1e-3, rel=1e-3)
        assert moved["3"][name] == pytest.approx(3e-3 if ".owner." in name else 1e-3, rel=1e-3)


@pytest.mark.parametrize("trainable", ["all", *TRAINED])
def test_a_rate_of_a_frozen_part_is_an_error(tiny: Callable[..., Config], trainable: str) -> None:
    words = ("--init.from", "runs/teacher", "--uptrain.trainable", trainable, "--model.vocab_size", "320")
    config = tiny("--model.kv.preset", "fusedkv", *words)
    model = build_decoder(config.model)
    make_trainable(model, config)
    parts = parts_of(model)
    trained = {parts[id(p)] for p in model.parameters() if p.requires_grad} - {"fusion"}
    for part in set(PARTS) - {"fusion"}:
        rate = (f"--optim.rates.{part}", "2")
        if part in trained:
            assert getattr(tiny(*words, *rate).optim.rates, part) == 2
        else:
            message = rf"optim.rates.{part} is 2, but uptrain.trainable is {trainable}, .* allowed with it: rates of kv"
            with pytest.raises(UserError, match=message):
                tiny(*words, *rate)
    assert trained >= ({"kv"} if trainable != "all" else {"kv", "queries", "outputs", "rest"})
