"""Rules between fields, defaults, and configs that load back as they were."""

import math
import re

import pytest
import yaml
from annotated_types import Le
from pydantic.fields import FieldInfo

from cllm.config import Config, ModelConfig
from cllm.config.load import schema_keys, validate
from cllm.errors import UserError
from cllm.plan.presets import preset_names
from cllm.yaml_text import parse_yaml

MODEL = {"d_model": 64, "n_layers": 8, "n_heads": 4}


def config(**sections) -> Config:
    return validate(Config, {"model": MODEL, **sections})


REFUSED = {
    "d_model not a multiple of heads": (
        {"model": {**MODEL, "n_heads": 5}},
        "model: d_model 64 is not a multiple of n_heads 5; set head_dim or change either",
    ),
    "odd head_dim": (
        {"model": {**MODEL, "d_model": 36}},
        "model: d_model 36 / n_heads 4 gives an odd head_dim",
    ),
    "odd head_dim as given": (
        {"model": {**MODEL, "head_dim": 7}},
        "model.head_dim: input should be a multiple of 2, got 7",
    ),
    "KV heads that do not divide": (
        {"model": {**MODEL, "kv": {"preset": "gqa", "n_kv_heads": 3}}},
        "model: layer 0: n_heads 4 is not a multiple of n_kv_heads 3",
    ),
    "queries that meet keys of two RoPE bases": (
        {
            "model": {
                **MODEL,
                "rope": {"windowed_theta": 100},
                "kv": {
                    "layers": [
                        {"layers": "0-5", "own": {}, "window": 9},
                        {"layers": 6, "own": {}},
                        {"layers": 7, "keys": {"fuse": [3, 6]}, "values": {"share": 6}, "window": 9},
                    ]
                },
            }
        },
        "model: layer 7: reads keys of slots that keep a window (of layers [3]) and of slots that keep all tokens (of "
        "layers [6]), to which rope.windowed_theta 100.0 gives different RoPE; allowed: slots of one kind, or "
        "rope.windowed_theta null",
    ),
    "a layer that reads slots of two RoPE bases at once": (
        {"model": {**MODEL, "rope": {"windowed_theta": 100}, "kv": {"preset": "ced"}}},
        "model: layer 4: reads keys of slots that keep a window (of layers [4]) and of slots that keep all tokens (of "
        "layers [4]), to which",
    ),
    "keys of two RoPE bases that are mixed": (
        {
            "model": {
                **MODEL,
                "rope": {"windowed_theta": 100},
                "kv": {"layers": [{"layers": "0-6", "own": {}}, {"layers": 7, "own": {"mix": [0]}, "window": 9}]},
            }
        },
        "model: layer 7: mixes keys of slots that keep a window (of layers [7]) and of slots that keep all tokens (of "
        "layers [0]), to which",
    ),
    "min_lr above lr": ({"optim": {"lr": 1e-4, "min_lr": 1e-3}}, "optim: min_lr 0.001 exceeds lr 0.0001"),
    "betas out of range": ({"optim": {"betas": [0.9, 1.0]}}, "optim: betas [0.9, 1.0] must lie in [0, 1)"),
    "three betas": ({"optim": {"betas": [0.9, 0.95, 0.99]}}, "optim.betas: list should have at most 2 items"),
    "micro_batch that does not divide": (
        {"train": {"global_batch": 32, "micro_batch": 5}},
        "train: global_batch 32 is not a multiple of micro_batch 5",
    ),
    "no device": ({"train": {"devices": 0}}, "train: devices is 0; allowed: 1 or more, or auto"),
    "devices that are neither a number nor auto": ({"train": {"devices": "two"}}, "train.devices: "),
    "sequences longer than the context": (
        {"model": {**MODEL, "max_seq_len": 256}, "data": {"seq_len": 512}},
        "data.seq_len 512 exceeds model.max_seq_len 256",
    ),
    "yarn without the original context": (
        {"model": {**MODEL, "rope": {"scaling": {"type": "yarn", "factor": 4.0}}}},
        "model.rope.scaling: rope scaling yarn needs original_max_seq_len, the context before scaling",
    ),
    "llama3 factors the wrong way round": (
        {
            "model": {
                **MODEL,
                "rope": {
                    "scaling": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 64, "low_freq_factor": 4.0}
                },
            }
        },
        "model.rope.scaling: high_freq_factor is 4.0; it must exceed low_freq_factor 4.0",
    ),
    "a name that is no folder name": ({"name": "a/b"}, "name: string should match pattern"),
    "a number as text": ({"train": {"steps": "2"}}, "train.steps: input should be a valid integer, got '2'"),
    "a float as integer": ({"train": {"steps": 2.5}}, "train.steps: input should be a valid integer"),
    "a boolean as integer": ({"train": {"steps": True}}, "train.steps: input should be a valid integer, got True"),
    "a schedule that does not exist": (
        {"optim": {"schedule": "cosin"}},
        "optim.schedule: input should be 'cosine', 'linear', 'wsd' or 'constant', got 'cosin'",
    ),
    "no layers": (
        {"model": {**MODEL, "n_layers": 0}},
        "model.n_layers: input should be greater than or equal to 1, got 0",
    ),
    "no model": ({"model": {"d_model": 64, "n_heads": 4}}, "model.n_layers: is required and missing"),
    "a window without tokens": (
        {"model": {**MODEL, "kv": {"preset": "yoco", "window": 0}}},
        "model.kv.window: input should be greater than or equal to 1, got 0",
    ),
    "KV heads of mqa": (
        {"model": {**MODEL, "kv": {"preset": "mqa", "n_kv_heads": 2}}},
        "model.kv.n_kv_heads: input should be 1",
    ),
    "KV heads of a latent": ({"model": {**MODEL, "kv": {"preset": "mla", "n_kv_heads": 2}}}, "model.kv.n_kv_heads: "),
    "a plan that does not fit": (
        {"model": {**MODEL, "kv": {"preset": "lckv", "warmup": 7}}},
        "model: model.kv.warmup + 1 is 8; allowed: 1 to 7 for 8 layers",
    ),
}


