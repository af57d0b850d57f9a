"""Every preset against the tables of its paper, written by hand (see tests/reference.py for the notation)."""

import itertools
from pathlib import Path

import pytest

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.plan.forms import OwnHalf, OwnTied
from cllm.plan.joins import LOCAL, Whole
from cllm.plan.plan import Fuse, Iterations, KVPlan, Latent, Own, Retention, Share
from cllm.plan.presets import preset_names


def plan_of(n_layers: int, preset: str, n_heads: int = 4, **options) -> KVPlan:
    model = {"d_model": n_heads * 8, "n_layers": n_layers, "n_heads": n_heads, "kv": {"preset": preset, **options}}
    return validate(ModelConfig, model).plan()


def rows(plan: KVPlan) -> list[str]:
    """A plan in the notation of the tables."""

    def side(read) -> str:
        return str(read.layer) if isinstance(read, Share) else "+".join(f"w{j}" for j in read.layers)

    found = []
    for i, layer in enumerate(plan.layers):
        words = []
        origin = [] if plan.weights_of(i) == i else [f"as {plan.weights_of(i)}"]
        if isinstance(layer.own, Own):
            words += [f"own:{layer.own.n_kv_heads}"] + [f"of {layer.own.head_dim}"] * bool(layer.own.head_dim)
            words += ["norm"] * layer.own.kv_norm
            words += [] if layer.own.input is None else [f"input {layer.own.input}"]
            words += [f"only {layer.own.only}"] if isinstance(layer.own, OwnHalf) else []
            words += ["tied"] if isinstance(layer.own, OwnTied) else []
            words += [f"mix {'+'.join(map(str, plan.mixes(i)))}"] if plan.mixes(i) else []
        elif layer.own is not None:
            words.append({Latent: "latent", Retention: "retention"}[type(layer.own)])
            if isinstance(layer.own, Latent) and layer.own.blocks > 1:
                words[-1] += f":{layer.own.blocks}"
        keys, values = plan.keys(i), plan.values(i)
        if isinstance(layer.local, Own):
            words += [f"and:{layer.local.n_kv_heads}"] + ["norm"] * layer.local.kv_norm
            words += ["tied"] if isinstance(layer.local, OwnTied) else []
        if isinstance(keys, Whole):
            names = {LOCAL: "and", i: "own"}
            parts = [
                names.get(part.layer, str(part.layer)) + f"/{part.window}" * bool(part.window) for part in keys.parts
            ]
            how = "blend" if getattr(keys, "gates", "") == "complementary" else keys.key
            words += [how, "+".join(parts), *["sink"] * getattr(keys, "sink", False)]
            found.append(" ".join([*words, *origin]))
            continue
        if isinstance(keys, Fuse) or keys != values:
            words.append(f"keys {side(keys)} values {side(values)}")
        elif keys != Share(i):
            words.append(f"read {side(keys)}")
        if layer.window is not None:
            words.append(f"window {layer.window}")
        found.append(" ".join([*words, *origin]))
    return found


@pytest.mark.parametrize("n_layers", [4, 5, 8, 13, 24, 60])
@pytest.mark.parametrize("backward", [1, 2])
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_accepted_at_any_depth(name, backward, n_layers):
    kv = {"preset": name}
    if name.startswith(("pizza", "sandwich", "lasagna", "lckv")):
        kv["iterations"] = {"forward": 7, "backward": backward}
    assert len(ModelConfig(d_model=32, n_heads=4, n_layers=n_layers, kv=kv).plan()) == n_layers


def test_every_preset_has_a_table(reference):
    assert sorted(reference.PRESETS) == preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_preset_on_8_layers_is_its_table(name, reference, preset_config):
    assert rows(preset_config(name).plan()) == reference.PRESETS[name][1]


def test_variants_on_8_layers_are_their_tables(reference, preset_config):
    for name, (_, table) in reference.VARIANTS.items():
        assert rows(preset_config(name).plan()) == table, name


# ---- every layer owns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "options", "kv_heads"),
    [
        ("mha", {}, 16),
        ("mha", {"n_kv_heads": 2}, 2),
        ("gqa", {}, 8),
        ("gqa", {"n_kv_heads": 4}, 4),
        ("mqa", {}, 1),
    ],
)
def test_kv_heads_of_mha_gqa_mqa(preset, options, kv_heads):
    assert rows(plan_of(3, preset, n_heads=16, **options)) == [f"own:{kv_heads}"] * 3


