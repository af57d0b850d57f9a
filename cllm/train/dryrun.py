"""What a config would train, told without training: the plan, its size, its cost."""

from __future__ import annotations

import operator
from pathlib import Path

from cllm.cache.accounting import cache_bytes, kv_bytes, mha_twin
from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.module import TRAIN, VALIDATION
from cllm.errors import DataError, UserError
from cllm.model.decoder import Decoder
from cllm.model.sizes import (
    count_parameters,
    forward_flops_per_token,
    meta_decoder,
    model_d_ff,
    training_flops_per_token,
)
from cllm.plan.describe import plan_drawing, plan_table
from cllm.train.optim import check_warmup
from cllm.train.strategy import REDUCE_BUCKET, processes_of, zero_stage
from cllm.train.swiglu import will_fuse
from cllm.uptrain.teacher import teacher_config
from cllm.uptrain.trainable import make_trainable

GIB = 2**30
ZERO3_LIVE = 1_000_000_000
"""Parameters that DeepSpeed's ZeRO-3 leaves gathered at most (`stage3_max_live_parameters`)."""


def _compute_bytes(config: Config) -> int:
    """Bytes of a number in the forward pass; `auto` is told for a GPU, where it means bf16."""
    return 2 if config.train.in_bf16(gpu=config.train.accelerator != "cpu") else 4


def block_activation_bytes(model: Decoder, config: Config, layer: int) -> int:
    """Bytes a token that one compiled block keeps for its backward.

    The stream before and in the midst of the block, both norms' outputs and, for owners with a norm of their own, its
    output; what attention keeps: queries, its output, and the keys and values that the layer made itself, by projecting
    or, unless that is recomputed, by fusing; and three tensors of width d_ff, or two where SwiGLU is fused.
    """
    c, plan = config.model, model.plan
    narrow = _compute_bytes(config)
    wide = 4 if config.train.fp32_residual else narrow
    own = plan.layers[layer].own
    made = (own is not None) + (plan.fuses(layer) and not config.train.recompute_fusion)
    kept = plan.source(layer).read_activations(c.n_heads, c.resolved_head_dim, made)
    kept += c.d_model if own is not None and own.normalises else 0
    hidden = (2 if will_fuse(model, config) else 3) * model_d_ff(c)
    return 2 * c.d_model * wide + (2 * c.d_model + kept + hidden) * narrow


def memory_estimate(model: Decoder, config: Config, *, teacher: int = 0) -> dict[str, float]:
    """GiB at the peak of a training step on each device, of a model of which what is not trained is frozen.

    The peak is the start of the backward: weights and optimizer states as the strategy holds them, the bf16 copies of
    weights that autocast keeps, all activations of a micro-batch, the loss's chunk of logits and the head's gradient;
    and gradients, where accumulation keeps them from one micro-batch to the next. Layers of a cycle keep activations of
    every pass that has a gradient. With gradient checkpointing blocks keep their input alone, slots that other layers
    read stay as well, and one block is whole at a time. `teacher` counts the parameters of a model that computes along;
    it keeps nothing but them.
    """
    c, train = config.model, config.train
    assert c.vocab_size is not None
    parameters, tokens = count_parameters(model), train.micro_batch * config.data.seq_len
    trained = _trained(model)
    narrow = _compute_bytes(config)
    blocks = [block_activation_bytes(model, config, i) for i in range(c.n_layers)]
    passes = _kept_passes(model)
    if train.gradient_checkpointing:
        slots = sum(passes[j] * sum(model.plan.owned(j).elements(c.resolved_head_dim)) for j in model.plan.shared)
        per_token = sum(passes) * c.d_model * (4 if train.fp32_residual else narrow) + slots * narrow + max(blocks)
    else:
        per_token = sum(map(operator.mul, passes, blocks))
    head_grad = c.vocab_size * c.d_model * (4 + narrow) if model.head.weight.requires_grad else 0
    loss = 3 * tokens * c.d_model * narrow + head_grad + 2**29
    autocast = narrow == 2 and zero_stage(train) is None
    copies = 2 * parameters if autocast and not train.gradient_checkpointing else 0
    parts = state_bytes(config, parameters, trained)
    parts["activations"] = max(tokens * per_token + loss + copies, _after_backward(config, trained, parts["gradients"]))
    if teacher:
        parts["teacher"] = narrow * teacher
    return {name: size / GIB for name, size in (parts | {"total": sum(parts.values())}).items()}


def _after_backward(config: Config, trained: int, kept: float) -> float:
    """Bytes beside `kept` ones of gradients when the backward is over and no activation is left.

    Where gradients do not outlive a step all of them are there now. ZeRO-1 and 2 lay a device's share out flat once
    more, and where it is bf16, without accumulation, make it fp32; ZeRO-1 with accumulation sums it up flat.
    """
    stage, devices = zero_stage(config.train), processes_of(config.train)
    if stage is None:
        return 0.0 if kept else 4.0 * trained
    if stage == 3 or config.train.offload_optimizer:
        return 0.0
    if _accumulates(config):
        return 4.0 * trained / devices if stage == 2 else 0.0
    return max(8.0 * trained / devices - kept, 0.0)


