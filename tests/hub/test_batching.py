"""Continuous batching gives the tokens of `generate`, for every plan whose slots a paged cache can hold."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import cllm
from cllm.cache.paged import PagedPass
from cllm.config import Rope
from cllm.errors import UserError
from cllm.hub import batching, serving
from cllm.hub.batching import PagedModel
from cllm.hub.model import CLLMForCausalLM
from cllm.model.requests import request_context
from cllm.plan.presets import preset_names

NEW = 4
REFUSED = {
    "ced": "layer 4 is computed by JointAttention",
    "hysparse": "layer 1 is computed by GatedAttention",
    "lasagna_middle": "layers 1 to 2 read from above",
    "lasagna_top": "layers 1 to 3 read from above",
    "lckv": "layers 1 to 6 read from above",
    "mla": r"layer 0 stores a latent \(latent 12 \+ 4\)",
    "mlra": r"layer 0 stores a latent \(latent 3 x 4 \+ 4\)",
    "pizza_middle": "layers 3 to 5 read from above",
    "pizza_top": "layers 3 to 7 read from above",
    "sandwich_middle": "layers 2 to 4 read from above",
    "sandwich_top": "layers 2 to 6 read from above",
    "xmla": r"layer 0 stores a latent \(latent",
    "yoco": "layer 0 stores 4 KV heads and layer 4 2",
    "yoco_u": "layer 0 stores 4 KV heads and layer 4 2",
}
MIXED = {
    "layers": [
        {"layers": 0, "own": {}, "window": 20},
        {"layers": 1, "own": {"only": "keys"}, "values": {"share": 0}, "window": 9},
        {"layers": 2, "own": {"tie": "kv"}},
        {"layers": 3, "own": {"input": 1}},
        {"layers": 4, "keys": {"fuse": [2, 3]}, "values": {"share": 3}},
        {"layers": 5, "keys": {"share": 3}, "values": {"fuse": [2, 3]}, "window": 30},
        {"layers": 6, "own": {"mix": [3]}, "keys": {"share": 6}, "values": {"fuse": [2, 6]}},
        {"layers": 7, "keys": {"share": 1}, "values": {"share": 0}, "window": 5},
    ]
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Seven prompts; the last two have 50 tokens in common."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(32, (n,), generator=generator).tolist() for n in (1, 7, 17, 40, 90, 50, 21)]
    return [*drawn[:5], drawn[5] + [1, 2, 3], drawn[5] + drawn[6]]


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """The paged cache, the tokens of every pass, prefixes that were found, and requests that were sent back."""
    seen: dict[str, Any] = {"passes": [], "shared": 0, "preempted": 0}
    forward, match = PagedModel.forward, PagedAttentionCache.search_prefix_match
    offload = OffloadingManager.offload_requests

    def counting_forward(self, input_ids, **kwargs):
        seen["cache"] = kwargs["cache"]
        seen["passes"].append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    def counting_match(self, *args):
        found = match(self, *args)
        seen["shared"] += found
        return found

    def counting_offload(self):
        freed = offload(self)
        seen["preempted"] += bool(freed)
        return freed

    monkeypatch.setattr(OffloadingManager, "offload_requests", counting_offload)
    monkeypatch.setattr(PagedModel, "forward", counting_forward)
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", counting_match)
    return seen


def _batching(num_blocks: int = 64, **options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(page_size=16, num_blocks=num_blocks, max_batch_tokens=64, **options)


def _batched(model, prompts, *, blocks: int = 64, new: int = NEW) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=new, do_sample=False)
    outputs = model.generate_batch(prompts, config, continuous_batching_config=_batching(blocks)).values()
    assert [output.error for output in outputs] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs]


def _greedy(model, prompts, new: int = NEW) -> list[list[int]]:
    """Tokens of `generate` for all prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, longest:].tolist()


@pytest.mark.parametrize("name", sorted(set(preset_names()) - REFUSED.keys()))
def test_every_servable_preset_gives_the_tokens_of_generate(name, hub_model, preset_config, prompts, seen) -> None:
    model = hub_model(config=preset_config(name, max_seq_len=128))
    assert _batched(model, prompts) == _greedy(model, prompts)
    owners = model.model.plan.owners
    assert len(seen["cache"].layer_to_allocator) == len(owners)
    assert max(seen["passes"]) == 64, "the prompt of 90 tokens is computed in chunks"
    windows = [model.model.plan.layers[j].window for j in owners]
    assert (seen["shared"] > 0) == (set(windows) == {None}), "transformers shares prefixes of full attention only"


@pytest.mark.parametrize("rope", [{}, {"windowed_theta": 50.0}])
def test_a_plan_of_everything_under_preemption(rope, hub_model, prompts, seen) -> None:
    # Windows of four sizes, halves, a tied projection, projected inputs, mixed and fused slots, readers of two owners.
    model = hub_model(MIXED, max_seq_len=128, rope=rope)
    assert _batched(model, prompts) == _greedy(model, prompts)
    assert seen["preempted"] == 0
    short = [prompt[:25] for prompt in prompts[3:]]
    assert _batched(model, short, blocks=6, new=30) == _greedy(model, short, 30)
    assert seen["preempted"] > 0