def test_mistral_has_a_window_in_every_layer():
    assert rows(plan_of(3, "gqa", n_heads=32, n_kv_heads=8, window=4096)) == ["own:8 window 4096"] * 3


def test_gemma_3_has_full_attention_in_every_sixth_layer():
    assert rows(plan_of(12, "mha", window=512, full_every=6)) == (["own:4 window 512"] * 5 + ["own:4"]) * 2


def test_mla_slot_of_deepseek_v2_is_576_numbers():
    config = ModelConfig(d_model=5120, n_layers=2, n_heads=128, head_dim=128, kv={"preset": "mla", "q_lora_rank": 1536})
    plan = config.plan()
    latent = Latent(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536)
    assert [layer.own for layer in plan.layers] == [latent, latent]
    (rank,), (rope,) = plan.owned(0).widths(config.resolved_head_dim)
    assert rank + rope == 512 + 64


def test_mla_latents_can_serve_several_layers():
    assert rows(plan_of(4, "mla", factor=2)) == ["latent", "read 0", "latent", "read 2"]
    assert rows(plan_of(5, "mla", factor=2)) == ["latent", "latent", "read 1", "latent", "read 3"]


@pytest.mark.parametrize(
    ("options", "rank", "share"),
    [
        ({}, 992, 12 * (992 + 32) / (24 * 2048)),  # a quarter
        ({"bytes": 0.125}, 480, 1 / 8),
        ({"bytes": 0.1, "factor": 4, "qk_rope_head_dim": 64}, 755, 6 * (755 + 64) / (24 * 2048)),  # 756 would be more
        ({"bytes": 0.5, "factor": 1}, 992, 1 / 2),
        ({"kv_lora_rank": 100, "factor": 24}, 100, 132 / (24 * 2048)),
    ],
)
def test_xmla_has_the_largest_rank_within_its_bytes(options, rank, share):
    kv = {"preset": "xmla", **options}
    config = ModelConfig(d_model=1024, n_layers=24, n_heads=16, kv=kv)
    assert config.plan().reading(Latent)[1].kv_lora_rank == rank
    assert kv_bytes(config).relative_to(kv_bytes(mha_twin(config)))[0] == pytest.approx(share)
    assert share <= options.get("bytes", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bytes": 0.5},
            r"bytes is 0\.5, which makes latents of rank 2016; allowed with factor 2: 0\.0081 to 0\.2578",
        ),
        ({"bytes": 0.005}, r"bytes is 0\.005, which makes latents of rank -12; allowed with factor 2: 0\.0081"),
        ({"bytes": 0.2, "kv_lora_rank": 64}, r"bytes is 0\.2 and kv_lora_rank 64; allowed: one of the two"),
        ({"bytes": 1.5}, r"bytes"),
    ],
)
def test_xmla_with_other_bytes_is_refused(options, message):
    model = {"d_model": 1024, "n_layers": 24, "n_heads": 16, "kv": {"preset": "xmla", **options}}
    with pytest.raises(UserError, match=message):
        validate(ModelConfig, model).plan()


# ---- CLA -----------------------------------------------------------------------------------------------------------

