"""PEFT's adapters, by its own defaults and tables: they train what they say, and what they train is in the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cllm.hub.model import CLLMForCausalLM

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 1, 30, 7, 2, 11], [4, 4, 8, 21, 3, 17, 6]])
PLANS = ["fusedkv", "yoco", "lckv"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """PEFT draws adapters from torch's global generator."""
    torch.manual_seed(0)


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def _train(model: Any, steps: int = 2) -> None:
    """A few steps: the loss of each is the cross-entropy of its logits, and the last is lower than the first."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    losses = []
    for _ in range(steps):
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, logits_to_keep=0)
        virtual = output.logits.shape[1] - IDS.shape[1]  # tokens before the first one, which the last of them predicts
        predicted, targets = output.logits[:, max(virtual - 1, 0) : -1], IDS if virtual else IDS[:, 1:]
        expected = F.cross_entropy(predicted.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(output.loss, expected)
        losses.append(output.loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_lora_knows_what_to_change(name, options, hub_model, preset_config) -> None:
    """Queries and values, as of Llama; a layer that owns no values has no adapter on them."""
    base = hub_model(config=preset_config(name))
    expected = {n for n, _ in base.named_modules() if n.endswith(("q_proj", "v_proj"))}
    model = peft.get_peft_model(base, _lora(**options))
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted == {f"base_model.model.{n}" for n in expected}
    _train(model)


def _merged_by_hand(adapted: Any) -> CLLMForCausalLM:
    """A model without adapters: W + s B A (LoRA, equation 3), or m (W + s B A) / |W + s B A| by rows (DoRA, 5)."""
    plain = copy.deepcopy(adapted.get_base_model())
    for name, module in list(plain.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        weight = module.base_layer.weight + module.scaling["default"] * b @ a
        if module.use_dora["default"]:
            magnitude = module.lora_magnitude_vector["default"].weight
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.detach())
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer)
    return plain


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_losses_of_adapters_are_those_of_merged_weights(name, options, hub_model, preset_config) -> None:
    """Before and after a step, and the gradients of weights that a matrix is merged from: dL/dB = s dL/dW A^T."""
    config = _lora(lora_alpha=3, **options)
    model = peft.get_peft_model(hub_model(config=preset_config(name)), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        plain = _merged_by_hand(model)
        assert not any("lora" in n for n, _ in plain.named_parameters())
        expected = F.cross_entropy(plain.model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        torch.testing.assert_close(loss, expected)
        optimizer.zero_grad()
        loss.backward()
        expected.backward()
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A") and not module.use_dora["default"]:
                merged = plain.get_submodule(path).weight.grad
                by_hand = module.scaling["default"] * merged @ module.lora_A["default"].weight.T
                torch.testing.assert_close(module.lora_B["default"].weight.grad, by_hand, atol=1e-5, rtol=1e-4)
        optimizer.step()


def test_every_table_of_peft_that_knows_llama_knows_cllm() -> None:
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and "llama" in table:
            assert "cllm" in table, name
    norms = constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING["cllm"]
    assert norms == ["attention_norm", "mlp_norm", "norm"]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens(name, kind, hub_model, preset_config) -> None:
    model = hub_model(config=preset_config(name))
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with torch.no_grad():
        found = tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        embeds = torch.cat((tuned.get_prompt(2), model.get_input_embeddings()(IDS)), dim=1)
        torch.testing.assert_close(found, model.model.head(model.model.hidden(None, inputs_embeds=embeds)))
    _train(tuned)
    new = tuned.eval().generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, eos_token_id=None)
    assert new.shape == (2, 10)


def _tied(model: CLLMForCausalLM) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("names", [["embed"], ["head"], ["embed", "head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_entire_modules(plan, names, tied, hub_model, preset_config) -> None:
    base = hub_model(config=preset_config(plan, n_layers=4, tie_embeddings=tied))
    model = peft.get_peft_model(base, _lora(target_modules=["q_proj"], modules_to_save=names))
    before = {n: p.clone() for n, p in model.named_parameters()}
    _train(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and "lora" not in n}
    assert changed == {f"base_model.model.model.{n}.modules_to_save.default.weight" for n in names}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("names", [["embed"], ["head"], ["embed_tokens"]])
def test_tied_weights_stay_tied_where_that_is_asked(plan, names, hub_model, preset_config) -> None:
    base = hub_model(config=preset_config(plan, n_layers=4, tie_embeddings=True))
    start = base.get_input_embeddings().weight.clone()
    config = _lora(target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True)
    model = peft.get_peft_model(base, config)
    _train(model)
    merged = model.merge_and_unload().eval()
    assert _tied(merged)
    assert not torch.equal(merged.get_input_embeddings().weight, start)
    with torch.no_grad():
        output = merged(IDS, labels=IDS)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[1, 30], {"embed": [1, 30]}])
def test_some_tokens(plan, tied, indices, hub_model, preset_config) -> None:
    base = hub_model(config=preset_config(plan, n_layers=4, tie_embeddings=tied))
    start = base.get_input_embeddings().weight.clone()
    model = peft.get_peft_model(base, _lora(target_modules=["q_proj"], trainable_token_indices=indices))
    _train(model)
    with torch.no_grad():
        adapted = model.eval()(input_ids=IDS, use_cache=False).logits
    merged = model.merge_and_unload().eval()
    assert _tied(merged) == tied
    rows = (merged.get_input_embeddings().weight != start).any(1).nonzero().flatten().tolist()
    assert rows == [1, 30]
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS, use_cache=False).logits, adapted, atol=1e-5, rtol=1e-5)