def _accumulates(config: Config) -> bool:
    """Whether a step has several micro-batches."""
    return config.train.global_batch > config.train.micro_batch * processes_of(config.train)


def state_bytes(config: Config, parameters: int, trained: int) -> dict[str, float]:
    """Bytes on each device of what outlives a micro-batch: `weights`, `optimizer`, `gradients`, ZeRO's `buffers`.

    DDP's buckets are its gradients. ZeRO: docs/distributed.md has the bytes a parameter.
    """
    train, stage = config.train, zero_stage(config.train)
    devices = processes_of(train)
    accumulates = _accumulates(config)
    if stage is None:
        kept = accumulates or train.strategy == "ddp" or devices > 1
        return {"weights": 4 * parameters, "optimizer": 8 * trained, "gradients": 4 * trained if kept else 0}
    narrow = {1: 2 + 4 * accumulates, 2: (4 if accumulates else 2) / devices}
    buckets = (2 if devices > 1 else 1) * min(REDUCE_BUCKET, parameters)
    live = min(ZERO3_LIVE, parameters) if stage == 3 else 0
    return {
        "weights": 2 * parameters / (devices if stage == 3 else 1),
        "optimizer": 0 if train.offload_optimizer else 12 * trained / devices,
        "gradients": narrow[min(stage, 2)] * trained,
        "buffers": 2 * (buckets + live),
    }


def _kept_passes(model: Decoder) -> list[int]:
    """How often each layer's activations are kept for the backward: once, in a cycle for each pass with gradients."""
    times, iterations = [1] * len(model.plan), model.plan.iterations
    for first, last in model.plan.cyclic_spans():
        assert iterations is not None
        times[first : last + 1] = [iterations.backward] * (last + 1 - first)
    return times


def _trained(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _teacher_parameters(config: Config) -> int:
    """Of the model that `init.from` names, where it computes along in every step; 0 without."""
    if config.init.path is None or not config.uptrain.needs_teacher:
        return 0
    return count_parameters(meta_decoder(teacher_config(config.init.path)))


def _size(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def data_line(config: Config) -> str:
    """The data that a run would read. Training data may still have to be prepared; anything else that is amiss is an
    error here as it would be in training.

    Raises:
        UserError: for data that cannot be read, and for validation sets that do not exist.
    """
    data, there = config.data, Path(config.data.path).exists()
    line = f"{data.path}: not prepared yet"
    if there:
        train = Manifest.read(data.path).split(TRAIN)
        line = f"{data.path}: {train.tokens:,} tokens in {train.documents:,} documents"
    for name, folder in data.validation.items():
        try:
            Manifest.read(folder).split(VALIDATION)
        except DataError as error:
            raise UserError(f"data.validation.{name}: {error}") from None
    sets = f"; validation sets: {', '.join(data.validation)}" if data.validation else ""
    return f"data         data.path {line}{sets}"


def dry_run(config: Config) -> str:
    """The report of `train.py --dry-run`. `config.model.vocab_size` must be set.

    Raises `UserError` for a warm-up longer than the run, and for data that a run could not read, see `data_line`.
    """
    check_warmup(config)
    data = data_line(config)
    model = meta_decoder(config.model)
    c = config.model
    own, twin = kv_bytes(c), kv_bytes(mha_twin(c))
    resident, read = own.relative_to(twin)
    total, inner = count_parameters(model), count_parameters(model, embeddings=False)
    context, seq_len = own.context, config.data.seq_len
    forward, training = forward_flops_per_token(model, seq_len), training_flops_per_token(model, seq_len)
    teacher = _teacher_parameters(config)
    make_trainable(model, config)
    memory = memory_estimate(model, config, teacher=teacher)
    devices = processes_of(config.train)
    where = "one GPU" if devices == 1 else f"each of {devices} GPUs"
    where += f" under {config.train.strategy}" if config.train.strategy not in ("auto", "single") else ""
    uptraining = [f"trained      {_trained(model):,} (uptrain.trainable {config.uptrain.trainable})"]
    uptraining += [f"teacher      {teacher:,} parameters, a forward pass in every step"] * (teacher > 0)
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
        *(uptraining if config.init.path else ()),
        f"KV cache     {own.resident:,.0f} bytes a token resident, {own.written:,.0f} written, {own.read:,.0f} read "
        f"(bf16, context {context:,})",
        f"against mha  {resident:.4g}x resident, {read:.4g}x read",
        f"a sequence   of {context:,} tokens leaves {cache_bytes(c, context=context):,} bytes in the cache "
        f"({_size(cache_bytes(c, context=context))})",
        f"FLOPs        {forward:.4g} a token forward, {training:.4g} training (sequences of {seq_len:,})",
        f"run          {config.train.steps:,} steps of {config.train.global_batch * seq_len:,} tokens = {tokens:,} "
        f"tokens, {training * tokens:.3g} FLOPs",
        data,
        "memory       "
        + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
        + f" GiB at the peak on {where} (estimate, micro-batch {config.train.micro_batch})",
    ]
    return "\n".join(lines)
