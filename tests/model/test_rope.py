"""Rotary embedding: the rotation, its layout, and how scores depend on positions. Scalings: see test_hf_parity.py."""

import math

import pytest
import torch

from cllm.config import Rope
from cllm.model.rope import apply_rope, rope_frequencies, rope_table
from cllm.plan.presets import preset_names

SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 64},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64},
}


def test_channel_j_is_rotated_with_channel_j_plus_half():
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, rope_table(Rope(theta=100.0), 8, torch.tensor([[5]])))[0, 0, 0]
    for j in range(4):
        pair = torch.complex(x[0, 0, 0, j], x[0, 0, 0, j + 4]) * torch.exp(1j * torch.tensor(5 * 100.0 ** (-2 * j / 8)))
        torch.testing.assert_close(turned[j], pair.real)
        torch.testing.assert_close(turned[j + 4], pair.imag)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scores_depend_on_the_distance_only(scaling):
    rope = Rope(scaling=SCALINGS[scaling])
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> float:
        turned = [apply_rope(x, rope_table(rope, 16, torch.tensor([[p]]))) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    for m, n in ((3, 1), (9, 9), (40, 7)):
        assert score(m, n) == pytest.approx(score(m + 100, n + 100), abs=1e-4)


def test_linear_scaling_divides_positions():
    plain, _ = rope_frequencies(Rope(), 16)
    scaled, factor = rope_frequencies(Rope(scaling=SCALINGS["linear"]), 16)
    torch.testing.assert_close(scaled, plain / 4)
    assert factor == 1


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain, _ = rope_frequencies(Rope(), 32)
    scaled, _ = rope_frequencies(Rope(scaling=SCALINGS["llama3"]), 32)
    turns = 64 * plain / (2 * math.pi)  # within the original context
    torch.testing.assert_close(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_multiplies_cos_and_sin():
    _, factor = rope_frequencies(Rope(scaling=SCALINGS["yarn"]), 16)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    cos, _ = rope_table(Rope(scaling=SCALINGS["yarn"]), 16, torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(cos, torch.full_like(cos, factor))
    given = Rope(scaling={**SCALINGS["yarn"], "attention_factor": 1.0})
    assert rope_frequencies(given, 16)[1] == 1


def test_rotation_is_computed_in_fp32_for_bf16_inputs():
    """At position 4095 bf16 angles would be off by many turns."""
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rope_table(Rope(), 16, torch.tensor([[4095]]))
    assert table[0].dtype == torch.float32
    turned = apply_rope(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), table).bfloat16())


def test_angles_far_away_are_those_of_fp64():
    """In fp32 a product of position and frequency is off by up to half of 0.0078 at 70,000 and of 0.06 at a million."""
    positions = torch.tensor([[0, 1, 63, 69_952, 70_001, 999_999]])
    frequencies, _ = rope_frequencies(Rope(), 16)
    cos, sin = rope_table(Rope(), 16, positions)
    for i, position in enumerate(positions[0].tolist()):
        for j, frequency in enumerate(frequencies.tolist()):
            assert cos[0, i, 0, 0, j].item() == pytest.approx(math.cos(position * frequency), abs=2e-7)
            assert sin[0, i, 0, 1, j].item() == pytest.approx(math.sin(position * frequency), abs=2e-7)


@pytest.mark.parametrize("name", [*preset_names(), "yoco with retention"])
def test_logits_of_every_preset_do_not_change_when_all_positions_shift(name, preset_config, random_model):
    model = random_model(preset_config(name))
    ids = torch.randint(32, (1, 10), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, positions + 41), model(ids, positions), atol=2e-4, rtol=1e-4)


def test_positions_are_counted_from_zero_by_default_and_matter(preset_config, random_model):
    model = random_model(preset_config("mha"))
    ids = torch.randint(32, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, torch.arange(10)[None]))
        assert (model(ids) - model(ids, 3 * torch.arange(10)[None])).abs().max() > 1e-2
