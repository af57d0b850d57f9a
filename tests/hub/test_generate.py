"""`generate` gives what a loop gives that computes everything again for every token."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.hub import model as model_module
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.model.graph import StepGraph
from cllm.plan.presets import preset_names

IDS = torch.tensor([[5, 9, 1, 30, 7], [4, 4, 8, 21, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
NEW = 5


def _again(model: CLLMForCausalLM, ids: torch.Tensor, mask: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
            mask = torch.cat((mask, torch.ones_like(ids[:, :1])), dim=1)
    return ids


def _greedy(model: CLLMForCausalLM, ids: torch.Tensor | None = IDS, **options) -> Any:
    """Tokens (B, T), or the output of `generate` that holds them, under `return_dict_in_generate`."""
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


@pytest.fixture(scope="module")
def of_preset(hub_model, preset_config):
    """A model of a preset; cyclic ones iterate until every token is exact, as decoding is by itself."""

    def build(name: str) -> CLLMForCausalLM:
        config = preset_config(name)
        if getattr(config.kv, "iterations", None) is not None:
            iterations = config.kv.iterations.model_copy(update={"forward": len(IDS[0]) + NEW})
            config = config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": iterations})})
        return hub_model(config=config)

    return build


@pytest.mark.parametrize("name", preset_names())
def test_greedy_batches_with_left_padding(name, of_preset) -> None:
    model = of_preset(name)
    expected = _again(model, IDS, MASK)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(_greedy(model, attention_mask=MASK, **options), expected), options
    assert torch.equal(_greedy(model, IDS[:1, 2:])[0], expected[0, 2:])


def test_recurrent_states(hub_model) -> None:
    model = hub_model({"preset": "yoco", "lower": "retention", "n_kv_heads": 2})
    assert torch.equal(_greedy(model, attention_mask=MASK), _again(model, IDS, MASK))


def test_generate_makes_the_cache_that_was_asked_for(hub_model) -> None:
    model = hub_model()
    growing = _greedy(model, return_dict_in_generate=True).past_key_values
    assert isinstance(growing, KVCache)
    assert (growing.max_len, growing.get_seq_length()) == (None, 9)
    static = _greedy(model, return_dict_in_generate=True, cache_implementation="static").past_key_values
    assert (static.max_len, static.get_seq_length()) == (9, 9)
    fp8 = KVCache(model.config.model_config, storage="fp8")
    assert _greedy(model, return_dict_in_generate=True, past_key_values=fp8).past_key_values is fp8
    assert fp8.nbytes() < growing.nbytes() / 2


def test_the_prompt_skips_the_layers_above_the_last_owner(hub_model) -> None:
    model = hub_model()  # fusedkv: layers 0 to 3 own
    seen = []
    model.model.blocks[7].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    _greedy(model)
    assert seen == [1] * NEW


@pytest.mark.parametrize("name", ["fusedkv", "trailing"])
def test_beams_are_those_without_a_cache(name, of_preset) -> None:
    model = of_preset(name)
    beams = [_greedy(model, attention_mask=MASK, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)


def test_sampling_draws_the_same_with_and_without_a_cache(hub_model) -> None:
    model = hub_model()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(IDS, max_new_tokens=NEW, do_sample=True, num_return_sequences=2, use_cache=use_cache)
        )
    assert drawn[0].shape == (4, 10)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["fusedkv", "cla", "mla"])
def test_assisted_decoding(name, of_preset, hub_model) -> None:
    """A draft that is always right, one that is often wrong, and one looked up in the prompt."""
    model = of_preset(name)
    prompt = IDS[:1].repeat(1, 3)
    expected = _greedy(model, prompt, max_new_tokens=20)
    for draft in (copy.deepcopy(model), hub_model({"preset": "mha"}, n_layers=2)):
        assert torch.equal(_greedy(model, prompt, max_new_tokens=20, assistant_model=draft), expected)
    assert torch.equal(_greedy(model, prompt, max_new_tokens=20, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("new", [47, 48, 49])
def test_what_is_looked_up_in_the_prompt_stays_inside_the_context(new, hub_model) -> None:
    model = hub_model()  # of 64 tokens
    prompt = IDS[:1].repeat(1, 3)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    expected = _greedy(model, prompt, max_new_tokens=new)
    exact = KVCache(model.config.model_config, max_len=14 + new)
    for options in ({}, {"past_key_values": exact}):
        seen.clear()
        found = _greedy(model, prompt, max_new_tokens=new, prompt_lookup_num_tokens=6, **options)
        assert torch.equal(found, expected)
        assert max(seen[1:]) > 1, "nothing was proposed"


def test_assisted_decoding_is_refused_where_tokens_cannot_be_taken_back(of_preset, hub_model) -> None:
    with pytest.raises(UserError, match="assisted decoding: layers that read from above"):
        _greedy(of_preset("lckv"), IDS[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(UserError, match="a slot with a window of 3 has forgotten"):
        _greedy(of_preset("yoco"), IDS[:1], prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        _greedy(hub_model({"preset": "yoco", "lower": "retention"}), IDS[:1], prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("seed", range(6))
def test_a_pad_token_may_be_text(seed, hub_model) -> None:
    """In what an assistant has proposed, and inside of a prompt without a mask."""
    torch.manual_seed(seed)
    small = {"vocab_size": 6, "n_layers": 2, "d_model": 16, "n_heads": 2}
    model, draft = (hub_model({"preset": kind}, **small) for kind in ("mha", "cla"))
    for one in (model, draft):
        torch.nn.init.normal_(one.model.head.weight)
        one.generation_config.update(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    prompt = torch.randint(2, 6, (1, 4))
    options = {"max_new_tokens": 16, "eos_token_id": -1}
    expected = _again(model, prompt, torch.ones_like(prompt), 16)
    assert torch.equal(_greedy(model, prompt, assistant_model=draft, **options), expected)
    prompt[0, 2:] = 0
    expected = _again(model, prompt, torch.ones_like(prompt), 16)
    assert (expected == 0).any()
    for more in ({}, {"assistant_model": draft}):
        assert torch.equal(_greedy(model, prompt, **more, **options), expected)


def test_pad_tokens_around_a_sequence_are_padding(hub_model) -> None:
    """Without a mask: those before it, and in a batch those after it; in a batch of none but one, these are text."""
    model = hub_model(n_layers=2)
    model.generation_config.update(pad_token_id=0, eos_token_id=1)
    ids = torch.tensor([[0, 0, 5, 0, 9], [0, 3, 0, 0, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    first = _greedy(model, ids, return_dict_in_generate=True)
    assert torch.equal(first.sequences, _greedy(model, ids, attention_mask=mask))
    longer = torch.cat((first.sequences, torch.zeros(2, 1, dtype=torch.long)), dim=1)  # the cache knows the padding
    expected = _greedy(model, longer, attention_mask=torch.cat((mask, torch.ones(2, NEW + 1, dtype=torch.long)), 1))
    assert torch.equal(_greedy(model, longer, past_key_values=first.past_key_values), expected)
    with pytest.raises(UserError, match="sequence 1 has 2 padding tokens at its end"):
        _greedy(model, torch.tensor([[5, 9, 1], [4, 0, 0]]))


def test_several_stop_tokens(hub_model) -> None:
    model = hub_model()
    free = _greedy(model, IDS[:1], max_new_tokens=12, eos_token_id=-1)[0, 5:].tolist()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = [31, free[4]]
    stopped = _greedy(model, IDS[:1], max_new_tokens=12)[0, 5:].tolist()
    assert stopped == free[: free.index(free[4]) + 1]
    assert CLLMConfig(model=model.config.model, eos_token_id=[2, 3]).eos_token_id == [2, 3]


def test_stop_strings(hub_model, prepared) -> None:
    """`transformers serve` gives the tokenizer to every call of `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    model = hub_model(vocab_size=len(tokenizer))
    options = {"max_new_tokens": 12, "eos_token_id": None}
    free = _greedy(model, IDS[:1], **options)
    assert torch.equal(_greedy(model, IDS[:1], tokenizer=tokenizer, **options), free)
    stop = tokenizer.decode(free[0, 8:9])
    stopped = _greedy(model, IDS[:1], tokenizer=tokenizer, stop_strings=[stop], **options)
    assert torch.equal(stopped, free[:, : stopped.shape[1]])
    assert stopped.shape[1] <= 9
    assert stop in tokenizer.decode(stopped[0, 5:])


@pytest.mark.parametrize("name", ["fusedkv", "yoco", "lckv", "mla"])
def test_embeddings_as_a_prompt(name, of_preset) -> None:
    model = of_preset(name)
    prompt = model.get_input_embeddings()(IDS)
    expected = _greedy(model, attention_mask=MASK)[:, 5:]
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(_greedy(model, None, inputs_embeds=prompt, attention_mask=MASK, **options), expected)
    first = _greedy(model, None, inputs_embeds=prompt, attention_mask=MASK, return_dict_in_generate=True)
    longer = torch.cat((prompt, model.get_input_embeddings()(first.sequences)), dim=1)
    mask = torch.cat((MASK, torch.ones(2, NEW, dtype=torch.long)), dim=1)
    again = _greedy(model, None, inputs_embeds=longer, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(again, _again(model, torch.cat((IDS, first.sequences), dim=1), mask)[:, 5 + NEW :])


def test_embeddings_as_a_prompt_are_refused_before_any_work(hub_model) -> None:
    model = hub_model(n_layers=2)
    prompt = model.get_input_embeddings()(torch.ones(1, 60, dtype=torch.long))
    model.model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(
        UserError, match=r"inputs_embeds of 60 tokens and up to 5 new ones .* \(model.max_seq_len\), 64"
    ):
        _greedy(model, None, inputs_embeds=prompt)
    with pytest.raises(UserError, match="prefill_chunk_size is 2 and the prompt is inputs_embeds"):
        _greedy(model, None, inputs_embeds=prompt[:, :9], prefill_chunk_size=2)


def test_hidden_states_of_every_step(llama_twin) -> None:
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    ours, llama = (_greedy(model, **options, pad_token_id=0).hidden_states for model in llama_twin())
    assert len(ours) == len(llama) == NEW
    for step, expected in zip(ours, llama, strict=True):
        torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-5)


def test_a_conversation_goes_on_from_its_cache(hub_model) -> None:
    model = hub_model()
    first = _greedy(model, attention_mask=MASK, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, torch.tensor([[3, 1], [2, 2]])), dim=1)
    mask = torch.cat((MASK, torch.ones(2, NEW + 2, dtype=torch.long)), dim=1)
    after = _greedy(model, ids, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(after, _again(model, ids, mask))


def test_a_given_cache_has_to_fit(hub_model) -> None:
    model = hub_model(n_layers=2)
    used = _greedy(model, return_dict_in_generate=True).past_key_values
    model.model.embed.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(UserError, match=r"has places for 8 tokens \(max_len\), but .* need 9"):
        _greedy(model, past_key_values=KVCache(model.config.model_config, max_len=8))
    for mask in ({}, {"attention_mask": MASK}):
        with pytest.raises(UserError, match="past_key_values holds 9 tokens and the prompt has 5"):
            _greedy(model, past_key_values=used, **mask)


def test_cyclic_layers_take_a_prompt_whole(of_preset, hub_model, preset_config) -> None:
    """Or as short a one as their passes make exact."""
    exact = of_preset("lckv")
    assert torch.equal(_greedy(exact, prefill_chunk_size=2), _greedy(exact))
    model = hub_model(config=preset_config("lckv"))  # 4 passes
    with pytest.raises(UserError, match=r"chunk of a prompt is 2: layers 1 to 6 .* take 4 passes .* up to 4 tokens"):
        _greedy(model, prefill_chunk_size=2)
    with pytest.raises(UserError, match="chunk of a prompt is 4: layers"):
        model.model.prefill(IDS, KVCache(model.model.config), chunk=4)
    assert torch.equal(_greedy(model, prefill_chunk_size=5), _greedy(model))
    with pytest.raises(UserError, match="chunk of a prompt is 0; allowed: 1 or more"):
        hub_model(n_layers=2).model.prefill(IDS, KVCache(model.model.config), chunk=0)


@pytest.mark.parametrize("name", ["fusedkv", "mla", "trailing", "yoco with retention"])
def test_a_prompt_in_chunks(name, of_preset) -> None:
    """Of the padded sequence the first chunks hold only padding, or padding and a token."""
    model = of_preset(name)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    expected = _greedy(model, attention_mask=mask)
    for size, kind in ((1, "dynamic"), (2, "dynamic"), (2, "static"), (3, "dynamic"), (4, "static"), (9, "dynamic")):
        found = _greedy(model, attention_mask=mask, prefill_chunk_size=size, cache_implementation=kind)
        assert torch.equal(found, expected), (size, kind)
    with pytest.raises(UserError, match="sequence 0 is all padding"):
        _greedy(model, attention_mask=mask * torch.tensor([[0], [1]]), prefill_chunk_size=2)
    with pytest.raises(UserError, match="sequence 0 has 2 padding tokens at its end"):
        _greedy(model, attention_mask=MASK.flip(1), prefill_chunk_size=2)


class _EagerGraph(StepGraph):
    """A stand-in for a recorded step, with the checks of one."""

    def __init__(self, decoder, cache) -> None:
        self.decoder, self.cache, self.addresses = decoder, cache, ()
        self.ids = torch.zeros(cache.batch, 1, dtype=torch.long)
        self.graph: Any = self
        self.addresses = self._addresses()

    def replay(self) -> None:
        self.logits = self.decoder(self.ids, cache=self.cache)[:, 0]
        self.cache.seen -= 1  # what a graph does not count


def test_steps_that_a_graph_replays(hub_model, monkeypatch) -> None:
    monkeypatch.setattr(model_module, "StepGraph", _EagerGraph)
    monkeypatch.setattr(CLLMForCausalLM, "_replays", lambda _, cache, ids: cache.is_static and ids.shape[1] == 1)
    model = hub_model()
    static = _greedy(model, attention_mask=MASK, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(static.sequences, _greedy(model, attention_mask=MASK))
    alive = weakref.ref(static.past_key_values)
    del static
    gc.collect()
    assert alive() is None, "nothing keeps a cache alive that nobody asks for"

    cache = KVCache(model.config.model_config, max_len=20)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(UserError, match="past_key_values holds 2 sequences and input_ids 1"):
            model(IDS[:1, :1], past_key_values=cache)
        with pytest.raises(UserError, match=r"attention_mask is \(2, 3\); for 2 x 1 tokens after 5 in the cache"):
            model(IDS[:, :1], attention_mask=torch.ones(2, 3), past_key_values=cache)
        model(IDS[:, :1], attention_mask=torch.ones(2, 6), past_key_values=cache)
        assert model._graph.is_valid
        with pytest.raises(UserError, match="holds 2 sequences and was handed 1"):
            model._graph(IDS[:1, 0])
        model.double()
        assert not model._graph.is_valid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is offloaded; allowed: dynamic, static"),
        ({"cache_implementation": "quantized"}, "cache_implementation is quantized"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
        ({"assistant_early_exit": 2}, "assistant_early_exit is 2: the model has no heads after lower layers"),
        ({"attention_mask": MASK.flip(1)}, "has 2 padding tokens at its end, which a cache would keep"),
        ({"max_new_tokens": 60}, "a prompt of 5 tokens and up to 60 new ones .* allowed: max_new_tokens up to 59"),
    ],
)
def test_what_is_refused(options, message, hub_model) -> None:
    with pytest.raises(UserError, match=message):
        _greedy(hub_model(n_layers=2), **options)


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(hub_model) -> None:
    model = hub_model(n_layers=2)
    model.model.embed.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(UserError, match=r"the prompt has 65 tokens, but the model's context .* is 64"):
        _greedy(model, torch.ones(1, 65, dtype=torch.long))
