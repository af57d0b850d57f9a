"""Checkpoints that transformers wrote give transformers' logits here; written back they are the same bytes; what the
decoder cannot compute is refused by name."""

from __future__ import annotations

import copy
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from cllm.config import ModelConfig, RopeScaling
from cllm.errors import UserError
from cllm.hub.families import FAMILIES, export_family, load, load_family, read_family
from cllm.hub.families.table import weights
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder, count_parameters, meta_decoder
from cllm.plan.plan import KVPlan, Latent, LayerPlan, Own

V, D, F, L, H, G, T = 48, 40, 56, 3, 4, 2, 24
RANK, NOPE, ROPE, VALUE = 20, 6, 8, 10


def scaled(kind: str, theta: float = 10000.0, **options) -> dict[str, Any]:
    return {"head_dim": 32, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN_ALL = {"factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 3.0, "beta_slow": 2.0}
MLA = {"num_key_value_heads": H, "kv_lora_rank": RANK, "q_lora_rank": None, "qk_nope_head_dim": NOPE}
MLA |= {"qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "first_k_dense_replace": L}
V2_LITE = {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}
V2_LITE = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **V2_LITE}}
"""As DeepSeek-V2-Lite has it: the softmax scale times 1.26 squared."""
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, "tie_word_embeddings": True}
GEMMA |= {"layer_types": [SLIDING, FULL, SLIDING]}
GLOBAL = {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0}  # as in Gemma 3 4B and larger
LOCAL = {"rope_type": "default", "rope_theta": 300.0}

# name: (model_type, options of its config class)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, multi-head": ("llama", {"num_key_value_heads": H}),
    "llama, multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, head_dim of its own": ("llama", {"head_dim": 16, "rope_parameters": {"rope_theta": 500.0}}),
    "llama, linear": ("llama", scaled("linear", factor=4.0)),
    "llama, llama3": ("llama", scaled("llama3", 1000.0, **LLAMA3)),
    "llama, yarn": ("llama", scaled("yarn", **YARN)),
    "llama, yarn, all options": ("llama", scaled("yarn", attention_factor=1.3, **YARN_ALL)),
    "llama, yarn, mscale": ("llama", scaled("yarn", mscale=1.0, mscale_all_dim=0.5, **YARN)),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"sliding_window": 5}),  # use_sliding_window is false: no window
    "qwen2, tied, head_dim of its own": ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2, upper layers window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, layer types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen3": ("qwen3", {"head_dim": 12, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3, all layers window": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "gemma": ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma, head of its own": ("gemma", {"head_dim": 12}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, scaled": ("gemma3_text", {**GEMMA, "rope_parameters": {FULL: GLOBAL, SLIDING: LOCAL}}),
    "gemma3, every layer windowed": ("gemma3_text", {**GEMMA, "layer_types": [SLIDING] * L}),
    "gemma3, no layer windowed": ("gemma3_text", {**GEMMA, "layer_types": [FULL] * L, "tie_word_embeddings": False}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v2, query rank": ("deepseek_v2", {**MLA, "q_lora_rank": 14, "tie_word_embeddings": True}),
    "deepseek_v2, its own yarn": ("deepseek_v2", {**MLA, **V2_LITE}),
    "deepseek_v2, query rank and yarn": ("deepseek_v2", {**MLA, **V2_LITE, "q_lora_rank": 14}),
    "deepseek_v3, query rank": ("deepseek_v3", {**MLA, "q_lora_rank": 14}),
    "deepseek_v3, rotate-half": ("deepseek_v3", {**MLA, "rope_interleave": False}),
    "deepseek_v3, yarn": ("deepseek_v3", {**MLA, "rope_parameters": scaled("yarn", **YARN)["rope_parameters"]}),
}
WRITABLE = [name for name, (family, _) in CASES.items() if not (FAMILIES[family].latent or FAMILIES[family].gemma)]


