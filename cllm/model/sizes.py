"""How large a model is: parameters, floating-point operations, and the width that matches two designs.

All counts come from the modules that would be built (on the meta device, without memory), never from a formula that
could drift from them; only attention, which has no weights, is counted by its equation.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from cllm.config import ModelConfig
from cllm.kv.plan import Latent, Own
from cllm.kv.presets import MHA
from cllm.model.decoder import Decoder


def count_parameters(model: nn.Module, *, embeddings: bool = True) -> int:
    """Parameters, tied ones once; without `embeddings`, the embedding and the head are left out."""
    skipped: set[int] = set()
    if not embeddings and isinstance(model, Decoder):
        skipped = {id(model.embed.weight), id(model.head.weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


def _meta(config: ModelConfig, d_ff: int | None = None) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, d_ff=d_ff)


@functools.lru_cache(maxsize=64)
def _matched(config_json: str) -> int:
    config = ModelConfig.model_validate_json(config_json)
    start = config.resolved_d_ff
    target = count_parameters(_meta(config.model_copy(update={"kv": MHA()})))
    have = count_parameters(_meta(config))
    per_channel = 3 * config.d_model * config.n_layers
    exact = start + (target - have) / per_channel
    for multiple in (64, 32, 16, 8, 4, 2):
        d_ff = round(exact / multiple) * multiple
        if abs(d_ff - exact) * per_channel <= 0.0025 * target:
            return max(d_ff, multiple)
    return max(round(exact), 1)


def matched_d_ff(config: ModelConfig) -> int:
    """The d_ff at which `config` has as many parameters as the same model with the mha plan.

    The coarsest multiple (64, 32, ... 1) that lands within a quarter of a percent is taken: kernels like round widths.
    """
    return _matched(config.model_dump_json())


def model_d_ff(config: ModelConfig) -> int:
    """The d_ff that is built: `config.d_ff` or its default, widened where `match_params` asks for it."""
    return matched_d_ff(config) if config.match_params else config.resolved_d_ff


def build_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config, its weights not yet drawn. `config.vocab_size` must be set."""
    return Decoder(config, d_ff=model_d_ff(config), backend=backend)


def drawn_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config, its weights drawn from torch's global generator, on the default device.

    Layers are not given the start of torch's own first, which would be drawn over and takes a CPU three times as long.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # torch's start draws numbers there, too
        model = build_decoder(config, backend=backend)
    weights = {name: torch.empty(bare.shape, dtype=bare.dtype) for name, bare in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.init_weights()
    return model


def layer_flops_per_token(model: Decoder, seq_len: int) -> list[float]:
    """Forward FLOPs of one token in one pass through each layer, averaged over a causal sequence of `seq_len`.

    Weight matrices cost 2 a weight. Scores and weighted values cost 2 H (D + E) for each key seen: a query sees
    (seq_len + 1) / 2 keys on average, fewer through a window. Gated retention costs 4 H D E whatever the length.
    """
    config, plan = model.config, model.plan
    totals = []
    for i, block in enumerate(model.blocks):
        weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
        source, d = plan.source(i), config.resolved_head_dim
        window = min(plan.layers[i].window or seq_len, seq_len)
        seen = window - window * (window - 1) / (2 * seq_len)
        if isinstance(source, Own):
            attention = 2 * config.n_heads * 2 * d * seen
        elif isinstance(source, Latent):
            attention = (
                2 * config.n_heads * (source.qk_nope_head_dim + source.qk_rope_head_dim + source.v_head_dim) * seen
            )
        else:
            attention = 4.0 * config.n_heads * d * d
        totals.append(2 * weights + attention)
    return totals


def forward_flops_per_token(model: Decoder, seq_len: int) -> float:
    """FLOPs of one token's forward pass; cyclic layers count once a pass, the embedding look-up nothing."""
    iterations = model.plan.iterations
    passes = iterations.forward + iterations.backward if iterations else 1
    return _total(model, seq_len, once=1, cyclic=passes)


def training_flops_per_token(model: Decoder, seq_len: int) -> float:
    """FLOPs of one token's forward and backward: three times the forward, passes without gradient once."""
    iterations = model.plan.iterations
    cyclic = iterations.forward + 3 * iterations.backward if iterations else 3
    return _total(model, seq_len, once=3, cyclic=cyclic)


def _total(model: Decoder, seq_len: int, *, once: int, cyclic: int) -> float:
    repeated = {i for first, last in model.plan.cyclic_spans() for i in range(first, last + 1)}
    flops = layer_flops_per_token(model, seq_len)
    head = 2 * model.head.weight.numel()
    return once * head + sum(f * (cyclic if i in repeated else once) for i, f in enumerate(flops))
