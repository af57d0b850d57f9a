"""Random plans: those accepted compute, cache, count, export and train alike; others are refused in one line.

The suite runs 50 examples, always the same. For more, and others every time:

    CLLM_PLANS=2000 python -m pytest tests/plan/test_random_plans.py

The plans are those of `random_plans.py`. `test_random_equations.py` compares others with a slow decoder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.hub.model import CLLMForCausalLM
from cllm.model.decoder import Decoder
from cllm.plan.plan import KVPlan
from cllm.prefix.pack import pack, unpack
from tests.plan.random_plans import (
    GIVEN,
    PLUGGED,
    PROPERTY,
    VOCABULARY,
    File,
    everything,
    formed,
    joined,
    model,
    models,
    sized,
)

LENGTH, PROMPT, BATCH = 12, 10, 2


def cycle(backward: int, **layer: Any) -> dict[str, Any]:
    """Layers 1 and 2 read values that only layers below their owner read."""
    share = {"keys": {"share": 0}, "values": {"share": 3}, **layer}
    layers = [{"own": {}}, share, share, {"own": {}, "values": {"share": 0}}]
    return model([{"layers": i, **entry} for i, entry in enumerate(layers)], {"forward": 1, "backward": backward})


# ---- what holds for each --------------------------------------------------------------------------------------------


def gradients(model: Decoder) -> dict[str, torch.Tensor | None]:
    """Of every parameter, for the next-token loss on tokens that include the whole vocabulary, in fp64."""
    ids = torch.randperm(BATCH * 16, generator=torch.Generator().manual_seed(1)).view(BATCH, 16)
    model.double().zero_grad()
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def without_gradient(found: dict[str, torch.Tensor | None]) -> list[str]:
    """The parameters whose gradient is missing, not finite, or in one row (an output channel, a fused source) zero but
    for rounding. Not every row of the embedding is an input."""

    def least(name: str, gradient: torch.Tensor | None) -> float:
        if gradient is None or not gradient.isfinite().all():
            return 0.0
        rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        most = rows.abs().amax(dim=1)
        return float(most.max() if name == "embed.weight" else most.min())

    return [name for name, gradient in found.items() if least(name, gradient) < 1e-12]


def exact(config: ModelConfig) -> ModelConfig:
    """The same plan with passes enough to be exact over `LENGTH` tokens, if it is cyclic."""
    if not config.plan().cyclic_spans():
        return config
    enough = config.kv.iterations.model_copy(update={"forward": LENGTH})
    return config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": enough})})


def check_cache(
    model: Decoder, ids: torch.Tensor, full: torch.Tensor, parts: list[int], chunk: int, max_len: int | None
):
    """Chunks and single tokens through a cache give the logits of a full forward, and so does a prompt whose upper
    layers compute the last token alone, also if the cache is stored and read in between; the cache has the bytes that
    were predicted."""
    config = model.config
    cache = KVCache(config, max_len=max_len)
    logits = torch.cat([model(part, cache=cache) for part in ids.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
    assert cache.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4)
    for size in (None, chunk):
        cache = KVCache(config, max_len=max_len)
        last = model.head(model.prefill(ids[:, :PROMPT], cache, chunk=size))
        torch.testing.assert_close(last, full[:, PROMPT - 1 : PROMPT], atol=1e-4, rtol=1e-4)
        if size is None:
            cache = unpack(pack(cache), config, max_len=max_len)
        rest = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(PROMPT, LENGTH)], dim=1)
        torch.testing.assert_close(rest, full[:, PROMPT:], atol=1e-4, rtol=1e-4)
        assert cache.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4)
    fp8 = KVCache(config, max_len=max_len, storage="fp8")
    model(ids, cache=fp8)
    assert fp8.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4, storage="fp8")


def check_padding(model: Decoder, ids: torch.Tensor, full: torch.Tensor, max_len: int | None) -> None:
    """A row after padding, in one pass and from a cache, and a document in a packed row have the logits of each alone.

    The second row starts at its third token. With documents, the first four tokens and the others are apart. Rows of a
    cache that change places go on as each would.
    """
    ids, full = ids[:, :7], full[:, :7]
    starts, alone = torch.tensor([0, 2]), model(ids[1:, 2:])
    cached = []
    for parts in ([5, 1, 1], [1, 3, 3], [1, 1, 1, 4]):  # the second row is padding alone in steps of one token
        cache = KVCache(model.config, max_len=max_len)
        split = enumerate(ids.split(parts, dim=1))
        logits = [model(part, cache=cache, starts=None if n else starts) for n, part in split]
        cached.append(torch.cat(logits, dim=1))
    cache = KVCache(model.config, max_len=max_len)
    first = model.head(model.prefill(ids[:, :5], cache, starts=starts))
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = torch.cat([model(ids.flip(0)[:, t : t + 1], cache=cache) for t in (5, 6)], dim=1).flip(0)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), cached[0][:, 4:], atol=1e-4, rtol=1e-4)
    for found in (model(ids, starts=starts), *cached):
        torch.testing.assert_close(found[0], full[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1, 2:], alone[0], atol=1e-4, rtol=1e-4)
    documents, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * BATCH), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    packed = model(ids, positions, documents)
    torch.testing.assert_close(packed[:, :4], full[:, :4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]), atol=1e-4, rtol=1e-4)
    last = model(ids, positions, documents, last_only=True)
    torch.testing.assert_close(last, packed[:, -1:], atol=1e-4, rtol=1e-4)


def check_refusal(section: dict[str, Any], error: UserError, random_model) -> None:
    """One line; and where halves are refused, a model that was built all the same has a parameter without gradient.

    In a loop the projections of a half that no layer reads may have a gradient from another turn.
    """
    assert "\n" not in str(error)
    assert str(error).startswith("model: "), error
    assume(not PLUGGED)
    if section["kv"].get("loop"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVPlan, "_check_halves", lambda self: None)
        try:
            config = validate(File, {"model": section}).model
        except UserError:
            event("refused for another reason")
            return
        event("refused because a parameter would have no gradient")
        assert without_gradient(gradients(random_model(config))), (
            f"refused, but every parameter has a gradient: {error}"
        )


EVEN = [1] * LENGTH


@PROPERTY
@example(section=cycle(1), sizes=EVEN, chunk=2)
@example(section=cycle(2), sizes=EVEN, chunk=2)
@example(section=cycle(2, window=2), sizes=EVEN, chunk=2)
@example(section=cycle(2, window=3), sizes=EVEN, chunk=2)
@example(section=model([{"layers": 0, "own": {}, "window": 1}, {"layers": 1, "own": {}}]), sizes=EVEN, chunk=2)
@given(section=models(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_accepted_plans_compute_cache_export_and_train_alike(section, sizes, chunk, random_model, tmp_path_factory):
    try:
        config = validate(File, {"model": section}).model
    except UserError as error:
        check_refusal(section, error, random_model)
        return
    plan = config.plan()
    event("accepted" + (", cyclic" if plan.cyclic_spans() else ""))
    for kind in sorted({type(read).__name__ for i in range(len(plan)) for read in (plan.keys(i), plan.values(i))}):
        event(f"accepted, reads by {kind}")
    for kind in sorted({type(plan.owned(j)).__name__ for j in plan.owners}):
        event(f"accepted, owns {kind}")
    assert without_gradient(gradients(random_model(config))) == []

    model = random_model(exact(config)).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    full = model(ids)
    torch.testing.assert_close(model(ids, last_only=True), full[:, -1:], atol=1e-4, rtol=1e-4)
    parts = [size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= LENGTH]
    parts += [1] * (LENGTH - sum(parts))
    check_cache(model, ids, full, parts, chunk, None)
    unequal = [i for i in range(len(plan)) for slots, _ in plan.attended(i) if len({*map(plan.kept, slots)}) > 1]
    if unequal:
        with pytest.raises(UserError, match="static"):
            KVCache(model.config, max_len=LENGTH)
    else:
        check_cache(model, ids, full, parts, chunk, LENGTH)

    for max_len in (None,) if unequal else (None, LENGTH):
        check_padding(model, ids, full, max_len)
    folder = tmp_path_factory.mktemp("exported")
    as_pretrained(model).save_pretrained(folder)
    loaded = CLLMForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, full)


FORMS: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"only": "values"}, "keys": {"share": 0}, "window": 4},
    {"own": {"tie": "kv"}},
    {"own": {"mix": [2, 0], "input": 1}},
    {"own": {"only": "keys", "input": 1}, "values": {"fuse": [2, 3], "granularity": "matrix"}},
    {"own": {"tie": "kv", "input": 3}, "keys": {"fuse": [2, 4, 5], "granularity": "complex"}},
]
"""Owners of every form; all tokens of a prompt reach layer 3 and none above."""
TAIL: list[dict[str, Any]] = [
    {"own": {}},
    {"own": {}, "window": 3},
    {"own": {"input": 0, "mix": [1]}, "window": 3},
    {"own": {"input": 0, "mix": [0, 2]}, "window": 2},
    {"keys": {"fuse": [2, 3]}, "values": {"fuse": [3, 2]}, "window": 2},
]
"""Of a prompt, layer 1 computes the last 3 tokens; layers 2 and 3 project all, and mix in slots of the last 3."""
CYCLIC_FORMS: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 3}, "values": {"share": 2}},
    {"own": {"tie": "kv", "input": 0}},
    {"own": {"mix": [2], "input": 1}, "values": {"fuse": [2, 3]}},
]


def listed(layers: list[dict[str, Any]], iterations: dict[str, int] | None = None) -> dict[str, Any]:
    """A `model` section with one entry for each layer."""
    return model([{"layers": i, **layer} for i, layer in enumerate(layers)], iterations)


LOOP: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"kv_norm": True}},
    {"keys": {"fuse": [0, 1]}, "values": {"share": 1}, "window": 4},
    {"own": {"kv_norm": True}, "keys": {"share": 1}, "values": {"fuse": [1, 3], "granularity": "matrix"}},
    {"keys": {"fuse": [1, 3]}, "values": {"share": 3}},
    {"own": {}},
]
"""Two turns of two layers, with layers around them."""
REUSE: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 0}, "values": {"share": 0}},
    {"read": {"gate": [0, {"own": {"window": 3}}], "gates": "complementary"}},
]
"""Three turns of a layer: the second reads the keys and values of the first, the third adds a window of its own."""


def looped(layers: list[dict[str, Any]], loop: dict[str, Any]) -> dict[str, Any]:
    """A section of `listed` with a loop."""
    section = listed(layers)
    return section | {"kv": section["kv"] | {"loop": loop}}


@settings(PROPERTY, max_examples=int(GIVEN or 15))
@example(section=listed(FORMS), sizes=EVEN, chunk=2)
@example(section=listed(TAIL), sizes=EVEN, chunk=4)
@example(section=looped(LOOP, {"layers": "1-2", "times": 2}), sizes=EVEN, chunk=2)
@example(section=looped(REUSE, {"layers": [0], "times": 3}), sizes=EVEN, chunk=2)
@example(section=listed(CYCLIC_FORMS, {"forward": 2, "backward": 2}), sizes=EVEN, chunk=2)
@given(section=formed(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_owners_of_every_form_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)


WINDOWED, SECOND = {"own": {"n_kv_heads": 2, "window": 3}}, {"own": {"tie": "kv", "window": 4}}
JOINS: list[dict[str, Any]] = [
    {"own": {}},
    {"read": {"join": [WINDOWED], "sink": True}},
    {"read": {"join": [{"own": {"input": 0}}, SECOND, {"share": 1, "window": 2}], "sink": True}},
    {"read": {"gate": [0, WINDOWED]}},
    {"read": {"gate": [2, {"share": 0, "window": 2}], "gates": "complementary"}},
    {"read": {"join": [0, {"share": 3, "window": 3}]}},
]
"""Reads of several slots, of every form."""
IN_A_CYCLE: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 3}, "values": {"share": 0}},
    {"read": {"join": [0, SECOND, {"own": {"window": 3}}], "sink": True}},
    {"own": {}, "values": {"fuse": [2, 3]}, "window": 3},
]


@settings(PROPERTY, max_examples=int(GIVEN or 6))
@example(section=listed(JOINS), sizes=EVEN, chunk=2)
@example(section=listed(IN_A_CYCLE, {"forward": 2, "backward": 2}), sizes=EVEN, chunk=2)
@given(section=joined(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_reads_of_several_slots_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)


SIZES: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"head_dim": 6, "n_kv_heads": 2, "tie": "kv"}},
    {"own": {"head_dim": 6, "n_kv_heads": 2, "mix": [1]}, "keys": {"share": 0}, "values": {"share": 0}, "window": 3},
    {"keys": {"fuse": [1, 2], "granularity": "complex"}, "values": {"fuse": [2], "granularity": "matrix"}, "window": 3},
    {"read": {"gate": [{"share": 1, "window": 3}, {"own": {"head_dim": 6, "window": 2}}]}},
    {"own": {"head_dim": 2, "input": 3}},
]
"""Heads of 4, 6 and 2 channels; layer 2 owns heads of 6 and reads heads of 4."""


@settings(PROPERTY, max_examples=int(GIVEN or 10))
@example(section=listed(SIZES), sizes=EVEN, chunk=2)
@given(section=sized(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_heads_of_several_sizes_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)


@settings(PROPERTY, max_examples=int(GIVEN or 8))
@given(
    section=everything(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4)
)
def test_plans_of_every_kind_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)
