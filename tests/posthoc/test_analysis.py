"""Measures of similarity against known values, and scripts/analyze.py."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cllm.posthoc.analysis import analyze, cka, collect, cosine, effective_rank, spectrum
from cllm.posthoc.engine import engine_of


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cka_sees_what_a_rotation_hides_from_cosine():
    x = noise(200, 8)
    turn = torch.linalg.qr(noise(8, 8, seed=1)).Q
    assert cosine(x, 3 * x) == pytest.approx(1)
    assert abs(cosine(x, x @ turn)) < 0.5
    assert cka(x, 2 * x @ turn + 5) == pytest.approx(1)
    assert cka(x, noise(200, 8, seed=2)) < 0.2


def test_cka_is_the_kernel_formula():
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = XXᵀ, centred: Kornblith et al., eq. 1 to 3."""
    x, y = noise(30, 5).double(), noise(30, 7, seed=1).double()
    centre = torch.eye(30).double() - 1 / 30

    def hsic(k, m):
        return torch.trace(k @ centre @ m @ centre)

    k, m = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx((hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item())


def test_effective_rank():
    assert effective_rank(torch.ones(7).double()) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0, 0]).double()) == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(p.double()) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p.tolist())))


def test_ranks_of_groups_find_a_shared_subspace():
    """Four slots in one subspace of 3 dimensions over tokens: a group of any size has rank 3."""
    basis = noise(100, 3)
    slots = {i: basis @ noise(3, 16, seed=i) for i in range(4)}
    found = analyze(slots, groups=(1, 2, 4), energy=0.9999)
    assert found["energy_rank"] == {"1": [3, 3, 3, 3], "2": [3, 3], "4": [3]}
    assert found["slots"] == [0, 1, 2, 3]
    torch.testing.assert_close(spectrum(slots[0])[3:].max(), torch.tensor(0.0).double(), atol=1e-4, rtol=0)
    mixed = analyze({0: noise(50, 4), 1: noise(50, 6)}, groups=(2,), energy=0.9)
    assert mixed["cosine"][0][1] is None
    assert mixed["energy_rank"] == {"2": []}


def test_keys_before_and_after_rope(decoder, tokens):
    """One repeated token: its keys in the first layer are equal before RoPE, and differ after it."""
    model = decoder(n_layers=2)
    found = collect(engine_of(model), [torch.full((1, 20), 3), torch.full((1, 20), 3)])
    assert list(found) == ["keys_before_rope", "keys", "values"]
    assert {slot: tuple(x.shape) for slot, x in found["values"].items()} == {0: (40, 32), 1: (40, 32)}
    assert effective_rank(spectrum(found["keys_before_rope"][0])) < 1.01
    assert effective_rank(spectrum(found["keys"][0])) > 2


def test_latents(decoder, tokens, llama):
    mla = {"preset": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    found = collect(engine_of(decoder(kv=mla, n_layers=2)), [tokens(2, 9)])
    assert {kind: {j: tuple(x.shape) for j, x in slots.items()} for kind, slots in found.items()} == {
        "latents": {0: (18, 12), 1: (18, 12)}
    }
    assert list(collect(engine_of(llama("deepseek_v3")), [tokens(1, 9)])) == ["latents"]


def test_the_command(analyze_command, run, capsys):
    made, _ = run(kv={"preset": "cla"})
    assert analyze_command(made.path, "--device", "cpu", "--sequences", 2, "--group", 1, 2) == 0
    record = json.loads((made.evaluation_folder / "analysis-validation.json").read_text())
    assert (record["sequences"], record["length"]) == (2, 48)
    assert list(record["kinds"]) == ["keys_before_rope", "keys", "values"]
    keys = record["kinds"]["keys"]
    assert keys["slots"] == [0, 2]
    assert keys["tokens"] == 96
    assert keys["cka"][0][0] == pytest.approx(1)
    assert keys["cka"][0][1] == pytest.approx(keys["cka"][1][0])
    assert (made.evaluation_folder / "analysis-validation.png").stat().st_size > 10_000
    assert analyze_command(made.path, "--energy", 1.5) == 2
    assert "--energy is 1.5; allowed: above 0, up to 1" in capsys.readouterr().err