REFUSED |= {
    "a billion layers": (
        {"model": {**MODEL, "n_layers": 10**9}},
        "model.n_layers: input should be less than or equal to 4096, got 1000000000",
    ),
    "an absurd width": (
        {"model": {**MODEL, "d_model": 10**12}},
        "model.d_model: input should be less than or equal to",
    ),
    "ten billion layers in a range": (
        {"model": {**MODEL, "kv": {"layers": [{"layers": "0-9999999999", "own": {}}]}}},
        "model: model.kv.layers: '0-9999999999' is out of range; allowed: layers 0 to 4095",
    ),
    "a range of very many digits": (
        {"model": {**MODEL, "kv": {"layers": [{"layers": "0-" + "9" * 10_000, "own": {}}]}}},
        "model: model.kv.layers: '0-99999",
    ),
    "a range of a loop": (
        {"model": {**MODEL, "kv": {"layers": [{"layers": "0-7", "own": {}}], "loop": {"layers": "x", "times": 2}}}},
        "model: model.kv.loop.layers: 'x' is not a range",
    ),
    "digits that are no ASCII": (
        {"model": {**MODEL, "kv": {"layers": [{"layers": "0-²", "own": {}}]}}},
        "model: model.kv.layers: '0-²' is not a range",
    ),
    "a seed that numpy does not take": (
        {"train": {"seed": 2**32}},
        "train.seed: input should be less than or equal to 4294967295, got 4294967296",
    ),
    "a plan that splits one layer": (
        {"model": {**MODEL, "n_layers": 1, "kv": {"preset": "fusedkv"}}},
        "model: model.n_layers is 1; allowed with this plan, which splits the layers: 2 or more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    sections, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        config(**sections)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


KV = {
    **{name: {"preset": name} for name in preset_names()},
    "options": {"preset": "fusedkv", "n_storage": 3, "sources": [0, 2], "init": "randn", "per_head": True},
    "retention": {"preset": "yoco", "lower": "retention"},
    "iterations": {"preset": "lckv", "iterations": {"forward": 3, "backward": 1}},
    "layers": {
        "layers": [
            {"layers": "0-3", "own": {}},
            {"layers": [4, 5, 6], "keys": {"fuse": [0, 3], "init": "mean"}, "values": {"share": 0}},
            {"layers": 7, "own": {"n_kv_heads": 2}, "window": 4},
        ]
    },
}


@pytest.mark.parametrize("name", KV)
def test_config_loads_back_from_its_own_yaml(name):
    scaling = {"type": "yarn", "factor": 2.0, "original_max_seq_len": 512}
    model = {**MODEL, "kv": KV[name], "rope": {"scaling": scaling}}
    before = config(model=model, optim={"betas": [0.8, 0.9], "eps": 1e-12}, train={"devices": 2})
    text = yaml.safe_dump(before.as_yaml_data())
    after = validate(Config, parse_yaml(text, "config.yaml"))
    assert after == before
    assert after.model.plan() == before.model.plan()
    assert type(after.model.kv) is type(before.model.kv)


def test_defaults_follow_from_the_model():
    model = ModelConfig(d_model=64, n_layers=2, n_heads=4)
    assert model.resolved_head_dim == 16
    assert model.resolved_d_ff == 192  # 8/3 of 64 is 170.7, rounded up to a multiple of 64
    assert ModelConfig(d_model=64, n_layers=2, n_heads=4, head_dim=20, d_ff=100).resolved_head_dim == 20
    assert ModelConfig(d_model=64, n_layers=2, n_heads=4, head_dim=20, d_ff=100).resolved_d_ff == 100
    assert model.kv.preset == "mha"


def test_a_design_is_named_by_its_preset_and_a_plan_without_one_by_layers():
    designs = {name: ModelConfig.model_validate({**MODEL, "kv": KV[name]}).design for name in KV}
    others = {"options": "fusedkv", "retention": "yoco", "iterations": "lckv", "layers": "layers"}
    assert designs == {name: others.get(name, name) for name in KV}
    assert ModelConfig(**MODEL).design == "mha"


def test_head_dim_frees_d_model_from_the_heads():
    assert ModelConfig(d_model=50, n_layers=2, n_heads=4, head_dim=8).resolved_head_dim == 8


def bounded(key: str, field: FieldInfo) -> bool:
    """Whether a field of whole numbers has a largest; lists of layers are checked against the plan's."""
    annotation = str(field.annotation)
    if not re.search(r"\bint\b", annotation) or "list[int]" in annotation or key.endswith(".share"):
        return True
    return any(isinstance(limit, Le) for limit in field.metadata) or key in ("train.devices", "optim.options")


def test_every_whole_number_has_an_upper_bound():
    assert [key for key, field in schema_keys(Config).items() if not bounded(key, field)] == []
    with pytest.raises(UserError, match="train: devices is 10000000000; allowed: up to 1000000000, or auto"):
        config(train={"devices": 10**10})
    with pytest.raises(UserError, match=r"optim: options\.n is 10000000000; allowed: whole numbers up to 1000000000"):
        config(optim={"options": {"n": 10**10}})


FLOATS = [key for key, field in schema_keys(Config).items() if "float" in str(field.annotation)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_infinite(key, value):
    data: dict = {"model": dict(MODEL)}
    *sections, leaf = key.split(".")
    node = data
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = [0.9, value] if key == "optim.betas" else value
    if ".scaling." in key:
        node |= {"type": "yarn", "factor": 2.0, "original_max_seq_len": 64, leaf: value}
    if key == "model.kv.bytes":
        node["preset"] = "xmla"
    if sections == ["evaluate_suites"]:  # a list
        data[sections[0]], key = [node | {"suite": "copying", "every": 1}], f"{sections[0]}.0.{leaf}"
    with pytest.raises(UserError) as error:
        validate(Config, data)
    assert str(error.value).startswith(key)
    assert str(error.value).endswith(f"got {value}")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (20, 2), (999, 99), (1000, 100), (100_000, 100)])
def test_warmup_by_default(steps, warmup):
    assert config(train={"steps": steps}).optim.warmup(steps) == warmup
    assert config(train={"steps": steps}, optim={"warmup_steps": 1}).optim.warmup(steps) == 1


def test_every_field_has_a_description():
    assert [key for key, field in schema_keys(Config).items() if not field.description] == []
