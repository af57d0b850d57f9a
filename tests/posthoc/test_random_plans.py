"""Random plans: every method compresses the cache that a plan fills, or one line says why not.

What a compressed cache reads is put into an exact one, and both give the same logits for the tokens that follow. More
plans, and others every time:

    CLLM_PLANS=300 python -m pytest tests/posthoc/test_random_plans.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from cllm.config.load import validate
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse
from tests.plan.random_plans import GIVEN, PROPERTY, VOCABULARY, File, everything, model
from tests.posthoc.test_all_methods import LOSSLESS, SPECS, filled_with, tokens_read

PADDING, PROMPT, LATER = 8, 32, 5


def without(found: Any, keys: set[str]) -> Any:
    """A copy of a section, or a part of it, that lacks some keys."""
    if isinstance(found, dict):
        return {key: without(value, keys) for key, value in found.items() if key not in keys}
    return [without(value, keys) for value in found] if isinstance(found, list) else found


@st.composite
def compressible(draw: st.DrawFn) -> dict[str, Any]:
    """A section without the owners that no method compresses, and mostly without windows."""
    keys = {"tie", "mix", "only", *(["window"] if draw(st.integers(0, 3)) else [])}
    section = without(draw(everything()), keys) | {"max_seq_len": 64}
    iterations = section["kv"].get("iterations") and {"forward": PADDING + PROMPT + LATER, "backward": 1}
    return section | {"kv": section["kv"] | {"iterations": iterations}}


def check(decoder: Decoder, name: str, padding: int) -> str:
    """Compress the cache of a prompt and go on from it; returns the refusal, or nothing."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (1, padding + PROMPT + LATER), generator=generator)
    calibration = torch.randint(VOCABULARY, (2, 60), generator=generator)
    prompt, later = ids.split([padding + PROMPT, LATER], dim=1)
    engine, method = engine_of(decoder), parse(SPECS[name])
    try:
        method.prepare(engine, calibration)
        cache: Any = engine.new_cache()
        with method.watch(engine):
            decoder.hidden(prompt, cache=cache, starts=torch.tensor([padding]) if padding else None)
        compressed = compress_cache(cache, method)
    except UserError as error:
        return str(error)
    read, steps = tokens_read(compressed), copy.deepcopy(compressed)
    found = decoder(later, cache=compressed)
    assert found.isfinite().all()
    if name in LOSSLESS:
        return ""
    one_by_one = torch.cat([decoder(token, cache=steps) for token in later.split(1, dim=1)], dim=1)
    torch.testing.assert_close(one_by_one, found, atol=3e-3, rtol=3e-3)
    if not method.evicts and not method.shares():
        exact = filled_with(cache, read)
        torch.testing.assert_close(found, decoder(later, cache=exact), atol=2e-3, rtol=2e-3)
    return ""


CYCLE: list[dict[str, Any]] = [
    {"layers": 0, "own": {}, "keys": {"share": 2}},
    {"layers": 1, "own": {}, "keys": {"share": 0}, "values": {"fuse": [0, 1]}},
    {"layers": 2, "own": {}, "keys": {"fuse": [1, 2]}},
]
"""Layer 0 reads from above, in a cycle with two more owners."""


@settings(PROPERTY, max_examples=int(GIVEN or 60))
@example(section=model(CYCLE, {"forward": 45, "backward": 1}), name="kvsharer", padding=PADDING)
@given(section=compressible(), name=st.sampled_from(sorted(SPECS)), padding=st.sampled_from([0, PADDING]))
def test_every_method_compresses_the_cache_of_a_plan_or_says_why_not(section, name, padding, random_model) -> None:
    try:
        config = validate(File, {"model": section}).model
    except UserError:
        return
    refusal = check(random_model(config).eval().requires_grad_(False), name, padding)
    assert "\n" not in refusal
    event("refused" if refusal else "compressed")
