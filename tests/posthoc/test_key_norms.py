"""Projecting methods, and recomputed keys and values, of models that normalise their keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.key_norm import KeyNorm
from cllm.posthoc.projecting import fisher_sizes
from cllm.posthoc.rank_search import SEARCHES
from cllm.posthoc.registry import parse
from tests.posthoc.filled import fill

PREFIX, LENGTH, SINKS = 20, 28, 4
SHARES = SEARCHES["search"].levels


@pytest.fixture(scope="module")
def normed(llama):
    """`normed("qwen3")`: a tiny transformers model with random gains; "one plus" is Qwen3 with Gemma's norm of keys."""

    def build(family, *, bias=False, kv_heads=2):
        shape = {**llama("llama").config.to_dict(), "num_key_value_heads": kv_heads}
        full = {"sliding_window": None, "layer_types": ["full_attention"] * 4}
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "initializer_range",
        )
        config, make, more = {
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
            "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, {}),
            # its norm gets (B, G, T, D)
            "exaone4": (transformers.Exaone4Config, transformers.Exaone4ForCausalLM, full),
        }["qwen3" if family == "one plus" else family]
        more = more | ({"attention_bias": True} if bias else {})
        torch.manual_seed(0)
        model = make(config(**{name: shape[name] for name in names}, **more)).eval().requires_grad_(False)
        if family == "one plus":
            for layer in model.model.layers:
                layer.self_attn.k_norm = Gemma3RMSNorm(8).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                start = 0.0 if family == "one plus" and "k_norm" in name else 1.0
                parameter.copy_(start + 0.4 * noise)
            elif name.endswith("_proj.bias"):
                parameter.copy_(noise)
        return model

    return build


@pytest.fixture
def normed_design(preset_config, random_model):
    """`normed_design("cla")`: a tiny model of a preset with norms on queries and keys."""
    return lambda name, **more: random_model(preset_config(name, qk_norm=True, **more)).eval().requires_grad_(False)


def decode(engine, ids, cache):
    """Logits (B, T, V) of a pass of several tokens, and of two of one token."""
    return torch.cat([engine.logits(part, cache) for part in ids.split([ids.shape[1] - 2, 1, 1], dim=1)], dim=1)


def expected_logits(engine, ids):
    return engine.logits(ids, engine.new_cache())[:, PREFIX:]


# ---- the norm -------------------------------------------------------------------------------------------------------


def test_gains_do_not_depend_on_how_a_class_writes_them():
    weight = torch.linspace(-1, 2, 8)
    for module, expected in ((Olmo2RMSNorm(8), weight), (nn.RMSNorm(8), weight), (Gemma3RMSNorm(8), 1 + weight)):
        with torch.no_grad():
            module.weight.copy_(weight)
        for dtype in (torch.float32, torch.bfloat16):
            rounded = weight.to(dtype).float()
            gains = KeyNorm.of(0, module.to(dtype), 24).per_channel(24)
            torch.testing.assert_close(gains.float(), (rounded + (expected - weight)).repeat(3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LayerNorm(8), "slot 3: the norm of its keys, LayerNorm, is not an RMSNorm"),
        (
            nn.Linear(8, 8),
            r"Linear, has a weight of shape \(8, 8\); allowed: an RMSNorm with a weight for each",
        ),
        (nn.RMSNorm(7), r"RMSNorm, has a weight of shape \(7,\)"),
        (nn.Identity(), "Identity, has a weight of shape None"),
    ],
)
def test_other_norms_are_refused(module, message):
    with pytest.raises(UserError, match=message):
        KeyNorm.of(3, module, 16)


def test_modules_that_change_keys_or_values_elsewhere_are_refused(llama):
    model = llama("llama")
    for name in ("key_layernorm", "v_norm", "k_layernorm", "qk_norm"):
        attention = model.model.layers[2].self_attn
        attention.add_module(name, nn.RMSNorm(8))
        with pytest.raises(UserError, match=f"slot 2: its keys or values pass through {name}, RMSNorm; allowed"):
            engine_of(model).projections(2)
        delattr(attention, name)
    engine_of(model).projections(2)


PADDED = ["palu:keep=0.5", "palu:keep=0.5,bits=4", "asvd:keep=0.5,allocation=search", "recompute"]

# ---- bases ----------------------------------------------------------------------------------------------------------

FULL = ["palu:keep=1.0,allocation=uniform", "asvd:ratio=1", "lorc:ratio=1,least=0.2", "palu:ratio=1,heads=1"]


