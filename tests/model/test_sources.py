"""Fused reads: shapes, starting points, which layers have weights, and the scores that their keys give."""

import pytest
import torch

from cllm.cache.slot import Slot
from cllm.model.decoder import Decoder
from cllm.model.fusion import WeightedRead
from cllm.model.sizes import layer_flops_per_token
from cllm.model.sources import FusedRead
from cllm.plan.plan import Fuse, Latent, Own, Retention
from cllm.plan.presets import preset_names

G, D = 2, 8


def fused(part: str, layers=(0, 3), **options) -> FusedRead:
    read = FusedRead(Fuse(layers, **options), layers, part, G, D)
    read.reset_parameters()
    return read


def slots(dtype=torch.float32) -> dict[int, Slot]:
    generator = torch.Generator().manual_seed(0)
    return {j: Slot(*(torch.randn(2, 5, G, D, generator=generator).to(dtype) for _ in "kv")) for j in (0, 1, 3)}


@pytest.mark.parametrize(
    ("part", "options", "shape"),
    [
        ("k", {}, (2, 1, D // 2)),
        ("v", {}, (2, 1, D)),
        ("k", {"per_head": True}, (2, G, D // 2)),
        ("v", {"per_head": True}, (2, G, D)),
        ("k", {"granularity": "scalar"}, (2, 1, 1)),
        ("v", {"granularity": "scalar"}, (2, 1, 1)),
        ("k", {"granularity": "scalar", "per_head": True}, (2, G, 1)),
        ("v", {"granularity": "scalar", "per_head": True}, (2, G, 1)),
    ],
)
def test_shape_of_fusion_weights(part, options, shape):
    assert fused(part, **options).weight.shape == shape


def test_keys_have_one_weight_for_each_rotated_pair():
    weights = fused("k", init="randn").channel_weights()
    assert weights.shape == (2, 1, D)
    assert torch.equal(weights[..., : D // 2], weights[..., D // 2 :])


@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_lite_starts_with_the_last_keys_and_the_first_values(granularity):
    read = slots()
    keys = fused("k", (0, 1, 3), granularity=granularity, init="lite")
    values = fused("v", (0, 1, 3), granularity=granularity, init="lite")
    assert torch.equal(keys(read), read[3].k)
    assert torch.equal(values(read), read[0].v)


def test_mean_starts_with_the_mean():
    read = slots()
    expected = (read[0].k + read[1].k + read[3].k) / 3
    torch.testing.assert_close(fused("k", (0, 1, 3), init="mean")(read), expected)


def test_randn_starts_with_normal_weights():
    torch.manual_seed(0)
    read = FusedRead(Fuse((0, 3), per_head=True, init="randn"), (0, 3), "v", 64, 64)
    read.reset_parameters()
    assert abs(read.weight.mean()) < 0.05
    assert abs(read.weight.std() - 1) < 0.05


def test_fusion_is_computed_in_fp32_and_returned_in_the_dtype_of_the_slots():
    values, read = fused("v", init="randn"), slots(torch.bfloat16)
    exact = sum(w * read[j].v.float() for w, j in zip(values.weight, (0, 3), strict=True))
    assert torch.equal(values(read), exact.bfloat16())


def test_slot_widths():
    latent = Latent(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert Own(n_kv_heads=2).widths(64) == ((2, 64), (2, 64))
    assert latent.widths(128) == ((512,), (64,))
    assert Retention().elements(64) == (0, 0)


# ---- which layers have which weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_only_owners_have_key_and_value_projections(name, reference, preset_config):
    model = Decoder(preset_config(name))
    latents = dict.fromkeys(("mla", "mlra", "xmla"), "owner.down_proj")
    kv = {**latents, "kv_tie": "owner.kv_proj"}.get(name, "owner.k_proj")
    for i, row in enumerate(reference.PRESETS[name][1]):
        names = {n for n, _ in model.blocks[i].attention.named_parameters()}
        owns, fused = row.startswith(("own", "latent")), [half for half in ("keys", "values") if f"{half} w" in row]
        assert any(n.startswith(kv) for n in names) == owns, i
        assert any(n.startswith("owner") for n in names) == owns, i
        assert {n for n in names if n.split(".")[0] in ("keys", "values")} == {f"{half}.weight" for half in fused}


def test_matrices_of_values_count_as_products(preset_config):
    plain, rich = (Decoder(preset_config(n)) for n in ("fusedkv", "fusedkv, complex keys and matrix values"))
    more = [b - a for a, b in zip(*(layer_flops_per_token(m, 16) for m in (plain, rich)), strict=True)]
    assert more == [0] * 4 + [2 * 2 * G * D * D] * 4  # two sources, a multiplication and an addition for each number


def test_fusion_weights_start_where_the_plan_says(tiny_config):
    for init, first, last in (("lite", 0.0, 1.0), ("mean", 0.5, 0.5)):
        model = Decoder(tiny_config(kv={"preset": "fusedkv", "init": init}))
        model.init_weights()
        for block in model.blocks[4:]:
            assert block.attention.keys.weight.unique().tolist() == sorted({first, last})
            assert (block.attention.keys.weight[0] == first).all()
            assert (block.attention.keys.weight[1] == last).all()
            assert (block.attention.values.weight[0] == last).all()
            assert (block.attention.values.weight[1] == first).all()


# ---- FusedKV -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fusedkv", "fusedkv, complex keys and matrix values"])
def test_at_its_lite_point_fusedkv_is_fusedkv_lite(name, preset_config, random_model):
    lite = random_model(preset_config("fusedkv_lite"))
    full = random_model(preset_config(name), seed=1)
    missing, unexpected = full.load_state_dict(lite.state_dict(), strict=False)
    assert not unexpected
    assert sorted(missing) == sorted(
        f"blocks.{i}.attention.{p}.weight" for i in (4, 5, 6, 7) for p in ("keys", "values")
    )
    for module in full.modules():
        if isinstance(module, FusedRead | WeightedRead):
            module.reset_parameters()
    ids = torch.arange(12)[None]
    assert torch.equal(full(ids), lite(ids))


def shift_error(model) -> float:
    """Largest change of a logit when all positions move by 37."""
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16)[None]
    with torch.no_grad():
        return float((model(ids, positions + 37) - model(ids, positions)).abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"per_head": True}, {"granularity": "scalar"}, {"keys": "complex", "values": "matrix"}]
)
def test_scores_of_fused_keys_depend_on_relative_position_only(options, tiny_config, random_model):
    model = random_model(tiny_config(kv={"preset": "fusedkv", "n_kv_heads": 2, **options}))
    assert shift_error(model) < 1e-4


def test_scores_of_fused_keys_without_tied_pairs_depend_on_absolute_position(tiny_config, random_model, monkeypatch):
    """Eq. 7 and 8 of arXiv 2512.03870: the tie is what keeps scores relative."""
    model = random_model(tiny_config(kv={"preset": "fusedkv", "n_kv_heads": 2}))

    def untied(read: FusedRead) -> torch.Tensor:
        generator = torch.Generator().manual_seed(read.places[-1])
        return torch.randn(len(read.places), 1, D, generator=generator) if read.part == "k" else read.weight

    monkeypatch.setattr(FusedRead, "channel_weights", untied)
    assert shift_error(model) > 1e-2
