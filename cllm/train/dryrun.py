"""A dry run: the plan of a config, its size and its cost, without training."""

from __future__ import annotations

import operator

from cllm.cache.accounting import cache_bytes, describe_bytes
from cllm.config import Config
from cllm.config.unused import unused_settings
from cllm.model.decoder import Decoder
from cllm.model.parts import has_fusion_weights
from cllm.model.sizes import (
    count_parameters,
    forward_flops_per_token,
    meta_decoder,
    model_d_ff,
    training_flops_per_token,
)
from cllm.plan.describe import plan_drawing, plan_table
from cllm.plan.joins import Whole
from cllm.plan.numbers import ranges
from cllm.train.budget import budget_lines, run_tokens
from cllm.train.launch import Launch
from cllm.train.schedule import check_warmup
from cllm.train.strategy import REDUCE_BUCKET
from cllm.train.swiglu import will_fuse
from cllm.uptrain.student import planned_student

GIB = 2**30
ZERO3_LIVE = 1_000_000_000
"""The largest number of parameters that DeepSpeed's ZeRO-3 keeps gathered (`stage3_max_live_parameters`)."""


def _compute_bytes(launch: Launch) -> int:
    """Bytes of a number in the forward pass."""
    return 2 if launch.bf16 else 4


def block_activation_bytes(model: Decoder, config: Config, launch: Launch, layer: int) -> int:
    """Bytes a token that one compiled block keeps for its backward.

    These are the residual stream before and inside the block; the outputs of both norms and, in owners with `kv_norm`,
    of that one; with `norms_after` the outputs that these norms read; the queries and the output of attention; the keys
    and values that the layer computed itself, by projection or, unless that is recomputed, by fusion, and what complex
    and matrix weights keep besides these; and three tensors of width d_ff, or two if SwiGLU is fused.
    """
    c, plan = config.model, model.plan
    narrow = _compute_bytes(launch)
    wide = 4 if config.train.fp32_residual else narrow
    own = plan.layers[layer].own
    fuses = plan.fuses(layer) and not config.train.recompute_fusion
    computed = (own is not None) + fuses
    kept = plan.source(layer).read_activations(c.n_heads, c.resolved_head_dim, computed)
    kept += _local_activations(model, layer)
    kept += plan.kept_activations(layer, c.resolved_head_dim) if fuses else 0
    kept += c.d_model if own is not None and own.normalises and own.input is None else 0
    kept += 2 * c.d_model if c.norms_after else 0
    kept += c.d_model if layer in plan.inputs else 0  # normalised, for the owners that project it
    hidden = (2 if will_fuse(model, config, launch) else 3) * model_d_ff(c)
    return 2 * c.d_model * wide + (2 * c.d_model + kept + hidden) * narrow


def _local_activations(model: Decoder, layer: int) -> int:
    """Numbers a token that a read of several slots keeps besides those of the layer's first slot."""
    c, read, local = model.config, model.plan.keys(layer), model.plan.layers[layer].local
    own = 0 if local is None else local.read_elements(c.resolved_head_dim) + local.normalises * c.d_model
    head_dim = model.plan.source(layer).head_size(c.resolved_head_dim)
    return own + (read.extra_activations(c.n_heads, head_dim) if isinstance(read, Whole) else 0)


def memory_estimate(model: Decoder, config: Config, launch: Launch, *, teacher: int = 0) -> dict[str, float]:
    """GiB at the peak of a training step on each device. Weights of `model` that are not trained must be frozen.

    The peak is at the start of the backward: weights and optimizer states as the strategy stores them, the bf16 copies
    of weights that autocast makes, all activations of a micro-batch, the loss's chunk of logits, the head's gradient,
    and with accumulation the gradients of earlier micro-batches. Layers of a cycle keep activations of every pass with
    gradients. With gradient checkpointing, blocks keep only their input and the slots that other layers read, and one
    block at a time has all its activations. `teacher` is the number of parameters of a teacher, which keeps no
    activations.
    """
    c, train = config.model, config.train
    assert c.vocab_size is not None
    parameters, tokens = count_parameters(model), train.micro_batch * config.data.seq_len
    trained = _trained(model)
    narrow = _compute_bytes(launch)
    blocks = [block_activation_bytes(model, config, launch, i) for i in range(c.n_layers)]
    passes = _kept_passes(model)
    if train.gradient_checkpointing:
        slots = sum(passes[j] * model.plan.owned(j).read_elements(c.resolved_head_dim) for j in model.plan.shared)
        slots += sum(passes[j] * c.d_model for j in model.plan.inputs)
        per_token = sum(passes) * c.d_model * (4 if train.fp32_residual else narrow) + slots * narrow + max(blocks)
    else:
        per_token = sum(map(operator.mul, passes, blocks))
    head_grad = c.vocab_size * c.d_model * (4 + narrow) if model.head.weight.requires_grad else 0
    loss = 3 * tokens * c.d_model * narrow + head_grad + 2**29
    autocast = narrow == 2 and launch.zero_stage is None
    copies = 2 * parameters if autocast and not train.gradient_checkpointing else 0
    parts = state_bytes(launch, model, offload_optimizer=train.offload_optimizer)
    after = 0.0 if train.offload_optimizer else _after_backward(launch, trained, parts["gradients"])
    parts["activations"] = max(tokens * per_token + loss + copies, after)
    if teacher:
        parts["teacher"] = narrow * teacher
    return {name: size / GIB for name, size in (parts | {"total": sum(parts.values())}).items()}