@pytest.mark.parametrize("spec", FULL)
@pytest.mark.parametrize("name", ["mha", "gqa", "cla", "yoco", "fusedkv", "fusedkv_lite"])
def test_full_rank_reproduces_the_logits(name, spec, normed_design, tokens):
    model, ids = normed_design(name), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], spec, tokens(1, 30, seed=2))
    found = decode(engine, ids[:, PREFIX:], engine.compress(cache, method))
    torch.testing.assert_close(found, expected_logits(engine, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", FULL)
@pytest.mark.parametrize(
    ("family", "bias"), [("qwen3", False), ("qwen3", True), ("olmo2", True), ("exaone4", False), ("one plus", False)]
)
def test_full_rank_of_transformers_models(family, bias, spec, normed, tokens):
    model, ids = normed(family, bias=bias), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], spec, tokens(1, 30, seed=2))
    found = decode(engine, ids[:, PREFIX:], engine.compress(cache, method))
    torch.testing.assert_close(found, expected_logits(engine, ids), atol=1e-4, rtol=1e-4)


def slow_inputs(model, ids):
    """For each slot the inputs of its key projection (B, T, d_model)."""
    seen, hooks = {}, []
    engine = engine_of(model)
    for slot in engine.slots():

        def see(_, args, slot=slot):
            seen[slot] = args[0]

        hooks.append(engine.projections(slot)[0].register_forward_pre_hook(see))
    engine.hidden(ids, engine.new_cache())
    for hook in hooks:
        hook.remove()
    return seen


def slow_projection(linear, gains, joint, x, calibration, kind, rank, head_dim):
    """Keys (n, width) before RoPE of inputs `x` (n, d_model), normalised and projected.

    Loops over heads and tokens. The basis is that of g (W x' + b) for vectors x' of the method's second moment.
    """
    weight, bias = linear.weight.double(), linear.bias
    weight = torch.cat((weight, torch.zeros(len(weight), 1).double() if bias is None else bias.double()[:, None]), 1)
    rows = torch.cat((calibration.double(), torch.ones(len(calibration), 1).double()), 1)
    if kind == "asvd":
        rows = torch.diag(rows.abs().sqrt().mean(0) + 1e-6)
    elif kind == "lorc":
        rows = torch.eye(rows.shape[1]).double()
    width = len(weight) if joint else head_dim
    read = torch.empty(len(x), len(weight)).double()
    for first in range(0, len(weight), width):
        channels = slice(first, first + width)
        g = gains.double() if joint else gains.double()[:head_dim]
        before_norm = torch.stack([g * (weight[channels] @ row) for row in rows])
        vectors = torch.linalg.svd(before_norm, full_matrices=False)[2][:rank]
        for token, inputs in enumerate(x.double()):
            y = weight[channels] @ torch.cat((inputs, torch.ones(1).double()))
            k = g * y / (y.square().mean() + 1e-6).sqrt()
            read[token, channels] = sum((k @ v) * v for v in vectors)
    return read.float()


@pytest.mark.parametrize("spec", ["palu:keep=0.5,allocation=uniform", "asvd:keep=0.5", "lorc:keep=0.5,least=1"])
@pytest.mark.parametrize(
    "case", ["cllm", "cllm biased", "qwen3", "qwen3 biased", "olmo2", "olmo2 biased", "exaone4", "one plus"]
)
def test_low_rank_against_loops_over_heads_and_tokens(case, spec, normed, decoder, tokens):
    family, bias = case.removesuffix(" biased"), case.endswith("biased")
    if family == "cllm":
        model = decoder({"preset": "gqa"}, n_layers=2, qk_norm=True, kv_bias=bias)
        attentions, dims = [block.attention.owner for block in model.blocks], 8
    else:
        model = normed(family, bias=bias)
        attentions, dims = [layer.self_attn for layer in model.model.layers], 8
    ids, text = tokens(2, PREFIX), tokens(2, 40, seed=1)
    if family == "olmo2" and "palu" in spec:
        spec += ",heads=null"
    engine, cache, method = fill(model, ids, spec, text)
    compressed, xs, calibration = engine.compress(cache, method), slow_inputs(model, ids), slow_inputs(model, text)
    stores = compressed.stores if family == "cllm" else compressed.layers
    kind, joint = spec.split(":")[0], family == "olmo2"
    for slot in (0, 1):
        attention = attentions[slot]
        gains = attention.k_norm.weight + (1 if family == "one plus" else 0)
        rank = (attention.k_proj.out_features if joint else dims) // 2
        for row in range(2):
            expected = slow_projection(
                attention.k_proj, gains, joint, xs[slot][row, SINKS:], calibration[slot][:, SINKS:].flatten(0, 1),
                kind, rank, dims,
            )  # fmt: skip
            found = stores[slot].prefix.k.decode()[row].flatten(1)
            torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)