def test_a_width_that_the_heads_do_not_divide(hub_model, prompts) -> None:
    model = hub_model(d_model=26, max_seq_len=128)
    assert _batched(model, prompts) == _greedy(model, prompts)


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [("float32", "auto", "sdpa"), ("float32", "flex", "flex"), ("bfloat16", "auto", "auto")],
)
def test_fp32_does_not_choose_the_kernel_that_is_compiled_for_every_length(dtype, backend, expected) -> None:
    pages = PagedPass({}, [2, 1, 1], [[5, 3, 4]])
    context = request_context(Rope(), torch.zeros(1, 4).long(), backend, pages, dtype=getattr(torch, dtype))
    assert {group.context.backend for group in context.groups} == {context.backend} == {expected}


def test_layers_above_the_last_owner_compute_last_tokens_only(hub_model, prompts) -> None:
    model = hub_model({"preset": "fusedkv", "n_kv_heads": 2}, max_seq_len=128)
    lengths = []
    model.model.blocks[-1].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    _batched(model, prompts[:4])
    assert max(lengths) <= 4


def test_stop_tokens_and_settings_of_the_caller_are_kept(hub_model, prompts) -> None:
    model = hub_model(max_seq_len=128)
    (tokens,) = _greedy(model, prompts[2:3], 8)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=tokens[2])
    (output,) = model.generate_batch(prompts[2:3], config, continuous_batching_config=_batching()).values()
    assert output.generated_tokens == tokens[: tokens.index(tokens[2]) + 1]
    model.generation_config.max_new_tokens = 2
    model.generate_batch(prompts[:1], continuous_batching_config=_batching())
    assert model.generation_config.eos_token_id is None


def test_a_server_refuses_one_request_and_goes_on(hub_model, prompts) -> None:
    # As `transformers serve` uses a model: a manager that is kept for the next call, and requests one by one.
    model = hub_model(max_seq_len=128)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False)
    manager = model.init_continuous_batching(config, _batching())
    manager.start()
    for ids, message in (
        ([], "input_ids is empty"),
        ([1, 32], "input_ids has 32; allowed: token ids from 0 to 31"),
        ([1] * 126, "a prompt of 126 tokens and up to 4 new ones do not fit the model's context"),
    ):
        with pytest.raises(UserError, match=message):
            manager.add_request(ids)
    manager.add_request(prompts[1])
    assert manager.get_result(timeout=300).generated_tokens == _greedy(model, prompts[1:2])[0]
    manager.stop(block=True, keep_for_next_session=True)
    assert model.init_continuous_batching() is manager
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_plan_that_pages_cannot_hold_is_refused_before_any_work(name, hub_model, preset_config) -> None:
    model = hub_model(config=preset_config(name))
    model.model.embed.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(UserError, match=f"continuous batching: {REFUSED[name]}"):
        model.generate_batch([[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([[1], []], {}, r"inputs\[1\] is empty"),
        ("text", {}, "inputs is a str; allowed: a list of prompts"),
        (["text"], {}, r"inputs\[0\] is a str; allowed: a list"),
        ([[1, True]], {}, r"inputs\[0\] has True"),
        ([[1, -1]], {}, r"inputs\[0\] has -1; allowed: token ids from 0 to 31"),
        ([[1] * 60], {"max_new_tokens": 9}, "a prompt of 60 tokens and up to 9 new ones .*, 64"),
        ([[1]], {"continuous_batching_config": _batching(use_cuda_graph=True)}, "use_cuda_graph is True"),
        ([[1]], {"continuous_batching_config": _batching(default_compile_level=1)}, "default_compile_level is 1"),
        ([[1]], {"continuous_batching_config": {}}, "continuous_batching_config is a dict"),
        ([[1]], {"generation_config": GenerationConfig(num_beams=2)}, "num_beams is 2; allowed: 1"),
    ],
)
def test_refused_calls(inputs, options, message, hub_model) -> None:
    with pytest.raises(UserError, match=message):
        hub_model(n_layers=2).generate_batch(inputs, **options)


def test_the_server_of_transformers_finds_the_class_and_answers_with_errors() -> None:
    handlers: dict[type[Exception], Any] = {}
    app = SimpleNamespace(add_exception_handler=handlers.__setitem__)
    server, manager = (
        SimpleNamespace(build_server=lambda *arguments: app),
        SimpleNamespace(transformers=ModuleType("t")),
    )
    serving.register(server, manager)
    assert manager.transformers.CLLMForCausalLM is CLLMForCausalLM
    assert server.build_server("manager", "handlers") is app
    assert handlers == {UserError: serving._answer}
    assert cllm._ENTRIES[serving._SERVER] == serving.__name__


def test_the_cache_of_transformers_5_17() -> None:
    # It takes the indices by name, and returns (S, G, D) instead of (1, G, S, D).
    class Cache(SimpleNamespace):
        def update(self, key_states, value_states, layer_idx, read_index, write_index):
            assert (read_index, write_index, layer_idx) == ("read", "write", 3)
            return tuple(t.transpose(1, 2).squeeze(0) for t in (key_states, value_states))

    k, v = torch.randn(2, 1, 5, 2, 8).unbind()
    pages = {"read_index": "read", "write_index": "write", "cu_seq_lens_k": None}
    read = batching._update(Cache(dtype=torch.float32), 3, pages)(k, v)
    assert torch.equal(read[0], k)
    assert torch.equal(read[1], v)
