"""What a config would train, told without training: the plan, its size, its cost."""

from __future__ import annotations

import torch

from cllm.config import Config
from cllm.kv.accounting import kv_bytes, mha_twin
from cllm.kv.describe import plan_drawing, plan_table
from cllm.kv.plan import Latent, Own
from cllm.model.decoder import Decoder
from cllm.model.sizes import (
    build_decoder,
    count_parameters,
    forward_flops_per_token,
    model_d_ff,
    training_flops_per_token,
)

GIB = 2**30


def activation_bytes(model: Decoder, config: Config) -> float:
    """Bytes that the forward pass of one micro-batch keeps for the backward; an estimate, from what autograd saves.

    A block keeps its input and the inputs of its norms (fp32), queries, keys, values, attention's output, and three
    tensors of width d_ff. With gradient checkpointing it keeps its input alone, and one block's rest at a time. The
    logits are held in the compute dtype and twice in fp32 (values and gradient).
    """
    c = config.model
    wide, narrow = 4, 2 if config.train.precision != "fp32" and config.train.accelerator != "cpu" else 4
    tokens = config.train.micro_batch * config.data.seq_len
    per_block = []
    for i, block in enumerate(model.blocks):
        source = model.plan.source(i)
        if isinstance(source, Latent):
            heads = c.n_heads * (2 * source.qk_nope_head_dim + 2 * source.qk_rope_head_dim + 2 * source.v_head_dim)
        else:
            kv = source.n_kv_heads if isinstance(source, Own) else c.n_heads
            owned = 2 * kv if model.plan.layers[i].own is not None or len(model.plan.reads(i)) > 1 else 0
            heads = (2 * c.n_heads + owned) * c.resolved_head_dim
        d_ff = next(m.out_features for n, m in block.named_modules() if n == "mlp.gate_proj")
        per_block.append(3 * c.d_model * wide + (2 * c.d_model + heads + 4 * d_ff) * narrow)
    blocks = sum(per_block)
    if config.train.gradient_checkpointing:
        blocks = c.d_model * wide * c.n_layers + max(per_block)
    assert c.vocab_size is not None
    return tokens * (blocks + c.vocab_size * (narrow + 2 * wide))


def memory_estimate(model: Decoder, config: Config) -> dict[str, float]:
    """GiB of training on one device: fp32 weights, gradients and AdamW's two moments, activations, and the sum."""
    parameters = count_parameters(model)
    parts = {
        "weights": 4 * parameters / GIB,
        "gradients": 4 * parameters / GIB,
        "optimizer": 8 * parameters / GIB,
        "activations": activation_bytes(model, config) / GIB,
    }
    return parts | {"total": sum(parts.values())}


def _size(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def dry_run(config: Config) -> str:
    """The report of `train.py --dry-run`. `config.model.vocab_size` must be set."""
    with torch.device("meta"):
        model = build_decoder(config.model)
    c = config.model
    own, twin = kv_bytes(c), kv_bytes(mha_twin(c))
    resident, read = own.relative_to(twin)
    total, inner = count_parameters(model), count_parameters(model, embeddings=False)
    context, seq_len = own.context, config.data.seq_len
    forward, training = forward_flops_per_token(model, seq_len), training_flops_per_token(model, seq_len)
    memory = memory_estimate(model, config)
    tokens = config.train.steps * config.train.global_batch * seq_len
    d_ff = model_d_ff(c)
    matched = f" ({c.resolved_d_ff} before match_params)" if d_ff != c.resolved_d_ff else ""
    lines = [
        plan_table(model.plan),
        "",
        plan_drawing(model.plan),
        "",
        f"model        {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads of {c.resolved_head_dim}, "
        f"d_ff {d_ff}{matched}, vocabulary {c.vocab_size:,}",
        f"parameters   {total:,} ({inner:,} without embeddings)",
        f"KV cache     {own.resident:,.0f} bytes a token resident, {own.written:,.0f} written, {own.read:,.0f} read "
        f"(bf16, context {context:,})",
        f"against mha  {resident:.4g}x resident, {read:.4g}x read; {_size(own.resident * context)} at "
        f"{context:,} tokens",
        f"FLOPs        {forward:.4g} a token forward, {training:.4g} training (sequences of {seq_len:,})",
        f"run          {config.train.steps:,} steps of {config.train.global_batch * seq_len:,} tokens = {tokens:,} "
        f"tokens, {training * tokens:.3g} FLOPs",
        "memory       "
        + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
        + f" GiB on one device (estimate, micro-batch {config.train.micro_batch})",
    ]
    return "\n".join(lines)
