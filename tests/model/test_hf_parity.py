"""With the same weights, the logits of transformers' Llama, Qwen2, Qwen3, Mistral, and the MLA of its DeepSeek."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from cllm.config import ModelConfig, Rope
from cllm.model.context import Context
from cllm.model.decoder import Decoder

V, D, F, L, H, G = 48, 40, 56, 3, 4, 2
T = 24


def randomized(module: nn.Module) -> nn.Module:
    """Weights of a size at which attention is far from uniform, norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name
            parameter.copy_(1 + 0.3 * noise if norm else noise / parameter.shape[-1] ** 0.5)
    return module.eval()


def from_hf(state: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Names of Hugging Face checkpoints as names of ours."""
    ours = {
        "self_attn.q_proj": "attention.q_proj",
        "self_attn.k_proj": "attention.owner.k_proj",
        "self_attn.v_proj": "attention.owner.v_proj",
        "self_attn.o_proj": "attention.o_proj",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.owner.k_norm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    top = {
        "model.embed_tokens.weight": "embed.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    weights = {}
    for name, tensor in state.items():
        if name in top:
            weights[top[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        weights[f"blocks.{layer}.{ours[module]}.{kind}"] = tensor
    if tied:
        weights["head.weight"] = weights["embed.weight"]
    return weights


def hf_options(**more) -> dict:
    return {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        **more,
    }


def rope(theta: float, **scaling) -> dict:
    return {"rope_theta": theta, "rope_type": "default", **scaling}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# name: (HF config and model, HF options, ours)
CASES = {
    "llama, multi-head": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": H, "rope_parameters": rope(10000.0)},
        {"kv": {"preset": "mha"}},
    ),
    "llama, grouped": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": rope(500.0)}, {"rope": {"theta": 500.0}}),
    "llama, tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": rope(10000.0)},
        {"tie_embeddings": True},
    ),
    "llama, head_dim of its own": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 16, "rope_parameters": rope(10000.0)},
        {"head_dim": 16},
    ),
    "llama, linear scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": rope(10000.0, rope_type="linear", factor=4.0)},
        {"rope": {"scaling": {"type": "linear", "factor": 4.0}}},
    ),
    "llama, llama3 scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "head_dim": 32,
            "rope_parameters": rope(1000.0, rope_type="llama3", original_max_position_embeddings=64, **LLAMA3),
        },
        {
            "head_dim": 32,
            "rope": {"theta": 1000.0, "scaling": {"type": "llama3", "original_max_seq_len": 64, **LLAMA3}},
        },
    ),
    "llama, yarn scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "head_dim": 32,
            "rope_parameters": rope(10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        },
        {"head_dim": 32, "rope": {"scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64}}},
    ),
    "llama, yarn scaling, all options": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "head_dim": 32,
            "rope_parameters": rope(
                10000.0,
                rope_type="yarn",
                factor=2.0,
                original_max_position_embeddings=128,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=1.3,
            ),
        },
        {
            "head_dim": 32,
            "rope": {
                "scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_seq_len": 128,
                    "beta_fast": 16.0,
                    "beta_slow": 2.0,
                    "attention_factor": 1.3,
                }
            },
        },
    ),
    "qwen2, biases": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": False, "rope_parameters": rope(1e6)},
        {"q_bias": True, "kv_bias": True, "rope": {"theta": 1e6}},
    ),
    "qwen3, norms of queries and keys": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 12, "use_sliding_window": False, "rope_parameters": rope(1e6)},
        {"head_dim": 12, "qk_norm": True, "rope": {"theta": 1e6}},
    ),
    "mistral, sliding window": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": 5, "rope_parameters": rope(10000.0)},
        {"kv": {"preset": "gqa", "n_kv_heads": G, "window": 5}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    config_class, model_class, theirs, ours = CASES[case]
    hf = randomized(model_class(config_class(**hf_options(**theirs))))
    base = {"kv": {"preset": "gqa", "n_kv_heads": G}, "norm_eps": 1e-6, "max_seq_len": 256}
    config = ModelConfig(**{"vocab_size": V, "d_model": D, "d_ff": F, "n_layers": L, "n_heads": H, **base, **ours})
    model = Decoder(config)
    model.load_state_dict(from_hf(hf.state_dict(), config.tie_embeddings))
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(T)[None] + torch.tensor([[0], [180]])  # where scalings differ from none
    with torch.no_grad():
        for where in (None, positions):
            expected = hf(input_ids=ids, position_ids=where, use_cache=False).logits
            largest = float(expected.abs().max())
            torch.testing.assert_close(model(ids, where), expected, atol=1e-5 * largest, rtol=0)


# ---- MLA -----------------------------------------------------------------------------------------------------------

RANK, NOPE, ROPE, VALUE = 20, 6, 8, 10
DEEPSEEK = {
    2: (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
    3: (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
}


def rotate_half_order(weight: torch.Tensor, heads: int, before: int) -> torch.Tensor:
    """Rows of RoPE channels from interleaved pairs (2j, 2j+1), as DeepSeek has them, to pairs (j, j + d/2). Of each of
    `heads` groups of rows the first `before` have no position."""
    grouped = weight.unflatten(0, (heads, -1))
    plain, turned = grouped[:, :before], grouped[:, before:]
    return torch.cat((plain, turned[:, 0::2], turned[:, 1::2]), dim=1).flatten(0, 1)


@pytest.mark.parametrize("q_rank", [None, 14])
@pytest.mark.parametrize("version", [2, 3])
def test_mla_equals_deepseek(version, q_rank):
    config_class, attention_class, rope_class = DEEPSEEK[version]
    sizes = {"kv_lora_rank": RANK, "q_lora_rank": q_rank, "qk_nope_head_dim": NOPE}
    sizes |= {"qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    hf_config = config_class(**hf_options(num_key_value_heads=H, rope_parameters=rope(10000.0), **sizes))
    hf = randomized(attention_class(hf_config, layer_idx=0))

    config = ModelConfig(
        vocab_size=V, d_model=D, n_layers=1, n_heads=H, norm_eps=1e-6, kv={"preset": "mla", **sizes}, max_seq_len=256
    )
    ours = Decoder(config).blocks[0].attention
    queries = "q_proj" if q_rank is None else "q_b_proj"
    theirs = dict(hf.state_dict())
    state = {
        "q_proj.weight": rotate_half_order(theirs[f"{queries}.weight"], H, NOPE),
        "owner.down_proj.weight": rotate_half_order(theirs["kv_a_proj_with_mqa.weight"], 1, RANK),
        "owner.norm.weight": theirs["kv_a_layernorm.weight"],
        "kv_up_proj.weight": theirs["kv_b_proj.weight"],
        "o_proj.weight": theirs["o_proj.weight"],
    }
    if q_rank is not None:
        state |= {"q_down_proj.weight": theirs["q_a_proj.weight"], "q_norm.weight": theirs["q_a_layernorm.weight"]}
    ours.load_state_dict(state)

    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(T)[None]
    causal = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        tables = rope_class(hf_config)(x, positions)
        expected = hf(hidden_states=x, position_embeddings=tables, attention_mask=causal)[0]
        out, slot = ours(x, x, {}, Context(Rope(), positions))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (slot.k.shape, slot.v.shape) == ((2, T, RANK), (2, T, ROPE))