def test_values_keep_their_heads(decoder, tokens):
    model, ids = decoder(qk_norm=True, n_layers=2), tokens(2, PREFIX)
    for spec, values in (("palu", 1), ("asvd", 1), ("palu:heads=1", 4), ("lorc:allocation=uniform", 1)):
        full = f"{spec}{',' if ':' in spec else ':'}keep=0.5"
        engine, cache, method = fill(model, ids, full, tokens(1, 30))
        engine.compress(cache, method)
        ranks = method.facts()["ranks"]
        assert (len(ranks["0.k"]), len(ranks["0.v"])) == (4, values), spec


@pytest.mark.parametrize("spec", ["palu:keep=0.5,heads=2", "asvd:keep=0.5,heads=3", "lorc:keep=0.5,heads=null"])
def test_more_heads_for_a_basis_of_keys_are_refused(spec, decoder, normed, tokens):
    name, heads = spec.split(":")[0], spec.split("heads=")[1]
    for model in (decoder(qk_norm=True), normed("qwen3")):
        with pytest.raises(
            UserError, match=rf"{name}: heads={heads}: slot 0: the keys of each head are normalised by themselves"
        ):
            parse(spec).prepare(engine_of(model), tokens(1, 30))
    for model in (normed("olmo2"), normed("qwen3", kv_heads=1), decoder()):
        parse(spec).prepare(engine_of(model), tokens(1, 30))


@pytest.mark.parametrize(
    ("spec", "name"), [("asvd", "cllm"), ("palu:heads=1", "qwen3"), ("eigenattention", "qwen3"), ("lorc", "exaone4")]
)
def test_searched_ranks_are_those_of_approximated_keys(spec, name, normed, decoder, tokens):
    """Against models whose attention gets keys projected before RoPE."""
    model = decoder({"preset": "cla"}, n_layers=4, qk_norm=True) if name == "cllm" else normed(name)
    engine, text = engine_of(model), tokens(2, 24, seed=1)
    engine.head.weight.mul_(4)  # expect something
    method: Any = parse(f"{spec}{',' if ':' in spec else ':'}allocation=search,keep=0.5")
    method.prepare(engine, text)
    for slot in engine.slots()[:2]:
        found, norm = method._costs[slot, "k"], engine.key_norm(slot)
        for i in (1, 5):
            u = torch.block_diag(
                *(v[:, : max(1, int(SHARES[i] * len(v)))].float() for v in method._spectra[slot, "k"].vectors)
            )
            forward = norm.module.forward

            def changed(y, forward=forward, u=u):
                heads_first = name == "exaone4"
                k = forward(y).transpose(1, 2) if heads_first else forward(y)
                k = k.clone()
                flat = k[:, SINKS:].flatten(2)
                k[:, SINKS:] = (flat @ u @ u.T).view(k[:, SINKS:].shape)
                return k.transpose(1, 2) if heads_first else k

            norm.module.forward = changed
            logits = engine.logits(text[:, :-1], engine.new_cache())
            del norm.module.forward
            expected = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
            assert found[i] == pytest.approx(expected, abs=1e-5)
        assert max(found) - min(found) > 1e-3
    cache = engine.new_cache()
    engine.hidden(tokens(2, PREFIX), cache)
    engine.compress(cache, method)


def test_a_search_on_as_many_tokens_as_heads_is_refused(decoder, tokens):
    """Then the lengths of a tensor (B, tokens, heads, D) or (B, heads, tokens, D) do not show which axis is which."""
    for allocation, given in (("search", 5), ("errors", 4)):
        method = parse(f"asvd:keep=0.5,allocation={allocation},sinks=1")
        message = (
            rf"allocation={allocation}: of {given} calibration tokens 4 are read at once, as many as there are heads"
        )
        with pytest.raises(UserError, match=f"asvd: {message}"):
            method.prepare(engine_of(decoder(qk_norm=True)), tokens(2, given))