def hf_model(case: str) -> PreTrainedModel:
    """transformers' model, random weights at which attention is far from uniform, biases not 0, norms not 1."""
    family, options = copy.deepcopy(CASES[case])  # config classes write into what they are given
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
        "pad_token_id": None,
    }
    config = CONFIG_MAPPING[family](**{**sizes, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved("llama, tied", max_shard_size="20KB")`: a folder that transformers wrote."""

    def save(case: str, **options) -> Path:
        folder = tmp_path / "saved"
        hf_model(case).save_pretrained(folder, **options)
        return folder

    return save


def edited(folder: Path, **changes) -> Path:
    """config.json with other values; `...` takes a key out."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decoder(folder: Path, **options) -> Decoder:
    config, state = load_family(folder, **options)
    model = build_decoder(config)
    model.load_state_dict(state)
    return model.eval()


def compare(model: Decoder, hf: PreTrainedModel) -> None:
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    far = torch.arange(T)[None] + torch.tensor([[0], [180]])  # where scalings of RoPE differ from none
    with torch.no_grad():
        for positions in (None, far):
            theirs = hf(input_ids=ids, position_ids=positions, use_cache=False).logits
            ours = model(ids, positions)
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


# ---- import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, saved):
    folder = saved(case)
    compare(decoder(folder), hf_model(case))
    assert read_family(folder).token_ids == {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}


def test_deepseek_v2_is_interleaved_whatever_its_config_says(saved):
    """transformers' DeepSeek-V2 does not know the key."""
    compare(decoder(edited(saved("deepseek_v2"), rope_interleave=False)), hf_model("deepseek_v2"))


@pytest.mark.parametrize("case", ["llama, tied", "qwen2, layer types", "deepseek_v3, query rank"])
def test_shards_equal_one_file(case, saved):
    folder = saved(case, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    compare(decoder(folder), hf_model(case))


def test_plan_is_a_preset_where_layers_are_alike_and_spelled_out_where_not(saved):
    def kv(case: str) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        return read_family(saved(case)).config.kv

    folder = saved("mistral")
    assert kv("llama, multi-head").preset == "mha"
    assert kv("llama, multi-query").preset == "mqa"
    assert (kv("mistral, window").preset, kv("mistral, window").window) == ("gqa", 5)
    assert kv("qwen2").window is None
    assert not hasattr(kv("qwen2, upper layers window"), "preset")
    plan = read_family(folder).config.plan()
    assert plan == KVPlan.of(LayerPlan(own=Own(n_kv_heads=G), window=w) for w in (None, 5, 5))
    assert kv("deepseek_v2").preset == "mla"
    own = Latent(kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE)
    assert read_family(folder).config.plan() == KVPlan.of([LayerPlan(own=own)] * L)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("case", ["llama, linear", "llama, llama3", "llama, yarn", "llama, head_dim of its own"])
def test_older_way_of_writing_rope(case, type_key, saved):
    folder = saved(case)
    expected = read_family(folder).config
    given = CASES[case][1]["rope_parameters"]
    scaling = {type_key if k == "rope_type" else k: v for k, v in given.items() if k != "rope_theta"} or None
    edited(folder, rope_parameters=..., rope_theta=given["rope_theta"], rope_scaling=scaling)
    assert read_family(folder).config == expected
    assert expected.rope.theta == given["rope_theta"]
    assert (expected.rope.scaling is None) == (scaling is None)


def test_older_configs_leave_keys_out(saved):
    """Llama 1 and 2 say nothing of KV heads, RoPE or head_dim."""
    folder = saved("llama, multi-head")
    expected = read_family(folder).config
    edited(folder, rope_parameters=..., num_key_value_heads=..., head_dim=..., attention_bias=..., mlp_bias=...)
    assert read_family(folder).config == expected


LLAMA2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
PUBLISHED = {
    "Llama-2-7b": (6_738_415_616, {**LLAMA2, "model_type": "llama", "vocab_size": 32000, "pretraining_tp": 1}),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {**LLAMA2, "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name, tmp_path):
    parameters, values = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_act": "silu", "rms_norm_eps": 1e-6}))
    config = read_family(tmp_path).config
    assert count_parameters(meta_decoder(config)) == parameters
    assert {layer.window for layer in config.plan().layers} == {4096 if name.startswith("Mistral") else None}
    if name == "Llama-3.2-1B":
        assert config.rope.theta == 500000.0
        assert config.rope.scaling == RopeScaling(
            type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
        )


def test_one_tensor_at_a_time(saved, monkeypatch):
    folder, most = saved("llama, multi-head"), []
    alive: list[weakref.ref] = []

    def tracked(*args, **kwargs):
        opened = safe_open(*args, **kwargs)
        return Tracked(opened)

    class Tracked:
        def __init__(self, opened):
            self.opened = opened

        def __enter__(self):
            self.opened = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            most.append(sum(reference() is not None for reference in alive))
            tensor = self.opened.get_tensor(name)
            alive.append(weakref.ref(tensor))
            return tensor

    safe_open = load.safe_open
    monkeypatch.setattr(load, "safe_open", tracked)
    _, state = load_family(folder, torch.bfloat16)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert len(most) == len(state)
    assert max(most) == 0


def test_head_is_the_embedding_where_tied(saved):
    folder = saved("llama, tied")
    assert "lm_head.weight" not in stored(folder)
    _, state = load_family(folder)
    assert state["head.weight"] is state["embed.weight"]
    save_file({**stored(folder), "lm_head.weight": stored(folder)["model.embed_tokens.weight"]}, weights_file(folder))
    compare(decoder(folder), hf_model("llama, tied"))
    save_file({**stored(folder), "lm_head.weight": stored(folder)["lm_head.weight"] + 1e-3}, weights_file(folder))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_family(folder)


def test_stored_frequencies_must_be_what_the_config_says(saved):
    folder = saved("llama, multi-head")
    head_dim = D // H
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**stored(folder), name: frequencies.bfloat16()}, weights_file(folder))
    compare(decoder(folder), hf_model("llama, multi-head"))
    save_file({**stored(folder), name: frequencies**1.2}, weights_file(folder))
    with pytest.raises(UserError, match=r"inv_freq is not what rope_theta 10000\.0 gives"):
        load_family(folder)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRITABLE)
def test_written_back_it_is_the_same_checkpoint(case, saved, tmp_path):
    folder, out = saved(case), tmp_path / "out"
    found = read_family(folder)
    config, state = load_family(folder)
    assert export_family(config, state, out, found.family, token_ids=found.token_ids) == found.family

    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = read_family(out)
    assert (again.config, again.token_ids, again.weights) == (found.config, found.token_ids, found.weights)

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    hf, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original, ids = hf_model(case), torch.arange(T)[None] % V
    assert type(hf) is type(original)
    with torch.no_grad():
        assert torch.equal(hf(input_ids=ids).logits, original(input_ids=ids).logits)


def test_written_in_shards_and_in_bf16(saved, tmp_path):
    folder, out = saved("qwen3"), tmp_path / "out"
    config, state = load_family(folder, torch.bfloat16)
    export_family(config, state, out, max_shard_size=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    again_config, again = load_family(out)
    assert again_config == config
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    hf, report = loaded
    assert not report["missing_keys"]
    assert hf.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ({}, "llama"),
        ({"kv": {"preset": "mqa", "window": 5}}, "mistral"),
        ({"n_heads": 5, "head_dim": 8}, "mistral"),
        ({"q_bias": True, "kv_bias": True}, "qwen2"),
        ({"q_bias": True, "kv_bias": True, "kv": {"preset": "gqa", "window": 5, "full_every": 2}}, "qwen2"),
        ({"qk_norm": True, "tie_embeddings": True}, "qwen3"),
    ],
)
def test_family_that_fits_a_model_trained_here(model, family, tiny_config, random_model, tmp_path):
    config = tiny_config(**{"vocab_size": V, "n_layers": 4, **model})
    trained = random_model(config).eval()
    out = tmp_path / "out"
    assert export_family(config, trained.state_dict(), out) == family
    compare(trained, AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager"))


def test_export_keeps_a_matched_width_and_the_deviation_of_initial_weights(tiny_config, tmp_path):
    config = tiny_config(kv={"preset": "gqa", "n_kv_heads": 1}, match_params=True, init={"std": 0.05})
    trained = build_decoder(config)
    trained.init_weights()
    export_family(config, trained.state_dict(), tmp_path / "out")
    found = read_family(tmp_path / "out").config
    assert found.d_ff == trained.blocks[0].mlp.up_proj.out_features > config.d_ff
    assert found.init.std == 0.05


def test_head_that_happens_to_be_the_embedding_is_written_too(tiny_config, random_model, tmp_path):
    config = tiny_config(vocab_size=V)
    trained = random_model(config).eval()
    trained.head.weight = trained.embed.weight
    export_family(config, trained.state_dict(), tmp_path / "out")
    assert "lm_head.weight" in stored(tmp_path / "out")
    compare(trained, AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager"))


ALONE = "every layer reads keys and values of its own"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"kv": {"preset": "cla"}}, {}, f"layer 1: shares the keys of layer 0; .*{ALONE}"),
        ({"kv": {"preset": "fusedkv"}}, {}, r"layer 4: fuses keys of layers \[0, 3\]"),
        ({"kv": {"preset": "mla"}}, {}, "layer 0: owns a latent"),
        (
            {"kv": {"layers": [{"layers": "0-6", "retention": {}}, {"layers": 7, "own": {}}]}},
            {},
            "layer 0: owns a recurrent state; in",
        ),
        ({"kv": {"preset": "gqa", "kv_norm": True}}, {}, r"layer 0: .*\(kv_norm\)"),
        (
            {
                "kv": {
                    "layers": [{"layers": "0-2", "own": {}}, {"layers": "3-7", "own": {"n_kv_heads": 2}}],
                },
            },
            {},
            "layer 3: has 2 KV heads, the layers below have others",
        ),
        ({"q_bias": True}, {}, "cannot be written as llama: model.q_bias is true, there it is false; .*qwen2"),
        ({"kv": {"preset": "mha", "window": 5}}, {"family": "llama"}, "layer 0 has a window of 5"),
        (
            {"kv": {"preset": "mha", "window": 5, "full_every": 4}},
            {"family": "mistral"},
            "layer 3 has window None and layer 0 5",
        ),
        ({}, {"family": "qwen2"}, "cannot be written as qwen2: model.q_bias is false, there it is true"),
        ({}, {"family": "deepseek_v2"}, "family is 'deepseek_v2'; .*allowed: llama, mistral, qwen2, qwen3"),
    ],
)
def test_refused_exports(model, options, message, tiny_config, random_model, tmp_path):
    config = tiny_config(**model)
    with pytest.raises(UserError, match=message):
        export_family(config, random_model(config).state_dict(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_refused_tensors_and_folders_of_exports(tiny_config, random_model, tmp_path):
    config = tiny_config(tie_embeddings=True)
    state = random_model(config).state_dict()
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"tensor norm\.weight is missing"):
        export_family(config, {k: v for k, v in state.items() if k != "norm.weight"}, out)
    with pytest.raises(UserError, match=r"tensor norm\.weight is \[12\]; it should be \[24\]"):
        export_family(config, {**state, "norm.weight": state["norm.weight"][:12]}, out)
    with pytest.raises(UserError, match="tensor extra is no part"):
        export_family(config, {**state, "extra": state["norm.weight"]}, out)
    with pytest.raises(UserError, match=r"head\.weight differs from embed\.weight"):
        export_family(config, {**state, "head.weight": state["head.weight"] + 1}, out)
    assert not out.exists()
    export_family(config, state, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"exists already"):
        export_family(config, {**state, "norm.weight": state["norm.weight"] + 1}, out)
    assert (out / "model.safetensors").read_bytes() == before


# ---- what families that are refused have beyond this decoder ---------------------------------------------------------

INPUTS = "inputs of their own for every layer"
GEMMA_TENSORS = {
    "altup": r"several residual streams \(AltUp\)",
    "laurel": r"a low-rank branch beside each layer \(LAuReL\)",
    "per_layer": INPUTS,
    "layer_scalar": "a factor on the output of each layer",
    "experts": "a mixture of experts beside the MLP",
    "feedforward_layernorm_": "a mixture of experts beside the MLP",
    ".router.": "a mixture of experts beside the MLP",
    ".bias": "biases on all projections of attention",
}
"""For tensors that no known family has, by a part of their names, what the error says of them."""
ALWAYS = ("norms without weights on values",)
INPUTS_OF_4 = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": V}
EXPERTS_OF_4 = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 8}
GEMMA_CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    # name: (model_type, options of its config class, what the error names, what it does not name)
    "3n": (
        "gemma3n_text",
        {
            **INPUTS_OF_4,
            "laurel_rank": 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        (*ALWAYS, r"sparse activations of the MLP \(", r"final_logit_softcapping: 30\.0"),
        ("several widths", "rotates a part", "biases", "gelu"),
    ),
    "3n, other options": (
        "gemma3n_text",
        {
            **INPUTS_OF_4,
            "intermediate_size": [F, F, 24, F],
            "final_logit_softcapping": 15.0,
            "attention_bias": True,
            "num_kv_shared_layers": 0,
        },
        (*ALWAYS, "MLPs of several widths", "biases on all projections"),
        ("sparse activations",),
    ),
    "4": (
        "gemma4_text",
        {
            **INPUTS_OF_4,
            **EXPERTS_OF_4,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_activation": "relu",
        },
        (
            *ALWAYS,
            "hidden_activation: .relu",
            "rotates a part",
            "keys and values of one projection with a norm each",
            "twice the width",
        ),
        ("capped", "biases", "sparse", "later tokens"),
    ),
    "4, other options": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, "hidden_activation": "silu"},
        (*ALWAYS, r"capped logits \(final_logit_softcapping: 30\.0\)"),
        (INPUTS, "experts", "keys and values", "twice the width", "SiLU"),
    ),
    "2": ("gemma2", {}, ("capped logits", "capped scores"), ("query_pre_attn_scalar", "norms", "embeddings", "gelu")),
    "2, one cap": ("gemma2", {"attn_logit_softcapping": None}, ("capped logits",), ("capped scores",)),
    "2, no cap": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        ("allowed: deepseek",),
        (),
    ),
}


@pytest.mark.parametrize("case", GEMMA_CASES)
def test_every_feature_of_a_gemma_is_named_in_one_error(case, tmp_path):
    """Checkpoints as transformers writes them, so the tensors show what the models have."""
    name, options, named, not_named = GEMMA_CASES[case]
    kinds = [SLIDING, FULL, SLIDING, FULL]
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": H, "num_key_value_heads": G, "sliding_window": 5, "layer_types": kinds}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **heads, **options}))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        read_family(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for text in named:
        assert re.search(text, message), (text, message)
    for text in not_named:
        assert not re.search(text, message), (text, message)
    shape = ModelConfig(vocab_size=V, d_model=D, n_layers=4, n_heads=H, qk_norm=True, norms_after=True)
    known = [weight.source for weight in weights(shape)]
    for tensor in model.state_dict().keys() - known:
        texts = [text for part, text in GEMMA_TENSORS.items() if part in tensor]
        assert texts, f"{tensor} is no part of the decoder, and no feature names it"
        assert all(re.search(text, message) for text in texts), (tensor, message)


def test_encoders_of_other_inputs_are_named_beside_the_text_model(tmp_path):
    config = {"model_type": "gemma4", "vision_config": {"hidden_size": 8}, "text_config": {"attention_bias": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"biases on all projections.*encoders of other inputs \(vision\)$"):
        read_family(tmp_path)


# ---- refusals of an import -------------------------------------------------------------------------------------------


def rope_parameters(kind: str, **options) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral", {"model_type": "llamma"}, "model_type is 'llamma'; allowed: deepseek_v2, .*, qwen3$"),
        (
            "mistral",
            {"model_type": "t5"},
            "model_type is 't5'; allowed: deepseek_v2, deepseek_v3, gemma, gemma3, gemma3_text, llama",
        ),
        *(
            ("mistral", {"model_type": name}, f"model_type is {name}, .*mixture of experts")
            for name in ("llama4", "deepseek_v32", "qwen3_next", "gpt_oss")
        ),
        *(
            ("mistral", {"model_type": name}, f"model_type is {name}, .*inputs of their own for every layer")
            for name in ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
        ),
        ("mistral", {"model_type": ...}, "model_type is None"),
        ("mistral", {"model_type": "gemma2"}, "model_type is gemma2, .*capped logits"),
        ("mistral", {"model_type": "gemma3"}, r"text_config: model_type is null; allowed: gemma3_text"),
        ("gemma3", {"attention_bias": True}, "attention_bias is true; allowed: false"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; allowed: null"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; allowed: null"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true; allowed: false"),
        ("gemma3", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"; allowed: "gelu_pytorch_tanh"'),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; allowed: a positive number"),
        (
            "gemma3",
            {"rope_parameters": {FULL: LOCAL, SLIDING: GLOBAL}},
            'rope_type is "linear"; allowed: "default" .of sliding_attention',
        ),
        (
            "gemma3",
            {"rope_parameters": {FULL: {**LOCAL, "partial_rotary_factor": 0.5}, SLIDING: LOCAL}},
            "rope_parameters: full_attention: partial_rotary_factor is 0.5; allowed: 1",
        ),
        (
            "gemma3",
            {"rope_parameters": {FULL: LOCAL, "chunked_attention": LOCAL}},
            "rope_parameters has the keys .*chunked_attention.*; allowed: full_attention, sliding_attention",
        ),
        ("gemma3", {"rope_parameters": {FULL: {"rope_type": "dynamic"}}}, 'full_attention: rope_type is "dynamic"'),
        ("gemma", {"hidden_act": "silu"}, 'hidden_act is "silu"; allowed: "gelu_pytorch_tanh" or "gelu"'),
        ("mistral", {"model_type": "mixtral"}, "model_type is mixtral, .*mixture of experts"),
        (
            "qwen3",
            {"per_layer_config": {"1": {"head_dim": 32}}},
            r'per_layer_config is {"1": {"head_dim": 32}}; allowed',
        ),
        ("mistral", {"num_local_experts": 8}, "num_local_experts is 8; allowed: null or 0"),
        ("mistral", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; allowed: "silu" or "swish"'),
        ("llama, tied", {"attention_bias": True}, "attention_bias is true; allowed: false"),
        ("llama, tied", {"mlp_bias": True}, "mlp_bias is true; allowed: false"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true; allowed: false"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout is 0.1; allowed: 0"),
        (
            "mistral",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is .*gptq.*; allowed: null",
        ),
        ("mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; allowed: null"),
        ("mistral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; allowed: null"),
        ("qwen2", {"is_causal": False}, "is_causal is false; allowed: true"),
        ("llama, tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; allowed: 1"),
        ("llama, tied", rope_parameters("default", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        ("llama, tied", rope_parameters("dynamic", factor=2.0), 'rope_type is "dynamic"; allowed: default, linear'),
        ("llama, tied", {"rope_scaling": {"type": "longrope"}}, 'rope_scaling: rope_type is "longrope"; allowed'),
        ("llama, tied", {"rope_parameters": {FULL: {"rope_type": "default"}}}, "one set of parameters for all layers"),
        ("llama, tied", rope_parameters("linear"), "factor"),
        ("llama, tied", rope_parameters("yarn", **YARN, truncate=False), "truncate is false; allowed: true"),
        ("llama, tied", rope_parameters("yarn", **YARN, mscale=0.7), "mscale is 0.7 and mscale_all_dim null"),
        ("llama, tied", {"sliding_window": 5}, "sliding_window is 5; allowed: null"),
        ("mistral, window", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types is .*all are sliding_attention"),
        ("qwen2", {"layer_types": [FULL, SLIDING, FULL]}, r"layer_types\[1\] is sliding_attention, but .*no window"),
        ("qwen2", {"layer_types": [FULL, "chunked_attention", FULL]}, r"layer_types\[1\] is chunked_attention"),
        ("deepseek_v2", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1 of 3 layers; .*experts"),
        ("deepseek_v2", {"first_k_dense_replace": ...}, "first_k_dense_replace is 0 of 3 layers; .*experts"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; allowed: 1e-06"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads is 2; allowed: 4"),
        ("llama, tied", rope_parameters("linear", factor="4"), 'factor is "4"; allowed: a positive number'),
        ("llama, tied", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is null"),
        ("mistral", {"model_type": ["llama"]}, "model_type is \\['llama'\\]"),
        ("mistral", {"vocab_size": 1}, "config.json: vocab_size"),
        ("mistral", {"num_key_value_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ],
)
def test_refused_configs(case, changes, message, saved):
    folder = edited(saved(case), **changes)
    with pytest.raises(UserError, match=message) as raised:
        load_family(folder)
    assert str(folder / "config.json") in str(raised.value)


@pytest.mark.parametrize(("text", "message"), [(None, "missing"), ("{", "cannot be read"), ("[]", "holds a list")])
def test_refused_config_files(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read_family(tmp_path)


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"no weight file holds the tensor {NORM}, which fills norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"no weight file holds the tensor lm_head\.weight"),
        (lambda t: t.update(score=torch.zeros(2)), r"model\.safetensors: tensor score is no part of a llama model"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(D)}),
            r"tensor model\.layers\.1\.self_attn\.q_proj\.bias is no part",
        ),
        (
            lambda t: t.update({UP: t[UP].T.contiguous()}),
            rf"model\.safetensors: tensor {UP} is \[{D}, {F}\]; .*should be \[{F}, {D}\]",
        ),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), rf"tensor {UP} holds F8_E4M3; .*not quantised"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"tensor {UP} holds I8; .*not quantised"),
    ],
)
def test_refused_tensors(change, message, saved):
    folder = saved("llama, multi-head")
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, weights_file(folder))
    with pytest.raises(UserError, match=message):
        load_family(folder)


def test_refused_weight_files(saved):
    folder = saved("llama, multi-head")
    weights_file(folder).write_bytes(weights_file(folder).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        load_family(folder)
    weights_file(folder).unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_family(folder)


def test_refused_shards(saved):
    folder = saved("llama, multi-head", max_shard_size="20KB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first, second, *_ = sorted(folder.glob("*.safetensors"))

    def refused(message: str, weight_map: dict[str, str] | None = None) -> None:
        index_file.write_text(json.dumps({**index, "weight_map": weight_map or index["weight_map"]}))
        with pytest.raises(UserError, match=message):
            load_family(folder)

    name = next(name for name, shard in index["weight_map"].items() if shard == first.name)
    moved = {**index["weight_map"], name: second.name}
    refused(f"{first.name}: tensor {name} is here, but in the index it is in {second.name}", moved)
    refused(f"{second.name}: does not hold the tensor more", {**index["weight_map"], "more": second.name})
    refused(
        "weight_map names '../x.safetensors'; allowed: names of files in",
        {**index["weight_map"], name: "../x.safetensors"},
    )
    kept = second.read_bytes()
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    refused(f"{second.name}: tensor {name} is also in .*{first.name}")
    second.unlink()
    refused(f"{second.name}: cannot be read")
    second.write_bytes(kept)
    save_file({"x": torch.zeros(1)}, weights_file(folder))
    refused("holds both model.safetensors and model.safetensors.index.json")
    weights_file(folder).unlink()
    index_file.write_text("{}")
    with pytest.raises(UserError, match="weight_map is null; allowed: an object"):
        load_family(folder)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_pickles_are_read_only_where_allowed_and_run_nothing(saved, monkeypatch):
    folder = saved("llama, multi-head")
    monkeypatch.chdir(folder)
    weights_file(folder).unlink()
    torch.save(hf_model("llama, multi-head").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights are pickled .*convert\.py import .* OUT --allow-pickle"):
        load_family(folder)
    compare(decoder(folder, allow_pickle=True), hf_model("llama, multi-head"))
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        load_family(folder, allow_pickle=True)
    assert not (folder / "touched").exists()


def test_config_that_was_read_is_a_config_that_yaml_can_say(saved):
    for case in ("qwen2, layer types", "llama, yarn, all options"):
        config = read_family(saved(case)).config
        assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
