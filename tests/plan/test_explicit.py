"""Plans spelled out in YAML under `model.kv.layers`."""

import pytest

from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import PlanError, UserError
from cllm.plan.plan import Fuse, Iterations, Latent, Own, Retention, Share, layer_range
from cllm.yaml_text import parse_yaml

PRESETS_SPELLED_OUT = {
    "fusedkv": """
        - {layers: 0-11, own: {}}
        - {layers: 12-23, keys: {fuse: [0, 11]}, values: {fuse: [0, 11]}}""",
    "fusedkv_lite": """
        - {layers: 0-11, own: {}}
        - {layers: 12-23, keys: {share: 11}, values: {share: 0}}""",
    "yoco": """
        - {layers: 0-11, own: {}, window: 1024}
        - {layers: 12, own: {kv_norm: true}}
        - {layers: 13-23, keys: {share: 12}, values: {share: 12}}""",
    "lckv": """
        - {layers: [0, 22, 23], own: {}}
        - {layers: 1-21, keys: {share: 22}, values: {share: 22}}""",
}


def model(layers: str, n_layers: int, iterations: dict | None = None) -> ModelConfig:
    kv = {"layers": parse_yaml(layers, "test"), "iterations": iterations}
    return validate(ModelConfig, {"d_model": 32, "n_heads": 4, "n_layers": n_layers, "kv": kv})


@pytest.mark.parametrize("preset", PRESETS_SPELLED_OUT)
def test_spelled_out_plan_equals_the_preset(preset):
    by_name = ModelConfig(d_model=32, n_heads=4, n_layers=24, kv={"preset": preset}).plan()
    iterations = {"forward": 7, "backward": 2} if preset == "lckv" else None
    assert model(PRESETS_SPELLED_OUT[preset], 24, iterations).plan() == by_name


def test_every_field_reaches_the_plan():
    plan = model(
        """
        - layers: 0
          own: {n_kv_heads: 2}
          window: 8
        - layers: [1]
          latent: {kv_lora_rank: 8, q_lora_rank: 6, qk_nope_head_dim: 4, qk_rope_head_dim: 2, v_head_dim: 5}
        - {layers: "2", retention: {}}
        - {layers: 3, own: {n_kv_heads: 2, kv_norm: true}}
        - layers: 4
          keys: {fuse: [3], granularity: scalar, per_head: true, init: randn}
          values: {share: 3}
        - {layers: 5, own: {n_kv_heads: 2}, keys: {fuse: [3, 5]}}
        """,
        6,
        {"forward": 1, "backward": 3},
    ).plan()
    latent = Latent(kv_lora_rank=8, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5)
    owners = [Own(n_kv_heads=2), latent, Retention(), Own(n_kv_heads=2, kv_norm=True), None, Own(n_kv_heads=2)]
    assert [layer.own for layer in plan.layers] == owners
    assert [layer.window for layer in plan.layers] == [8, None, None, None, None, None]
    assert plan.keys(4) == Fuse((3,), granularity="scalar", per_head=True, init="randn")
    assert plan.values(4) == Share(3)
    assert (plan.keys(5), plan.values(5)) == (Fuse((3, 5)), Share(5))
    assert plan.iterations == Iterations(forward=1, backward=3)


