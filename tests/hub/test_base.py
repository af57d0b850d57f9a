"""The base model: the decoder without its head, as transformers and what builds on it call it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.hub.base import CLLMModel
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.plan.presets import preset_names

IDS = torch.tensor([[5, 9, 1, 30, 7, 2, 11], [4, 4, 8, 21, 3, 17, 6]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_it_computes_what_the_base_model_of_llama_does(llama_twin) -> None:
    ours, llama = llama_twin()
    for mask in (torch.ones_like(IDS), LEFT, LEFT.flip(1)):
        with torch.no_grad():
            found = ours.base_model(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
            expected = llama.base_model(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
        real = mask > 0
        torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], **CLOSE)
        assert len(found.hidden_states) == len(expected.hidden_states) == 3
        for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state[real], other[real], **CLOSE)


def test_losses_from_the_base_model_are_those_of_the_model(hub_model) -> None:
    """As TRL's trainers compute them: hidden states, shifted, through the weight of the head."""
    model = hub_model().train()
    hidden = model.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).last_hidden_state
    logits = hidden[:, :-1] @ model.get_output_embeddings().weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, model(IDS, labels=IDS).loss)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_it_has_the_weights_of_the_model_and_no_names_of_its_own(hub_model) -> None:
    model = hub_model(n_layers=2)
    before = list(model.state_dict())
    base = model.base_model
    assert base is model.base_model is model.get_decoder()
    assert isinstance(base, CLLMModel)
    assert base.base_model is base.get_decoder() is base
    assert list(model.state_dict()) == before == list(dict(model.named_parameters()))
    assert list(base.layers) == list(model.model.blocks)
    assert base.get_input_embeddings() is model.get_input_embeddings() is model.model.embed
    copied = copy.deepcopy(model)
    assert copied.base_model.model is copied.model is not model.model
    model.set_decoder(copied.base_model)
    assert model.base_model.model is copied.model


def test_it_goes_on_from_a_cache(hub_model) -> None:
    base = hub_model().base_model
    with torch.no_grad():
        entire = base(IDS).last_hidden_state
        output = base(IDS[:, :5])
        assert isinstance(output.past_key_values, KVCache)
        after = base(IDS[:, 5:], past_key_values=output.past_key_values).last_hidden_state
    torch.testing.assert_close(after, entire[:, 5:], **CLOSE)
    hidden, cache = base(IDS, return_dict=False)
    assert (hidden.shape, cache.get_seq_length()) == ((2, 7, 24), 7)
    with pytest.raises(UserError, match="output_attentions is not supported"):
        base(IDS, output_attentions=True)
    with pytest.raises(UserError, match="65 tokens, but the model's context"):
        base(torch.ones(1, 65, dtype=torch.long))


def test_automodel_loads_it_from_either_kind_of_folder(hub_model, tmp_path) -> None:
    model = hub_model(tie_embeddings=True)
    for source in (model, model.base_model):
        folder = tmp_path / type(source).__name__
        source.save_pretrained(folder)
        base = AutoModel.from_pretrained(folder)
        assert isinstance(base, CLLMModel)
        assert not any("head" in name for name, _ in base.named_parameters())
        assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "again")
    assert not any("head" in name for name in load_file(tmp_path / "again" / "model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").model.head.weight.shape == (32, 24)  # it is tied


def test_only_tensors_that_exist_are_left_out_of_saved_folders(hub_model) -> None:
    """A base model has a head where it is a view of a model that has one."""
    model = hub_model(n_layers=2)
    for base, left_out in ((model.base_model, {"model.head.weight"}), (AutoModel.from_config(model.config), set())):
        assert set(base._keys_to_ignore_on_save or ()) == left_out <= base.state_dict().keys()


def test_a_base_model_has_no_head_to_load(hub_model, tmp_path) -> None:
    config = hub_model(n_layers=2).config
    base = AutoModel.from_config(config)
    base.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing: model\.head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", preset_names())
def test_embeddings_are_tokens_and_states_the_inputs_of_layers(name, hub_model, preset_config) -> None:
    """Of layers that are computed several times, the last input."""
    model = hub_model(config=preset_config(name))
    seen = {}
    for i, block in enumerate(model.model.blocks):
        block.register_forward_pre_hook(lambda _, inputs, i=i: seen.update({i: inputs[0]}))
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        expected = model(IDS, attention_mask=LEFT, use_cache=False).logits
        output = model(inputs_embeds=embeds, attention_mask=LEFT, output_hidden_states=True, logits_to_keep=1)
        some = model(IDS, attention_mask=LEFT, output_hidden_states=[0, -1], use_cache=False).hidden_states
    torch.testing.assert_close(output.logits, expected[:, -1:], **CLOSE)
    states = output.hidden_states
    assert [state.shape for state in states] == [embeds.shape] * (len(model.model.blocks) + 1)
    torch.testing.assert_close(states[-1] @ model.model.head.weight.T, expected, **CLOSE)
    assert torch.equal(states[0], embeds)
    assert [state is None for state in some] == [False, *[True] * (len(states) - 2), False]
    model(IDS, use_cache=False, output_hidden_states=True)
    for i, state in enumerate(model(IDS, use_cache=False, output_hidden_states=True).hidden_states[:-1]):
        torch.testing.assert_close(state, seen[i], msg=str(i))


def test_embeddings_have_gradients(llama_twin) -> None:
    gradients = []
    for model in llama_twin():
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        output = model(inputs_embeds=embeds, labels=IDS, output_hidden_states=True, use_cache=False)
        output.hidden_states[1].retain_grad()
        output.loss.backward()
        gradients.append((embeds.grad, output.hidden_states[1].grad))
    torch.testing.assert_close(*gradients, **CLOSE)


def test_early_exit_gives_no_hidden_states(hub_model) -> None:
    with pytest.raises(UserError, match="but output_hidden_states wants more"), torch.no_grad():
        hub_model(n_layers=2)(IDS, early_exit=True, logits_to_keep=1, output_hidden_states=True)


def test_precision_is_kept_where_there_is_something_to_keep(tiny_config) -> None:
    """Fusion weights, of plans that have some."""
    for kv, names in (({"preset": "mha"}, set()), ({"preset": "fusedkv"}, {"keys", "values"})):
        model = CLLMForCausalLM(CLLMConfig(model=tiny_config(kv=kv)))
        assert model._keep_in_fp32_modules_strict == {f"attention.{name}.weight" for name in names}