# Table 1 of arXiv 2405.12981, 20 layers: name, head channels, query heads, KV heads, options, KV layers, bytes a token.
CLA_TABLE_1 = [
    ("H128-MHA", 128, 16, 16, None, 20, 163840),
    ("H128-GQA4", 128, 16, 4, None, 20, 40960),
    ("H128-GQA2", 128, 16, 2, None, 20, 20480),
    ("H128-MQA", 128, 16, 1, None, 20, 10240),
    ("H64-MQA", 64, 32, 1, None, 20, 5120),
    ("H46-MQA", 46, 45, 1, None, 20, 3680),
    ("H32-MQA", 32, 64, 1, None, 20, 2560),
    ("H512-MQA-CLA2", 512, 4, 1, {"factor": 2}, 10, 20480),
    ("H256-MQA-CLA2", 256, 8, 1, {"factor": 2}, 10, 10240),
    ("H128-MQA-CLA2", 128, 16, 1, {"factor": 2}, 10, 5120),
    ("H90-MQA-CLA2", 90, 22, 1, {"factor": 2}, 10, 3600),
    ("H64-MQA-CLA2", 64, 32, 1, {"factor": 2}, 10, 2560),
    ("H256-GQA4-CLA2", 256, 8, 4, {"factor": 2}, 10, 40960),
    ("H128-GQA4-CLA2", 128, 16, 4, {"factor": 2}, 10, 20480),
    ("H128-GQA2-CLA2", 128, 16, 2, {"factor": 2}, 10, 10240),
    ("H128-MQA-CLA3", 128, 16, 1, {"factor": 3}, 7, 3584),
    ("H128-MQA-CLA4", 128, 16, 1, {"factor": 4}, 5, 2560),
    ("H128-MQA-CLA2-KeepEnds", 128, 16, 1, {"factor": 2, "keep_ends": True}, 11, 5632),
    ("H128-MQA-CLA2-DenseFront", 128, 16, 1, {"factor": 10, "dense_front": 9, "dense_back": 1}, 11, 5632),
    ("H128-MQA-CLA2-DenseBack", 128, 16, 1, {"factor": 10, "dense_front": 1, "dense_back": 9}, 11, 5632),
]


@pytest.mark.parametrize(("d", "heads", "kv_heads", "options", "owners", "size"), [row[1:] for row in CLA_TABLE_1])
def test_cla_paper_table_1(d, heads, kv_heads, options, owners, size):
    kv = {"preset": "mha"} if options is None else {"preset": "cla", **options}
    config = ModelConfig(d_model=2048, n_layers=20, n_heads=heads, head_dim=d, kv={**kv, "n_kv_heads": kv_heads})
    plan = config.plan()
    assert len(plan.owners) == owners
    assert sum(2 * d * plan.layers[i].own.n_kv_heads * 2 for i in plan.owners) == size  # K and V, 2 bytes each


def cla(**options) -> list[str]:
    return rows(plan_of(20, "cla", kv_norm=False, **options))


def test_cla_2_shares_pairs(reference):
    assert cla() == reference.targets("0x2_2x2_4x2_6x2_8x2_10x2_12x2_14x2_16x2_18x2")


def test_cla_3_on_20_layers_leaves_layer_0_alone(reference):
    assert cla(factor=3) == reference.targets("0_1x3_4x3_7x3_10x3_13x3_16x4")


def test_cla_4_shares_fours(reference):
    assert cla(factor=4) == reference.targets("0x4_4x4_8x4_12x4_16x4")


def test_cla_keep_ends_leaves_the_first_and_last_layer_alone(reference):
    assert cla(keep_ends=True) == reference.targets("0_1x2_3x2_5x2_7x2_9x2_11x2_13x2_15x2_17x2_19")


def test_cla_dense_front_is_ten_owners_then_nine_readers_of_layer_9(reference):
    front = cla(dense_front=9, factor=10, dense_back=1)
    assert front == reference.targets("0_1_2_3_4_5_6_7_8_9x10_19")


def test_cla_dense_back_is_a_run_that_reads_layer_1_then_nine_owners(reference):
    assert cla(dense_front=1, factor=10, dense_back=9) == reference.targets("0_1x10_11_12_13_14_15_16_17_18_19")


def test_cla_gives_keys_and_values_a_norm_of_their_own():
    assert rows(plan_of(4, "cla")) == ["own:4 norm", "read 0", "own:4 norm", "read 2"]


def test_cla_with_more_dense_layers_than_layers_is_refused():
    with pytest.raises(UserError, match=r"dense_front 5 \+ dense_back 4 layers exceed the model's 8"):
        plan_of(8, "cla", dense_front=5, dense_back=4)


# ---- YOCO ----------------------------------------------------------------------------------------------------------


def test_yoco_3b():
    low, owner, upper = ["own:24 window 1024"] * 13, ["own:8 norm"], ["read 13"] * 12
    assert rows(plan_of(26, "yoco", n_heads=24, n_kv_heads=8)) == low + owner + upper


def test_yoco_with_gated_retention_keeps_one_slot():
    plan = plan_of(26, "yoco", n_heads=24, n_kv_heads=8, lower="retention")
    assert rows(plan) == ["retention"] * 13 + ["own:8 norm"] + ["read 13"] * 12


