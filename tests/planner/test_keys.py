"""Which plans of models of different sizes are one design for `cllm plan`."""

from __future__ import annotations

import json

import pytest

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.presets import PRESETS
from cllm.planner.collect import read_losses
from cllm.planner.keys import Size, config_key, plan_key

SAME_AT_ANY_DEPTH = {
    "factor": "a period", "group": "a period", "full_every": "a period", "n_gated": "a period",
    "times": "turns of the same layers", "window": "tokens", "blocks": "parts of a latent",
    "dense_front": "single layers", "dense_back": "single layers", "warmup": "single layers",
    "n_kv_heads": "heads", "lower_kv_heads": "heads", "kv_lora_rank": "width", "q_lora_rank": "width",
    "qk_nope_head_dim": "width", "qk_rope_head_dim": "width", "v_head_dim": "width",
}  # fmt: skip
"""Settings of presets with whole numbers that are no share of the layers."""


def key(n_layers: int, *, heads: int = 4, head_dim: int = 64, **kv: object) -> str | None:
    return config_key(ModelConfig(d_model=heads * head_dim, head_dim=head_dim, n_layers=n_layers, n_heads=heads, kv=kv))


def test_every_number_of_a_preset_is_known_to_depend_on_the_depth_or_not():
    for name, preset in PRESETS.items():
        numbers = {key for key, field in preset.model_fields.items() if "int" in str(field.annotation)}
        if preset.__module__.startswith("cllm."):
            assert numbers - SAME_AT_ANY_DEPTH.keys() == preset.of_depth().keys(), f"{name}: mark it, or say why not"


@pytest.mark.parametrize(
    ("preset", "setting"),
    [("swiftkv", "n_lower"), ("yoco", "n_lower"), ("ced", "n_lower"), ("fusedkv", "n_storage"),
     ("trailing", "n_shared"), ("afm", "n_shared"), ("yoco_pp", "n_owners"),
     ("sandwich_bottom", "n_owners"), ("yoco_u", "n_lower")],
)  # fmt: skip
def test_counts_of_layers_are_shares_of_the_depth(preset, setting):
    def of(n_layers: int, count: int) -> str | None:
        return key(n_layers, preset=preset, **{setting: count})

    sixth = {of(n, n // 6) for n in (12, 24, 48)}
    assert len(sixth) == 1
    assert None not in sixth
    assert of(24, 2) not in sixth, "two layers are a sixth of 12 and a twelfth of 24"
    assert of(14, 2) == of(28, 4), "a share that is no whole number of the layers of the reference"
    assert of(14, 2) not in {of(24, 3), of(24, 4), None}


def test_periods_stay_and_single_layers_do_while_the_share_of_slots_does():
    assert key(12, preset="cla", factor=3) == key(24, preset="cla", factor=3) == key(13, preset="cla", factor=3)
    assert key(12, preset="cla", dense_front=1) == key(24, preset="cla", dense_front=1)
    assert key(12, preset="cla", dense_front=1) != key(12, preset="cla")
    assert key(12, preset="lckv") != key(24, preset="lckv"), (
        "three slots are a quarter of 12 layers and an eighth of 24"
    )
    assert key(12, preset="lckv") == key(12, heads=8, preset="lckv")
    assert key(12, preset="cla", dense_front=3) != key(24, preset="cla", dense_front=3)


def test_settings_that_name_layers_hold_at_their_depth_only():
    sources = [0, 3, 5]
    assert key(12, preset="fusedkv", sources=sources) == key(12, heads=8, preset="fusedkv", sources=sources)
    assert key(12, preset="fusedkv", sources=sources) != key(24, preset="fusedkv", sources=sources)
    assert key(12, preset="fusedkv", sources=[0, 5]) == key(24, preset="fusedkv", sources=[0, 11]), "the default"


def test_latents_and_different_numbers_of_kv_heads_hold_for_their_heads_only():
    assert key(12, heads=8, preset="mla", kv_lora_rank=480) == key(24, heads=8, preset="mla", kv_lora_rank=480)
    assert key(12, heads=8, preset="mla", kv_lora_rank=480) != key(12, heads=16, preset="mla", kv_lora_rank=480)
    assert key(12, heads=8, preset="mla") != key(12, heads=16, preset="mla"), "another share of mha's bytes"
    assert key(12, heads=8, head_dim=32, preset="mla") != key(12, heads=8, preset="mla")
    lower = {"preset": "yoco", "lower_kv_heads": 4}
    assert key(12, heads=8, n_kv_heads=2, **lower) != key(12, heads=8, n_kv_heads=1, **lower)
    assert key(12, heads=8, n_kv_heads=2, **lower) == key(24, heads=8, n_kv_heads=2, **lower)
    assert key(12, heads=8, n_kv_heads=2, **lower) != key(12, heads=16, n_kv_heads=2, **lower)


def test_a_plan_that_is_spelled_out_is_that_of_a_preset_or_of_its_own_depth():
    def spelled(n_layers: int, last_source: int) -> list:
        half = n_layers // 2
        read = {"layers": f"{half}-{n_layers - 1}", "keys": {"share": last_source}, "values": {"share": 0}}
        return [{"layers": f"0-{half - 1}", "own": {}}, read]

    lite = key(24, preset="fusedkv_lite")
    assert key(12, layers=spelled(12, 5)) == key(8, layers=spelled(8, 3)) == lite
    other = key(12, layers=spelled(12, 4))
    assert other not in {lite, None, key(24, layers=spelled(24, 4))}
    assert other == key(12, layers=spelled(12, 4))


@pytest.mark.parametrize(
    ("entry", "missing"),
    [
        (
            {"kv": {"preset": "swiftkv", "n_lower": 4}, "query_heads_per_kv_head": 1},
            "n_layers is missing, which n_lower",
        ),
        (
            {"kv": {"preset": "fusedkv", "sources": [0, 2]}, "query_heads_per_kv_head": 1},
            "n_layers is missing, which sou",
        ),
        ({"kv": {"preset": "mla"}}, "n_heads is missing"),
        ({"kv": {"preset": "mla"}, "n_heads": 8}, "head_dim is missing"),
    ],
)
def test_a_table_has_the_size_that_a_plan_depends_on(tmp_path, entry, missing):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"losses": [{**entry, "loss_change": 0.1}]}))
    with pytest.raises(UserError, match=rf"--losses .*t\.json: losses\.0: {missing}"):
        read_losses(path)


def test_settings_without_a_reference_hold_at_their_own_depth():
    odd = {"preset": "swiftkv", "n_lower": 7}
    assert key(23, **odd) == key(23, heads=8, **odd) is not None, "a multiple of 48 and 23 is too deep"
    assert key(23, **odd) != key(46, preset="swiftkv", n_lower=14)
    assert plan_key({"preset": "nosuch"}, 1, Size()) is None
