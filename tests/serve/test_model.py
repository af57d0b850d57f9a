"""The plug-in's decoder on a stand-in for vLLM: logits of every plan, cache sizes, fast prefill, tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from cllm.cache.accounting import kv_bytes
from cllm.config import ModelConfig, Rope
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.serve.vllm.layout import Entry, cache_groups, make_layout
from tests.plan.random_plans import GIVEN, PROPERTY, File, everything, formed, models

PROMPTS = [[1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1]]
STEPS = ([1, 5, 0], [0, 7, 3], [0, 3, 3], [0, 1, 1])
"""Tokens of each prompt in each step: chunks and single tokens, in batches."""


@pytest.fixture(scope="module")
def fake(load_file) -> Iterator[ModuleType]:
    """The stand-in, in the place of vLLM."""
    module = load_file(Path(__file__).with_name("fake_vllm.py"))
    with pytest.MonkeyPatch.context() as patch:
        module.install(patch)
        yield module


def requests(fake: ModuleType, prompts: list[list[int]], n_groups: int) -> list[Any]:
    """A request of up to 16 tokens for each prompt, with block tables of different blocks of the cache."""
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(len(prompts)))
    size = 16 // fake.BLOCK
    assert len(prompts) * size * n_groups <= 64
    tables = shuffled[: len(prompts) * n_groups * size].view(len(prompts), n_groups, size)
    return [fake.Request(prompt, blocks=list(table)) for prompt, table in zip(prompts, tables, strict=True)]


def check(fake: ModuleType, decoder: Any, *, ranks: int = 1, fast_prefill: bool = False) -> None:
    """Steps of the engine give the logits of the decoder, from a cache of the plan's size."""
    config, model = decoder.config, as_pretrained(decoder.eval())
    prompts = [[token % config.vocab_size for token in prompt] for prompt in PROMPTS]
    layout = make_layout(config.plan(), config.n_heads, config.resolved_head_dim, ranks=ranks, exits=fast_prefill)
    groups = cache_groups(item for item in layout.order() if isinstance(item, Entry))
    by_name = {f"model.cache.{entry.layer}.{entry.content}": group for entry, group in groups.items()}
    engine = fake.Engine(model, ranks=ranks, fast_prefill=fast_prefill, groups=by_name)
    assert engine.numbers == layout.elements
    found: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(prompts))}
    made = requests(fake, prompts, len(set(groups.values())))
    for counts in STEPS:
        active = [n for n, count in enumerate(counts) if count]
        parts = engine.run([made[n] for n in active], [counts[n] for n in active])
        for n, part in zip(active, parts, strict=True):
            found[n].append(part)
    for n, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = decoder(torch.tensor([prompt]))[0]
        if fast_prefill:
            last = torch.tensor([counts[n] for counts in STEPS if counts[n]]).cumsum(0) - 1
            expected = expected[last]
        torch.testing.assert_close(torch.cat(found[n]), expected, atol=2e-4, rtol=2e-4)


PRESETS = ("mha", "gqa", "cla", "yoco", "trailing", "swiftkv", "yoco_pp", "kv_tie", "svformer", "resformer", "fusedkv",
           "fusedkv_lite")  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "fast_prefill"),
    [*((preset, False) for preset in PRESETS), *((preset, True) for preset in ("yoco", "swiftkv", "fusedkv_lite"))],
)
def test_steps_give_the_logits_of_the_decoder(
    preset: str, fast_prefill: bool, fake, preset_config, random_model
) -> None:
    check(fake, random_model(preset_config(preset, qk_norm=True, kv_bias=True)), fast_prefill=fast_prefill)


@pytest.mark.parametrize("key", ["norms_after", "scale_embeddings"])
def test_layers_like_gemmas_are_refused(key: str, fake, tiny_config, random_model) -> None:
    with pytest.raises(UserError, match=f"model.{key} is true, which cannot be served with vLLM"):
        check(fake, random_model(tiny_config(**{key: True})))


@settings(PROPERTY, max_examples=int(GIVEN or 40))
@given(section=st.one_of(models(), formed(), everything()), fast_prefill=st.booleans())
def test_random_plans_are_refused_or_give_the_logits_of_the_decoder(
    section: dict[str, Any], fast_prefill: bool, fake, random_model
) -> None:
    try:
        config: ModelConfig = validate(File, {"model": section}).model
    except UserError:
        return
    config = config.model_copy(update={"rope": Rope(), "mlp_activation": "silu", "scale_embeddings": False})
    plan = config.plan()
    try:
        layout = make_layout(plan, config.n_heads, config.resolved_head_dim)
    except UserError as error:
        event(f"refused: {' '.join(str(error).split()[6:12])}")
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("vLLM cannot serve this KV plan: ")
        return
    event("served")
    tied = sum(
        sum(own.elements(config.resolved_head_dim)) for j in plan.owners if (own := plan.owned(j)).rotates_at_read
    )
    assert layout.elements == kv_bytes(config, bytes_per_element=1).written + tied
    check(fake, random_model(config), fast_prefill=fast_prefill)


@pytest.mark.parametrize(
    "kv",
    [
        {"preset": "fusedkv", "per_head": True},
        {"preset": "fusedkv", "keys": "complex", "values": "matrix"},
        {"preset": "svformer"},
        {"preset": "cla", "n_kv_heads": 2},
    ],
    ids=lambda kv: kv["preset"],
)
def test_two_ranks_share_the_heads(kv: dict[str, Any], fake, tiny_config, random_model) -> None:
    check(fake, random_model(tiny_config(kv=kv, n_layers=4, tie_embeddings=True)), ranks=2)
