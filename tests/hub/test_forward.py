"""One forward pass: the loss, padding, packed documents, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.model import decoder as decoder_module

IDS = torch.tensor([[5, 9, 1, 30, 7, 2, 11], [4, 4, 8, 21, 3, 17, 6]])
ACYCLIC = ["mla", "cla", "yoco", "fusedkv", "trailing"]


def _logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


# ---- loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_shifts_labels_and_skips_ignored_ones(hub_model) -> None:
    model = hub_model()
    labels = IDS.clone()
    labels[0, 3:5] = -100
    logits = _logits(model, IDS, use_cache=False)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(IDS, labels=labels).loss, expected)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(IDS, labels=IDS.flip(1), shift_labels=shifted).loss, expected)
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    for count in (7, torch.tensor(7)):
        torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=count).loss, summed / 7)


def test_training_computes_logits_only_when_asked(hub_model) -> None:
    model = hub_model().train()
    output = model(IDS, labels=IDS)
    assert output.keys() == {"loss"}
    assert model(IDS, labels=IDS, logits_to_keep=0).logits.shape == (2, 7, 32)
    evaluated = model.eval()(IDS, labels=IDS)
    assert evaluated.keys() == {"loss", "logits"}
    assert evaluated.loss == output.loss


def test_gradients_are_those_of_the_decoder(hub_model) -> None:
    model = hub_model().train()
    model(IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    model.zero_grad()
    model.model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(hub_model, monkeypatch) -> None:
    model = hub_model().train()
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []
    original = decoder_module.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(decoder_module, "checkpoint", counted)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 8
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    model.gradient_checkpointing_disable()
    model(IDS, labels=IDS)
    assert len(calls) == 8
    with pytest.raises(UserError, match="use_reentrant true loses the gradients of slots"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_layers_recompute_themselves_as_those_of_transformers(hub_model) -> None:
    """Every other layer, by the function that was given, but not where a cache is written to."""
    model = hub_model(n_layers=4).train()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers == list(model.model.blocks)
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []

    def recompute(function, *inputs):
        calls.append(1)
        return checkpoint(function, *inputs, use_reentrant=False)

    model._set_gradient_checkpointing(True, recompute, every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    cache = model(IDS, use_cache=True).past_key_values
    assert (len(calls), cache.get_seq_length()) == (2, 7)
    model.eval()(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2


def test_logits_to_keep(hub_model) -> None:
    model = hub_model()
    logits = _logits(model, IDS, use_cache=False)
    for use_cache in (False, True):
        for keep in (1, 3):
            kept = _logits(model, IDS, logits_to_keep=keep, use_cache=use_cache)
            torch.testing.assert_close(kept, logits[:, -keep:])
    assert torch.equal(_logits(model, IDS, logits_to_keep=torch.tensor([0, 4]), use_cache=False), logits[:, [0, 4]])


def test_a_prompt_whose_last_logits_are_wanted_skips_the_layers_above_the_last_owner(hub_model) -> None:
    model = hub_model()  # fusedkv: layers 0 to 3 own
    seen = []
    for block in model.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    _logits(model, IDS, logits_to_keep=1)
    assert seen[:3] == [7, 7, 7]
    assert seen[4:] == [1, 1, 1, 1]


def test_early_exit_is_refused_where_prompt_logits_are_wanted(hub_model) -> None:
    model, ids = hub_model({"preset": "fusedkv"}), torch.arange(12)[None]
    for inputs, wanted in (({"labels": ids}, "labels"), ({}, "logits_to_keep None"), ({"logits_to_keep": 2}, "2")):
        with pytest.raises(UserError, match=f"early_exit computes the last logits only, but .*{wanted} wants more"):
            model(ids, early_exit=True, **inputs)
    exact = _logits(model, ids, early_exit=False, logits_to_keep=1)
    torch.testing.assert_close(_logits(model, ids, early_exit=True, logits_to_keep=1), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mha", "fusedkv", "mla"])
def test_the_last_logits_have_gradients(name, hub_model, preset_config) -> None:
    """Early exit has none, so it is for others to take."""
    model = hub_model(config=preset_config(name)).train()
    model(IDS).logits[:, -1:].sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    for use_cache in (False, True):
        model.zero_grad()
        model(IDS, logits_to_keep=1, use_cache=use_cache).logits.sum().backward()
        for n, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[n], msg=n)
    with pytest.raises(UserError, match="early_exit computes no gradients"):
        model(IDS, logits_to_keep=1, early_exit=True)
    model.requires_grad_(False)
    model(IDS, logits_to_keep=1, early_exit=True)


def test_a_cache_is_returned_outside_of_training(hub_model) -> None:
    model = hub_model()
    assert isinstance(model(IDS).past_key_values, KVCache)
    assert model(IDS, use_cache=False).past_key_values is None
    assert model(IDS, labels=IDS).past_key_values is None
    assert model.train()(IDS).past_key_values is None
    (logits,) = model(IDS, return_dict=False)
    assert torch.equal(logits, model(IDS).logits)


# ---- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACYCLIC)
@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padding_changes_nothing(name, use_cache, hub_model, preset_config) -> None:
    model = hub_model(config=preset_config(name))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    padded = _logits(model, IDS, attention_mask=mask, use_cache=use_cache)
    torch.testing.assert_close(padded[:1, 3:], _logits(model, IDS[:1, 3:], use_cache=False))
    torch.testing.assert_close(padded[1:], _logits(model, IDS[1:], use_cache=False))


def test_right_padding_closes_a_cache_that_nobody_asked_for(llama_twin) -> None:
    """The logits are right; the error comes when the cache is to go on."""
    ours, llama = llama_twin()
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    with torch.no_grad():
        output = ours(IDS, attention_mask=mask)
        expected = llama(IDS, attention_mask=mask).logits
        torch.testing.assert_close(output.logits[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)
        cache = output.past_key_values
        with pytest.raises(UserError, match="keeps 3 padding tokens at the end of a sequence"):
            ours(IDS[:, :1], past_key_values=cache)
        cache.reset()
        assert ours(IDS, past_key_values=cache).past_key_values is cache


@pytest.mark.parametrize("name", ACYCLIC)
def test_right_padding_changes_nothing_without_a_cache(name, hub_model, preset_config) -> None:
    model = hub_model(config=preset_config(name))
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    padded = _logits(model, IDS, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(padded[:1, :4], _logits(model, IDS[:1, :4], use_cache=False))


def test_padding_on_both_sides(hub_model) -> None:
    model = hub_model()
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    padded = _logits(model, IDS, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(padded[:1, 2:5], _logits(model, IDS[:1, 2:5], use_cache=False))


def test_positions_that_agree_with_the_padding_are_fine(hub_model) -> None:
    model = hub_model()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for use_cache in (False, True):
        with_positions = _logits(model, IDS, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        assert torch.equal(with_positions, _logits(model, IDS, attention_mask=mask, use_cache=use_cache))


def test_positions_of_padding_do_not_matter(hub_model) -> None:
    """transformers counts on through padding on the right, and starts at 1 or 0 in that on the left."""
    model = hub_model()
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    padded = _logits(model, IDS, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(padded[:1, 2:5], _logits(model, IDS[:1, 2:5], use_cache=False))


def test_positions_that_restart_begin_a_document(hub_model) -> None:
    model = hub_model()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    packed = _logits(model, IDS[:1], position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[:, :3], _logits(model, IDS[:1, :3], use_cache=False))
    torch.testing.assert_close(packed[:, 3:], _logits(model, IDS[:1, 3:], use_cache=False))


# ---- refused --------------------------------------------------------------------------------------------------------


def _mask(*zeros: int) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, list(zeros)] = 0
    return mask


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": _mask(2)}, "sequence 0 has a hole"),
        ({"attention_mask": _mask(0, 2)}, "sequence 0 has a hole"),
        (
            {"attention_mask": _mask(5, 6), "use_cache": True},
            "sequence 0 has 2 padding tokens at its end, which a cache would keep",
        ),
        ({"attention_mask": _mask(*range(7))}, "sequence 0 is all padding"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask is \(2, 6\); .* has to be \(2, 7\)"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"attention_mask is \(2, 1, 7, 7\); allowed: \(batch, tokens\)"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is dict"),
        ({"position_ids": torch.arange(1, 8)[None]}, "token 0 of sequence 0 is at 1, .* put it at 0"),
        (
            {"position_ids": torch.arange(7)[None], "attention_mask": _mask(0), "use_cache": False},
            "token 1 of sequence 0 is at 1, .* put it at 0",
        ),
        ({"position_ids": torch.arange(6)[None]}, r"position_ids are \(1, 6\)"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache; allowed: cllm.cache.cache.KVCache"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"inputs_embeds": torch.ones(2, 7, 24)}, "input_ids and inputs_embeds are both given"),
        ({"cache_position": torch.arange(7)}, "cache_position is not supported"),
        ({"logits_to_keep": torch.ones(2, 7)}, r"logits_to_keep is \(2, 7\)"),
    ],
)
def test_inputs_that_are_refused(inputs, message, hub_model) -> None:
    with pytest.raises(UserError, match=message) as caught:
        hub_model(n_layers=2)(IDS, **inputs)
    assert "\n" not in str(caught.value)


def test_neither_tokens_nor_embeddings_are_refused(hub_model) -> None:
    with pytest.raises(UserError, match=r"inputs_embeds are \(1, 3, 8\); allowed: \(B, T, 24\)"):
        hub_model(n_layers=2)(inputs_embeds=torch.ones(1, 3, 8))
    with pytest.raises(UserError, match="input_ids are None"):
        hub_model(n_layers=2)()


def test_more_tokens_than_the_context_are_refused(hub_model) -> None:
    model = hub_model(n_layers=2, max_seq_len=9)
    with pytest.raises(UserError, match=r"10 tokens, but the model's context \(model\.max_seq_len\) is 9"):
        model(torch.ones(1, 10, dtype=torch.long))
    cache = model(IDS).past_key_values
    model(IDS[:, :2], past_key_values=cache)
    with pytest.raises(UserError, match="10 tokens"):
        model(IDS[:, :1], past_key_values=cache)
    packed = torch.cat((torch.arange(9), torch.arange(9)))[None]
    assert model(torch.ones(1, 18, dtype=torch.long), position_ids=packed, use_cache=False).logits.shape == (1, 18, 32)


def test_going_on_with_another_padding_is_refused(hub_model) -> None:
    model = hub_model(n_layers=2)
    with torch.no_grad():
        cache = model(IDS, attention_mask=_mask(0, 1)).past_key_values
        whole = torch.cat((_mask(0, 1), torch.ones(2, 3, dtype=torch.long)), dim=1)
        model(IDS[:, :3], attention_mask=whole, past_key_values=cache)
        whole = torch.cat((_mask(0), torch.ones(2, 6, dtype=torch.long)), dim=1)
        with pytest.raises(UserError, match=r"pads \[1, 0\] tokens on the left, but the cache was begun with \[2, 0\]"):
            model(IDS[:, :3], attention_mask=whole, past_key_values=cache)


# ---- boundaries of packed documents ----------------------------------------------------------------------------------

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]])
PACKING = {
    "cu_seq_lens_q": torch.tensor([0, 3, 7, 11, 14], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 3, 7, 11, 14], dtype=torch.int32),
    "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]),
    "max_length_q": 4,
    "max_length_k": 4,
}


def test_boundaries_that_agree_with_the_positions_change_nothing(hub_model) -> None:
    """As transformers' DataCollatorWithFlattening and TRL's packing give them."""
    model = hub_model()
    expected = _logits(model, IDS, position_ids=POSITIONS, use_cache=False)
    assert torch.equal(_logits(model, IDS, position_ids=POSITIONS, use_cache=False, **PACKING), expected)
    assert not torch.allclose(_logits(model, IDS, use_cache=False), expected), "documents see only themselves"
    base = model.base_model(IDS, position_ids=POSITIONS, use_cache=False, **PACKING).last_hidden_state
    assert torch.equal(model.lm_head(base) if hasattr(model, "lm_head") else model.model.head(base), expected)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cu_seq_lens_q", torch.tensor([0, 7, 14])),
        ("cu_seq_lens_k", torch.tensor([0, 2, 7, 11, 14])),
        ("seq_idx", torch.zeros(2, 7, dtype=torch.long)),
    ],
)
def test_boundaries_that_contradict_the_positions_are_refused(hub_model, name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(UserError, match=f"{name}: its .* are not those of position_ids"):
        hub_model()(IDS, position_ids=POSITIONS, use_cache=False, **{**PACKING, name: wrong})