def test_yoco_lower_half_may_be_shorter_and_have_fewer_heads():
    plan = plan_of(6, "yoco", n_lower=2, lower_kv_heads=2, window=16)
    assert rows(plan) == ["own:2 window 16"] * 2 + ["own:4 norm"] + ["read 2"] * 3


# ---- FusedKV -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "upper"),
    [
        ("fusedkv", "keys w0+w11 values w0+w11"),
        ("fusedkv_lite", "keys 11 values 0"),
        ("fusedkv_lite_learnable", "keys w11 values w0"),
        ("fusedkv_lite_reversed", "keys 0 values 11"),
    ],
)
def test_fusedkv_family_on_24_layers(preset, upper):
    assert rows(plan_of(24, preset)) == ["own:4"] * 12 + [upper] * 12


@pytest.mark.parametrize(
    ("preset", "upper"),
    [
        ("fusedkv", "keys w0+w7 values w0+w7"),
        ("fusedkv_lite", "keys 7 values 0"),
        ("fusedkv_lite_learnable", "keys w7 values w0"),
        ("fusedkv_lite_reversed", "keys 0 values 7"),
    ],
)
def test_fusedkv_ablations_store_8_of_16_layers(preset, upper):
    assert rows(plan_of(16, preset, n_storage=8)) == ["own:4"] * 8 + [upper] * 8


def test_fusedkv_sources_can_be_chosen():
    fused = rows(plan_of(16, "fusedkv", n_storage=8, sources=[1, 4, 6]))
    assert fused[8:] == ["keys w1+w4+w6 values w1+w4+w6"] * 8
    assert rows(plan_of(16, "fusedkv_lite", n_storage=8, sources=[2, 5]))[8:] == ["keys 5 values 2"] * 8


def test_fusedkv_source_above_the_storage_layers_is_refused():
    with pytest.raises(UserError, match=r"layer 8: keys come from layer 9, which owns nothing"):
        plan_of(16, "fusedkv", n_storage=8, sources=[0, 9])


def test_fusedkv_with_all_layers_storing_is_refused():
    with pytest.raises(UserError, match=r"model.kv.n_storage is 16; allowed: 1 to 15"):
        plan_of(16, "fusedkv", n_storage=16)


def test_yoco_of_the_fusedkv_paper_is_pizza_bottom(reference):
    """Its baselines: storage layers 1 to L/2 with full attention, and all above read layer L/2 (counted from 1)."""
    assert rows(plan_of(16, "pizza_bottom")) == reference.targets("0_1_2_3_4_5_6_7x9")


# ---- the nine plans, LCKV, in LCKV's notation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "layer_types"),
    [
        ("pizza_bottom", "0_1_2x20"),
        ("pizza_middle", "0_1_11x20"),
        ("pizza_top", "0_1_21x20"),
        ("sandwich_bottom", "0_1x20_21"),
        ("sandwich_middle", "0_10x20_21"),
        ("sandwich_top", "0_20x20_21"),
        ("lasagna_bottom", "0x8_8x7_15x7"),
        ("lasagna_middle", "0_6x11_16x10"),
        ("lasagna_top", "0_11x11_21x10"),
    ],
)
def test_nine_plans_with_3_owners_of_22_layers(preset, layer_types, reference):
    assert rows(plan_of(22, preset, n_owners=3)) == reference.targets(layer_types)


@pytest.mark.parametrize(
    ("preset", "layer_types"),
    [
        ("pizza_bottom", "0_1_2_3_4_5_6_7_8_9_10x12"),
        ("sandwich_top", "0_1_2_3_4_16x12_17_18_19_20_21"),
        ("sandwich_middle", "0_1_2_3_4_10x12_17_18_19_20_21"),
        ("lasagna_bottom", "0x2_2x2_4x2_6x2_8x2_10x2_12x2_14x2_16x2_18x2_20x2"),
    ],
)
def test_nine_plans_own_half_of_the_layers_by_default(preset, layer_types, reference):
    assert rows(plan_of(22, preset)) == reference.targets(layer_types)


def test_sandwich_with_an_odd_number_of_own_layers_has_the_larger_share_below(reference):
    assert rows(plan_of(8, "sandwich_bottom", n_owners=4)) == reference.targets("0_1_2x5_7")


