"""Slots with heads of a size of their own: bytes and sizes by hand, tools that follow it, tools that refuse it.

Logits, gradients, caches and exports are in tests/model/test_reference.py and tests/plan/test_random_plans.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cllm
from cllm.cache.accounting import cache_bytes, kv_bytes
from cllm.config import Config, ModelConfig
from cllm.errors import UserError
from cllm.hub.batching import check_batchable
from cllm.hub.export import as_pretrained
from cllm.hub.families import export_family
from cllm.model.context import Context
from cllm.model.rope import rope_table
from cllm.model.sizes import count_parameters, layer_flops_per_token, meta_decoder
from cllm.plan.describe import plan_table
from cllm.plan.explicit import plan_entries
from cllm.plan.picture import plan_figure
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse
from cllm.serve.vllm.layout import make_layout
from cllm.train.dryrun import dry_run

WIDE: dict[str, Any] = {"n_kv_heads": 1, "head_dim": 16, "tie": "kv"}
GEMMA: dict[str, Any] = {
    "layers": [
        {"layers": [0, 1, 3, 4], "own": {"n_kv_heads": 2}, "window": 10},
        {"layers": [2, 5], "own": WIDE},
        {"layers": 6, "keys": {"share": 4}, "values": {"share": 4}, "window": 10},
        {"layers": 7, "keys": {"share": 5}, "values": {"share": 5}},
    ]
}
"""The shape of Gemma 4: larger heads, whose keys and values are one projection, in layers without a window; the last
layers share the slot of the last owner of their kind."""
PAIRS: dict[str, Any] = {
    "layers": [
        {"layers": [0, 1], "own": {"n_kv_heads": 2}},
        {"layers": [2, 3], "own": {"n_kv_heads": 1, "head_dim": 16}},
        {"layers": 4, "read": {"share": 3}},
    ]
}
READS_0: dict[str, Any] = {"keys": {"share": 0}, "values": {"share": 0}}
READ_2: dict[str, Any] = {"share": 2}
IDS = torch.randint(32, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def wide(tiny_config, random_model):
    """`wide(GEMMA)`: a tiny model of 4 query heads, of 8 channels where the plan names none."""

    def build(kv: dict[str, Any], **model: Any):
        layers = 1 + max(max(e["layers"]) if isinstance(e["layers"], list) else e["layers"] for e in kv["layers"])
        return random_model(tiny_config(kv=kv, n_layers=layers, **model)).eval().requires_grad_(False)

    return build


# ---- numbers by hand -------------------------------------------------------------------------------------------------


def test_bytes_of_windowed_and_wide_slots(tiny_config) -> None:
    config = tiny_config(kv=GEMMA)
    found = kv_bytes(config, context=100)
    windowed, tied = 2 * 2 * 8 * 2, 1 * 16 * 2  # bytes of a token in bf16: 2 x 2 heads x 8, and 1 head x 16 once
    assert found.written == 4 * windowed + 2 * tied
    assert found.resident * 100 == 4 * windowed * 10 + 2 * tied * 100
    assert found.read * 100 == 5 * windowed * 10 + 3 * tied * 100
    assert cache_bytes(config, context=100, batch=3) == 3 * (4 * windowed * 10 + 2 * tied * 100)
    assert kv_bytes(config, context=100, storage="fp8").written == 4 * (32 + 2 * 4) + 2 * (16 + 2 * 1)


def test_parameters_and_flops(tiny_config) -> None:
    model = meta_decoder(tiny_config(kv=GEMMA, qk_norm=True))
    d, rest = 24, 3 * 24 * 32 + 2 * 24  # the MLP and two norms
    small = 2 * d * 4 * 8 + 8  # queries and output of 4 heads of 8, and the norm of queries
    large = 2 * d * 4 * 16 + 16
    layers = 4 * (small + 2 * d * 2 * 8 + 8) + 2 * (large + d * 16 + 16) + small + large + 8 * rest
    assert count_parameters(model) == layers + 2 * 32 * d + d
    flops = layer_flops_per_token(model, 10)
    seen = 11 / 2  # keys that a query of 10 tokens sees on average
    assert flops[2] == 2 * (2 * d * 4 * 16 + d * 16 + 3 * d * 32) + 2 * 4 * 2 * 16 * seen
    assert flops[7] == 2 * (2 * d * 4 * 16 + 3 * d * 32) + 2 * 4 * 2 * 16 * seen
    fused = [
        *PAIRS["layers"][:2],
        {"layers": 4, "keys": {"fuse": [2]}, "values": {"fuse": [2], "granularity": "matrix"}},
    ]
    config = tiny_config(kv={"layers": fused}, n_layers=5)
    flops_fused = layer_flops_per_token(meta_decoder(config), 10)[4]
    assert flops_fused == 2 * (2 * d * 4 * 16 + 3 * d * 32) + 2 * 4 * 2 * 16 * seen + 2 * 16 * 16
    assert flops[6] == 2 * (2 * d * 4 * 8 + 3 * d * 32) + 2 * 4 * 2 * 8 * seen


def test_the_dry_run_shows_the_sizes(tiny_config) -> None:
    model = {**tiny_config(kv=GEMMA).model_dump(), "kv": GEMMA}
    report = dry_run(Config.model_validate({"model": model, "data": {"path": "nowhere", "seq_len": 64}}))
    assert "8 layers, d_model 24, 4 heads of 8 (layers 0-1, 3-4, 6), 16 (layers 2, 5, 7), d_ff 32" in report
    assert "2      1 KV head of 16, K = V  own   own     all" in report


def test_the_picture_shows_the_sizes(tiny_config) -> None:
    figure = plan_figure(tiny_config(kv=GEMMA).plan(), "sizes")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("1 KV head of 16, K = V" in text for text in texts) == 2


def test_the_size_of_the_model_is_no_size_of_a_slot(tiny_config) -> None:
    """`head_dim` that repeats the model's is the plan without it; others survive a round trip through YAML."""
    alike = {"layers": [{"layers": "0-7", "own": {"head_dim": 8}}]}
    assert tiny_config(kv=alike).plan() == tiny_config(kv={"preset": "mha"}).plan()
    plan = tiny_config(kv=GEMMA).plan()
    assert {"layers": [2, 5], "own": WIDE} in plan_entries(plan)
    assert tiny_config(kv={"layers": plan_entries(plan)}).plan() == plan
    assert "1 KV head of 16, K = V" in plan_table(plan)