def _after_backward(launch: Launch, trained: int, kept: float) -> float:
    """Bytes on top of `kept` ones of gradients when the backward has ended and no activation is left.

    Without accumulation all gradients exist now. ZeRO-1 and 2 copy a device's part into one flat tensor, and, if it is
    bf16, without accumulation, cast it to fp32. ZeRO-1 with accumulation sums it in a flat tensor.
    """
    stage, devices = launch.zero_stage, launch.processes
    if stage is None:
        return 0.0 if kept else 4.0 * trained
    if stage == 3:
        return 0.0
    if launch.accumulate > 1:
        return 4.0 * trained / devices if stage == 2 else 0.0
    return max(8.0 * trained / devices - kept, 0.0)


def state_bytes(launch: Launch, model: Decoder, *, offload_optimizer: bool) -> dict[str, float]:
    """Bytes on each device that outlive a micro-batch: `weights`, `optimizer`, `gradients`, ZeRO's `buffers`.

    DDP's buckets are its gradients. For ZeRO, docs/distributed.md lists the bytes per parameter.
    """
    stage, devices, accumulates = launch.zero_stage, launch.processes, launch.accumulate > 1
    parameters, trained = count_parameters(model), _trained(model)
    states = launch.optimizer.total_state_bytes(model)
    if stage is None:
        kept = accumulates or launch.strategy == "ddp"
        return {"weights": 4 * parameters, "optimizer": states, "gradients": 4 * trained if kept else 0}
    narrow = {1: 2 + 4 * accumulates, 2: (4 if accumulates else 2) / devices}
    buckets = (2 if devices > 1 else 1) * min(REDUCE_BUCKET, parameters)
    live = min(ZERO3_LIVE, parameters) if stage == 3 else 0
    return {
        "weights": 2 * parameters / (devices if stage == 3 else 1),
        "optimizer": 0 if offload_optimizer else (4 * trained + states) / devices,
        "gradients": narrow[min(stage, 2)] * trained,
        "buffers": 2 * (buckets + live),
    }


def _kept_passes(model: Decoder) -> list[int]:
    """How often each layer's activations are kept for the backward: once, or in a cycle once a pass with gradients."""
    times, iterations = [1] * len(model.plan), model.plan.iterations
    for first, last in model.plan.cyclic_spans():
        assert iterations is not None
        times[first : last + 1] = [iterations.backward] * (last + 1 - first)
    return times


def _trained(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _head_sizes(model: Decoder) -> str:
    """The channels of a head; if layers differ, each size with its layers, as `64 (0-4), 128 (5)`."""
    plan, layers = model.plan, dict[int, list[int]]()
    for i in range(len(plan)):
        layers.setdefault(plan.source(i).head_size(model.config.resolved_head_dim), []).append(i)
    if len(layers) == 1:
        return str(*layers)
    return ", ".join(f"{size} (layers {ranges(found)})" for size, found in layers.items())


def _size(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def dry_run(config: Config, *, tokens_per_second: float | None = None, price: float | None = None) -> str:
    """The report of `train.py --dry-run`. `config.model.vocab_size` must be set.

    It has the hours of the run at `tokens_per_second`, training tokens on all devices together (None: the speed of an
    earlier run like it, if there is one), and the cost at `price` for a device and hour.

    Raises `UserError` for a warm-up longer than the run, an unknown optimizer, data that a run could not read, and a
    price without a speed.
    """
    check_warmup(config)
    launch = Launch.planned(config)
    budget = budget_lines(config, tokens_per_second, price)
    model = meta_decoder(config.model)
    c = config.model
    total, inner = count_parameters(model), count_parameters(model, embeddings=False)
    context, seq_len = c.max_seq_len, config.data.seq_len
    forward, training = forward_flops_per_token(model, seq_len), training_flops_per_token(model, seq_len)
    student = planned_student(config)
    teacher = student.teacher_parameters
    memory = memory_estimate(student.decoder, config, launch, teacher=teacher)
    devices = launch.processes
    where = "one GPU" if devices == 1 else f"each of {devices} GPUs"
    where += f" under {config.train.strategy}" if config.train.strategy not in ("auto", "single") else ""
    uptraining = [f"trained      {_trained(student.decoder):,} (uptrain.trainable {config.uptrain.trainable})"]
    uptraining += [f"teacher      {teacher:,} parameters, a forward pass in every step"] * (teacher > 0)
    tokens = run_tokens(config)
    d_ff = model_d_ff(c)
    matched = f" ({c.resolved_d_ff} before match_params)" if d_ff != c.resolved_d_ff else ""
    lines = [
        plan_table(model.plan),
        "",
        plan_drawing(model.plan),
        "",
        f"model        {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads of {_head_sizes(model)}, "
        f"d_ff {d_ff}{matched}, vocabulary {c.vocab_size:,}",
        f"parameters   {total:,} ({inner:,} without embeddings)",
        *(uptraining if config.init.path else ()),
        *describe_bytes(c),
        f"a sequence   of {context:,} tokens leaves {cache_bytes(c, context=context):,} bytes in the cache "
        f"({_size(cache_bytes(c, context=context))})",
        f"FLOPs        {forward:.4g} a token forward, {training:.4g} training (sequences of {seq_len:,})",
        f"run          {config.train.steps:,} steps of {config.train.global_batch * seq_len:,} tokens = {tokens:,} "
        f"tokens, {training * tokens:.3g} FLOPs",
        *budget,
        "memory       "
        + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
        + f" GiB at the peak on {where} (estimate, micro-batch {config.train.micro_batch})",
        *(f"unused       {line}" for line in unused_settings(config, fusion_weights=has_fusion_weights(model))),
    ]
    return "\n".join(lines)