def test_ranks_follow_the_gradients_of_weights_before_a_norm(decoder, tokens):
    model, text = decoder(qk_norm=True, n_layers=2), tokens(2, 30)
    found = fisher_sizes(engine_of(model), text)
    squares: dict[str, torch.Tensor | float] = {}
    for row in text:
        grown = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}
        logits = torch.func.functional_call(model, grown, (row[None, :-1],))
        nn.functional.cross_entropy(logits[0], row[1:]).backward()
        for name, parameter in grown.items():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad.square()
    for slot in (0, 1):
        expected = squares[f"blocks.{slot}.attention.owner.k_proj.weight"].sqrt().mean().item()
        assert found[slot, "k"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spec", PADDED)
def test_a_padded_sequence_is_compressed_like_one_alone(spec, decoder, tokens):
    model, ids, start, text = decoder(qk_norm=True), tokens(1, 32), 8, tokens(2, 60, seed=1)
    double, starts = torch.cat((ids, ids.roll(1))), torch.tensor([start, 0])
    _, cache, method = fill(model, double[:, :24], spec, text, starts=starts)
    found = model(double[:, 24:25], cache=compress_cache(cache, method))[0]
    _, alone, method = fill(model, ids[:, start:24], spec, text)
    expected = model(ids[:, 24:25], cache=compress_cache(alone, method))[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["cla", "fusedkv"])
def test_later_tokens_join_the_bases(name, normed_design, tokens):
    model, ids = normed_design(name), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "palu:keep=0.5,every=4", tokens(2, 40, seed=1))
    compressed = engine.compress(cache, method)
    engine.logits(ids[:, PREFIX:], compressed)
    engine.hidden(ids[:, PREFIX:], cache)
    at_once = engine.compress(cache, method)
    first = min(compressed.stores)  # sees the same inputs in both
    found, expected = (stores[first].prefix.k.decode() for stores in (compressed.stores, at_once.stores))
    assert found.shape[1] == LENGTH - SINKS
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- recomputed keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_recomputed_keys_are_exact_at_half_the_bytes(padded, bias, tiny_config, random_model, tokens):
    config = tiny_config(kv={"preset": "mha"}, d_model=32, n_heads=4, head_dim=8, kv_bias=bias, qk_norm=True)
    model, ids = random_model(config).eval(), tokens(2, LENGTH)
    with torch.no_grad():
        padding = {"starts": torch.tensor([0, 3])} if padded else {}
        engine, cache, method = fill(model, ids[:, :PREFIX], "recompute", ids, **padding)
        compressed = engine.compress(cache, method)
        layers = len(model.blocks)
        assert engine.nbytes(cache) == layers * 2 * 2 * PREFIX * 32 * 4
        assert compressed.nbytes() == layers * 2 * 4 * (32 * (PREFIX - SINKS) + 2 * 32 * SINKS)
        assert compressed.outcome.read_flops == layers * 2 * (PREFIX - SINKS) * 2 * 32 * 2 * 32
        method.release()
        for part in ids[:, PREFIX:].split([5, 1, 2], dim=1):
            torch.testing.assert_close(
                engine.logits(part, compressed), engine.logits(part, cache), atol=1e-5, rtol=1e-5
            )
    prefix = compressed.stores[0].prefix
    assert not prefix.k.decode().requires_grad
    assert not prefix.v.decode().requires_grad


@pytest.mark.parametrize(
    ("family", "bias"), [("qwen3", False), ("qwen3", True), ("olmo2", False), ("exaone4", False), ("one plus", False)]
)
def test_recomputed_keys_of_transformers_models(family, bias, normed, tokens):
    model, ids = normed(family, bias=bias, kv_heads=4), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "recompute", ids)
    compressed = engine.compress(cache, method)
    assert compressed.nbytes() == 4 * 2 * 4 * (32 * (PREFIX - SINKS) + 2 * 32 * SINKS)
    found = decode(engine, ids[:, PREFIX:], compressed)
    torch.testing.assert_close(found, expected_logits(engine, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cla", "fusedkv", "fusedkv_lite"])
def test_recomputed_keys_of_shared_slots(name, normed_design, tokens):
    model, ids = normed_design(name), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "recompute", ids)
    found = decode(engine, ids[:, PREFIX:], engine.compress(cache, method))
    torch.testing.assert_close(found, expected_logits(engine, ids), atol=1e-5, rtol=1e-5)


def test_what_normalised_keys_cannot_do(decoder, tokens):
    model, text = decoder(qk_norm=True), tokens(2, 30)
    for spec, message in (
        ("recompute:every=4", r"recompute: every=4: slot 0: its keys are normalised .*least squares cannot find"),
        ("recompute:rank=8,fit=input", r"recompute: fit=input: slot 0: its keys are normalised .*allowed: fit=kv"),
        ("commonkv", r"commonkv: slot 0: its keys are normalised .*merged latent"),
        ("kvquant:levels=fisher", r"kvquant: levels=fisher needs gradients .*slot 0: its keys are normalised"),
    ):
        with pytest.raises(UserError, match=message):
            fill(model, text, spec, text)
    engine, cache, method = fill(model, text, "recompute:rank=8,every=4", text)  # keys as they are
    engine.logits(text[:, :4], engine.compress(cache, method))


def test_values_of_a_model_with_normalised_keys_are_folded(decoder, tokens):
    model, ids = decoder(qk_norm=True), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "vfold:recent=4", tokens(2, 60, seed=1))
    changed, folded = method.folded(engine)
    twin = changed.new_cache()
    changed.hidden(ids[:, :PREFIX], twin)
    found = changed.logits(ids[:, PREFIX:], changed.compress(twin, folded))
    expected = engine.logits(ids[:, PREFIX:], engine.compress(cache, method))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