@pytest.mark.parametrize("layers", [4, 12, 22])
def test_lasagna_bottom_is_cla_2(layers):
    assert plan_of(layers, "lasagna_bottom") == plan_of(layers, "cla", kv_norm=False)


def test_first_layer_of_the_nine_plans_always_owns():
    for name in preset_names():
        if name.startswith(("pizza", "sandwich", "lasagna")):
            assert all(plan_of(12, name, n_owners=owners).owners[0] == 0 for owners in range(2, 12)), name
            assert all(len(plan_of(12, name, n_owners=owners).owners) == owners for owners in range(1, 12)), name


@pytest.mark.parametrize(
    ("warmup", "layer_types"), [(2, "0_20x20_21"), (10, "0_1_2_3_4_16x12_17_18_19_20_21"), (0, "21x22")]
)
def test_lckv_on_22_layers(warmup, layer_types, reference):
    plan = plan_of(22, "lckv", warmup=warmup)
    assert rows(plan) == reference.targets(layer_types)
    assert plan == plan_of(22, "sandwich_top", n_owners=warmup + 1)


def test_lckv_iterates_7_passes_without_and_2_with_gradient():
    assert plan_of(22, "lckv").iterations == Iterations(forward=7, backward=2)
    assert plan_of(22, "lckv", iterations={"forward": 3, "backward": 1}).iterations == Iterations(forward=3, backward=1)
    assert plan_of(22, "pizza_bottom").iterations is None


# ---- the upper layers read the lower -------------------------------------------------------------------------------


def test_gemma_3n_shares_by_mask_kind():
    """35 layers, every fifth full; the last 15 read layer 18 (sliding) or 19 (full)."""
    plan = plan_of(35, "trailing", n_shared=15, full_every=5, window=512)
    own = (["own:4 window 512"] * 4 + ["own:4"]) * 4
    shared = (["read 18 window 512"] * 4 + ["read 19"]) * 3
    assert rows(plan) == own + shared


def test_trailing_layer_without_an_owner_of_its_mask_is_refused():
    with pytest.raises(UserError, match=r"layer 5: has full attention, and none of the owners 0 to 3 has"):
        plan_of(6, "trailing", n_shared=2, full_every=6, window=512)


def test_afm_is_35_owners_and_21_readers_of_layer_34():
    assert rows(plan_of(56, "afm")) == ["own:4"] * 35 + ["read 34"] * 21


# ---- the table of docs/plans.md --------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plans.md"


def read_by(plan: KVPlan, i: int) -> str:
    """The cell of layer `i` in the table of docs/plans.md: `own`, `0 + 3` or `K own, V 0`, for example."""

    def slot(j: int) -> str:
        source = plan.owned(j)
        if j % len(plan) != i:
            return str(j)
        of = "" if source.input is None else f" of {source.input}"
        mixed = "" if not source.mixes else f" mixing {', '.join(map(str, source.mixes))}"
        return ("latent" if not source.is_plain else "tied" if source.rotates_at_read else "own") + of + mixed

    def last(window: int | None) -> str:
        return "" if window is None else f" last {window}"

    if plan.reads_at_once(i):
        return " & ".join(slot(j) + last(window) for (j,), window in plan.attended(i))
    keys, values = (" + ".join(map(slot, half.layers)) for half in (plan.keys(i), plan.values(i)))
    return (keys if keys == values else f"K {keys}, V {values}") + last(plan.layers[i].window)


def test_the_page_has_the_layers_and_the_bytes_of_every_preset():
    lines = PAGE.read_text(encoding="utf-8").split("| preset | layers | resident | read |\n", 1)[1].splitlines()[1:]
    found = lines[: lines.index("")]
    wanted = []
    for name in preset_names():
        model = {"d_model": 2048, "n_layers": 8, "n_heads": 16, "max_seq_len": 32768, "kv": {"preset": name}}
        config = validate(ModelConfig, model)
        plan = config.plan()
        runs = [(text, len(list(run))) for text, run in itertools.groupby(read_by(plan, i) for i in range(8))]
        layers = "; ".join(text if n == 1 else f"{n} x {text}" for text, n in runs)
        resident, read = kv_bytes(config).relative_to(kv_bytes(mha_twin(config)))
        wanted.append(f"| `{name}` | {layers} | {resident:.3f} | {read:.3f} |")
    assert sorted(found) == sorted(wanted)