REFUSED = {
    "gap": (
        "[{layers: 0-1, own: {}}, {layers: 3, own: {}}]",
        "layer 2: not described in model.kv.layers (missing: [2])",
    ),
    "overlap": ("[{layers: 0-2, own: {}}, {layers: 2-3, own: {}}]", "layer 2: described twice in model.kv.layers"),
    "descending range": ("[{layers: 3-0, own: {}}]", "model.kv.layers: '3-0' ends before it begins"),
    "no range": ("[{layers: all, own: {}}]", "model.kv.layers: 'all' is not a range; write \"0-11\", 3 or [0, 2, 4]"),
    "a state with a window": (
        "[{layers: 0-3, retention: {}, window: 8}]",
        "layer 0: keeps a recurrent state and has a window of 8; allowed: no window",
    ),
    "a mix of a state": (
        "[{layers: 0-2, retention: {}}, {layers: 3, own: {mix: [1]}}]",
        "layer 3: mixes the keys and values of layer 1, which owns a recurrent state; allowed: owners",
    ),
    "layer that the model has not": (
        "[{layers: 0-4, own: {}}]",
        "layer 4: in model.kv.layers, but the model has layers 0 to 3",
    ),
    "negative layer": ("[{layers: [-1, 0, 1, 2, 3], own: {}}]", "layer -1: in model.kv.layers, but"),
    "two kinds of own": (
        "[{layers: 0-3, own: {}, retention: {}}]",
        "layer 0: names more than one of own, latent, retention",
    ),
    "odd head size": ("[{layers: 0-3, own: {head_dim: 7}}]", "own.head_dim: input should be a multiple of 2"),
    "neither owns nor reads": (
        "[{layers: 0-2, own: {}}, {layers: 3}]",
        "layer 3: owns nothing and does not say where its keys and values come from",
    ),
    "no values": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {share: 0}}]",
        "layer 3: owns nothing and does not say where its values come from",
    ),
    "no keys": (
        "[{layers: 0-2, own: {}}, {layers: 3, values: {share: 0}}]",
        "layer 3: owns nothing and does not say where its keys come from",
    ),
    "matrices for keys": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {fuse: [0], granularity: matrix}, values: {share: 0}}]",
        "layer 3: keys: granularity is matrix; allowed for keys: scalar, channel, complex",
    ),
    "complex values": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {share: 0}, values: {fuse: [0, 1], granularity: complex}}]",
        "layer 3: values: granularity is complex; allowed for values: scalar, channel, matrix",
    ),
    "one matrix for all heads": (
        "[{layers: 0-3, own: {}, values: {fuse: [0], granularity: matrix, per_head: false}}]",
        "layer 0: values: per_head is false with granularity matrix; allowed: true",
    ),
    "options on share": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {share: 0, granularity: scalar, init: mean}, values: {share: 0}}]",
        "layer 3: keys: granularity, init go with fuse, not with share",
    ),
    "share and fuse": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {share: 0, fuse: [0]}, values: {share: 0}}]",
        "layer 3: keys: needs exactly one of share, fuse",
    ),
    "neither share nor fuse": (
        "[{layers: 0-2, own: {}}, {layers: 3, keys: {share: 0}, values: {}}]",
        "layer 3: values: needs exactly one of share, fuse",
    ),
    "a source that owns nothing": (
        "[{layers: 0-1, own: {}}, {layers: 2-3, keys: {share: 2}, values: {share: 0}}]",
        "layer 2: keys come from itself, which owns nothing; owners: [0, 1]",
    ),
    "a cycle without iterations": (
        "[{layers: 0, keys: {share: 3}, values: {share: 3}}, {layers: 1-3, own: {}}]",
        "layer 0: reads layer 3 above it",
    ),
    "heads that do not divide": ("[{layers: 0-3, own: {n_kv_heads: 3}}]", "layer 0: n_heads 4 is not a multiple of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    layers, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        model(layers, 4)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layers", "key"),
    [
        ("[{layers: 0-3, owns: {}}]", 'kv.layers.0.owns: unknown key; did you mean "own"?'),
        ("[{layers: 0-3, own: {n_kv_head: 2}}]", 'kv.layers.0.own.n_kv_head: unknown key; did you mean "n_kv_heads"?'),
        ("[{layers: 0-3, own: {}, window: '4'}]", "kv.layers.0.window: input should be a valid integer, got '4'"),
        ("[{layers: 1.5, own: {}}]", "kv.layers.0.layers: input should be a valid integer, string or list, got 1.5"),
        ("[{layers: [1.5], own: {}}]", "kv.layers.0.layers.0: input should be a valid integer, got 1.5"),
    ],
)
def test_mistaken_key_is_named(layers, key):
    kv = {"layers": parse_yaml(layers, "test")}
    with pytest.raises(UserError) as error:
        validate(ModelConfig, {"d_model": 32, "n_heads": 4, "n_layers": 4, "kv": kv})
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("text", "layers"), [("0-3", [0, 1, 2, 3]), ("5", [5]), (7, [7]), ([4, 0, 2], [4, 0, 2]), ("3-3", [3])]
)
def test_layer_range(text, layers):
    assert layer_range(text) == layers


@pytest.mark.parametrize("text", ["", "a-b", "1-", "-1", "1-2-3", "0..3", "1,2"])
def test_layer_range_refuses(text):
    with pytest.raises(PlanError, match="is not a range"):
        layer_range(text)
