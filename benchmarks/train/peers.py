"""Other trainers, for --peers: Hugging Face's Llama with Liger's kernels, and litgpt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train.contender import Contender, Loss
from cllm.config import Config, OptimConfig
from cllm.errors import UserError
from cllm.train.optim import find_optimizer


def check_peers(config: Config) -> None:
    """Refuse a first design that the peers cannot build. They build a Llama with a KV head for each query head.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    c, kv = config.model, config.model.kv
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("model.kv.preset", getattr(kv, "preset", None), ("mha",)),
        ("model.kv.n_kv_heads", getattr(kv, "n_kv_heads", None), (None, c.n_heads)),
        ("model.kv.window", getattr(kv, "window", None), (None,)),
        ("model.kv.kv_norm", getattr(kv, "kv_norm", False), (False,)),
        ("model.rope.theta", c.rope.theta, (10000.0,)),
        ("model.rope.scaling", c.rope.scaling, (None,)),
        ("train.gradient_checkpointing", config.train.gradient_checkpointing, (False,)),
    ]
    wanted += [
        (f"model.{key}", getattr(c, key), (False,)) for key in ("tie_embeddings", "qk_norm", "q_bias", "kv_bias")
    ]
    wanted += [(f"model.{key}", value, ("the default",)) for key, value in c.beyond_llama.items()]
    for key, value, allowed in wanted:
        if value not in allowed:
            raise UserError(
                f"{key} of the first design is {value}, which --peers do not build; allowed: "
                f"{', '.join('null' if a is None else str(a) for a in allowed)}"
            )


def _contender(name: str, model: nn.Module, loss: Loss, flops: float, config: OptimConfig) -> Contender:
    """With the same optimizer as the designs; `flops` a token are those of the first design."""
    groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
    return Contender(name, model, loss, find_optimizer(config).build(groups, config), flops)


def _hf_llama(config: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config.model
    shape: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.resolved_d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads,
        "head_dim": c.resolved_head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(**shape)).train()


def hf_liger(config: Config, flops: float) -> Contender:
    """Hugging Face's Llama with Liger's kernels, of the shape of `config`."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    model = _hf_llama(config)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

    return _contender("HF Llama + Liger", model, loss, flops, config.optim)


def litgpt_compiled(config: Config, flops: float) -> Contender:
    """litgpt's GPT of the shape of `config`, compiled in one piece with its loss."""
    from litgpt import GPT
    from litgpt.config import Config as GPTConfig

    c = config.model
    shape = GPTConfig(
        block_size=c.max_seq_len,
        vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        n_embd=c.d_model,
        head_size=c.resolved_head_dim,
        n_query_groups=c.n_heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=c.norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=c.resolved_d_ff,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(shape).train()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return _contender("litgpt compiled", model, torch.compile(loss), flops, config.optim)