def test_all_tables_are_computed_before_the_layers_run(wide, monkeypatch) -> None:
    """Compiled layers must not compute them."""
    made: list[int] = []

    def recorded(rope, dim, positions):
        made.append(dim)
        return rope_table(rope, dim, positions)

    monkeypatch.setattr("cllm.model.context.rope_table", recorded)
    model = wide(
        {"layers": [*PAIRS["layers"][:1], {"layers": 2, "own": WIDE, **READS_0}, {"layers": 3, "read": READ_2}]}
    )
    cache = engine_of(model).new_cache()
    prepare = Context.prepare
    before: list[int] = []

    def counted(self, *args):
        prepare(self, *args)
        before.append(len(made))

    monkeypatch.setattr(Context, "prepare", counted)
    for ids in (IDS[:, :5], IDS[:, 5:6]):
        model(ids, cache=cache)
        assert len(made) == before[-1]
    assert set(made) == {8, 16}


# ---- tools that follow it --------------------------------------------------------------------------------------------


def test_generate_equals_full_passes(wide) -> None:
    model = as_pretrained(wide(GEMMA, qk_norm=True))
    out = model.generate(IDS[:, :12], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for t in range(12, 20):
        assert out[0, t] == model(out[:, :t]).logits[0, -1].argmax()


@pytest.mark.parametrize(
    "spec",
    [
        "xkv:group=2,energy=1.0",
        "xkv:group=2,energy=1.0,weight=queries",
        "palu:keep=1.0,heads=1,allocation=uniform",
        "eigenattention:keep=1.0",
        "vfold:group=2,recent=40",
    ],
)
def test_compression_that_loses_nothing(spec, wide) -> None:
    model = wide(PAIRS)
    engine, method = engine_of(model), parse(spec)
    method.prepare(engine, IDS)
    cache = engine.new_cache()
    with method.watch(engine):
        engine.hidden(IDS[:, :30], cache)
    compressed = engine.compress(cache, method)
    found = torch.cat([engine.logits(IDS[:, t : t + 1], compressed) for t in range(30, 40)], dim=1)
    torch.testing.assert_close(found, model(IDS)[:, 30:], atol=1e-4, rtol=1e-4)


def test_bits_of_heads_count_by_their_channels(wide) -> None:
    """Of 26 tokens without sinks: 4 units of keys and 4 of values of 8 channels, 2 and 2 of 16."""
    cache = cllm.compress(as_pretrained(wide(PAIRS)), IDS[:, :30], "turboquant:mean_bits=2.5")
    codes = [code for store in cache.stores.values() for code in (store.prefix.k, store.prefix.v)]
    units = [
        (bits, 16 if code.parts[0].width[1] == 16 else 8)
        for code in codes
        for bits, h in zip(code.bits, code.heads, strict=True)
        for _ in h
    ]
    assert sorted(dim for _, dim in units) == [8] * 8 + [16] * 4
    assert 2.5 * 128 - 16 < sum(bits * dim for bits, dim in units) <= 2.5 * 128
    packed = sum(bits * dim * 26 // 8 for bits, dim in units)
    assert cache.nbytes() == packed + 26 * 12 * 4 + 4 * 128 * 4


@pytest.mark.parametrize("method", ["xkv:group=4,ratio=1.5", "kvtc:group=4,ratio=1.5", "vfold:group=4"])
def test_a_group_has_heads_of_one_size(method, wide) -> None:
    model = as_pretrained(wide(PAIRS))
    with pytest.raises(UserError, match=r"group=4: a group mixes shapes") as error:
        cllm.compress(model, IDS, method)
    assert "slot 0 has (2, 8) a token" in str(error.value)
    assert "slot 2 has (1, 16) a token" in str(error.value)


def test_a_stored_prefix_is_read_with_the_rope_of_each_slot(wide, tmp_path) -> None:
    model = as_pretrained(wide(PAIRS, max_seq_len=128)).eval()
    cache = cllm.compress(model, IDS, "xkv:group=2,ratio=1.5,sinks=2")
    cllm.save_prefix(tmp_path / "p", cache, model, IDS)
    again, _ = cllm.load_prefix(tmp_path / "p", model)
    for following in ([[7]], [[8, 9]]):  # a pass of one token reads the factors, others the rebuilt keys
        ids = torch.tensor(following)
        assert torch.equal(model.model(ids, cache=cache), model.model(ids, cache=again))


# ---- tools that refuse it --------------------------------------------------------------------------------------------


def test_servers_and_other_families_refuse_it(wide, tiny_config, tmp_path) -> None:
    model = wide(PAIRS)
    with pytest.raises(UserError, match=r"layer 2 owns heads of 16 channels, not of model.head_dim"):
        make_layout(model.plan, 4, 8)
    alike = {"layers": [{"layers": 0, "own": {}}, {"layers": 1, "own": {"head_dim": 16}}]}
    with pytest.raises(UserError, match=r"layer 1 stores heads of 16 channels and model.head_dim is 8"):
        check_batchable(wide(alike))
    other = wide(alike)
    with pytest.raises(UserError, match=r"layer 1: has heads of 16 channels, not of model.head_dim"):
        export_family(other.config, other.state_dict(), tmp_path / "llama", "llama")


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "fused": (
        [{"own": {}}, {"own": {"head_dim": 16}}, {"keys": {"fuse": [0, 1]}, "values": {"share": 0}}],
        "layer 2: keys: cannot fuse slots of different shapes: layer 0 has model.head_dim channels a head, layer 1 has "
        "16 channels a head",
    ),
    "keys and values": (
        [{"own": {}}, {"own": {"head_dim": 16}, "keys": {"share": 0}}],
        "layer 1: its keys have model.head_dim channels a head (slot 0) and its values 16 (slot 1); they must be equal",
    ),
    "mixed": (
        [{"own": {"head_dim": 16}}, {"own": {"mix": [0]}}],
        "layer 1: mixes the keys and values of layer 0, which owns 4 KV heads of 16; allowed: owners of keys and "
        "values with 4 KV heads of model.head_dim channels",
    ),
    "joined": (
        [{"own": {"head_dim": 16}}, {"read": {"join": [0, {"own": {"head_dim": 6}}]}}],
        "layer 1: join: cannot read slots of different head sizes: slot 0 has 16 channels a head, slot 1 has 6 "
        "channels a head",
    ),
    "gated with a second own slot": (
        [{"read": {"gate": [{"own": {"head_dim": 6}}, {"own": {"window": 2}}]}}],
        "layer 0: gate: cannot read slots of different head sizes: slot 0 has 6 channels a head, the second own slot "
        "has model.head_dim channels a head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_layer(case, tiny_config) -> None:
    layers, message = REFUSED[case]
    entries = [{"layers": i, **layer} for i, layer in enumerate(layers)]
    with pytest.raises(ValueError, match=r"^1 validation error") as error:
        tiny_config(kv={"layers": entries}, n_layers=len(layers))
    assert message in str(error.value)


def test_turns_of_a_loop_have_one_size(tiny_config) -> None:
    """Layer 3 has the queries of layer 1, which has small heads, and reads a slot of large ones."""
    layers = [
        {"layers": 0, "own": {"head_dim": 16}},
        {"layers": [1, 2], "own": {}},
        {"layers": 3, "keys": {"share": 0}, "values": {"share": 0}},
        {"layers": 4, "own": {}},
    ]
    with pytest.raises(
        ValueError, match=r"layer 3: reads 4 KV heads of 16, and layer 1, .* with heads of the same size"
    ):
        tiny_config(kv={"layers": layers, "loop": {"layers": "1-2", "times": 2}}, n_layers=5)


def test_a_cache_of_other_sizes_is_of_another_model(wide) -> None:
    model, other = wide(PAIRS), wide({"layers": [{"layers": [0, 1, 2, 3, 4], "own": {}}]})
    cache = engine_of(other).new_cache()
    other(IDS, cache=cache)
    with pytest.raises(UserError, match=r"its KV plan is not the model's"):
        model(IDS, cache=cache)


def test_model_config_keeps_the_setting() -> None:
    config = ModelConfig(vocab_size=32, d_model=32, n_heads=4, n_layers=8, kv=GEMMA)
    assert ModelConfig.model_validate(config.model_dump()).plan() == config.plan()
