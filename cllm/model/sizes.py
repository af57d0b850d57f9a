"""How large a model is: parameters, floating-point operations, and the width that matches two designs.

All counts come from the modules that would be built (on the meta device, without memory), never from a formula that
could drift from them; only attention, which has no weights, is counted by its equation.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor, nn

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.plan.presets import MHA


def count_parameters(model: nn.Module, *, embeddings: bool = True) -> int:
    """Parameters, tied ones once; without `embeddings`, the embedding and the head are left out."""
    skipped: set[int] = set()
    if not embeddings and isinstance(model, Decoder):
        skipped = {id(model.embed.weight), id(model.head.weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


MATCH_TOLERANCE = 0.005
"""Largest difference of parameters that `match_params` leaves, as a share of the mha twin's."""


def _count(config: ModelConfig, d_ff: int) -> int:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return count_parameters(Decoder(config, d_ff=d_ff))


@functools.lru_cache(maxsize=64)
def _matched(config_json: str) -> int:
    config = ModelConfig.model_validate_json(config_json)
    start = config.resolved_d_ff
    target = _count(config.model_copy(update={"kv": MHA()}), start)
    have = _count(config, start)
    per_channel = 3 * config.d_model * config.n_layers
    exact = start + (target - have) / per_channel
    d_ff = max(round(exact), 1)
    for multiple in (64, 32, 16, 8, 4, 2):
        near = round(exact / multiple) * multiple
        if near >= 1 and abs(near - exact) * per_channel <= 0.0025 * target:
            d_ff = near
            break
    reached = have + (d_ff - start) * per_channel
    if abs(reached - target) > MATCH_TOLERANCE * target:
        raise UserError(
            f"model.match_params: the nearest d_ff, {d_ff}, gives the model {reached:,} parameters, and its mha twin "
            f"has {target:,}; allowed: within {MATCH_TOLERANCE:.1%}; set model.d_ff, or match_params: false"
        )
    return d_ff


def matched_d_ff(config: ModelConfig) -> int:
    """The d_ff at which `config` has as many parameters as the same model with the mha plan.

    The coarsest multiple (64, 32, ... 1) that lands within a quarter of a percent is taken: kernels like round widths.
    Raises `UserError` where no width comes within `MATCH_TOLERANCE`.
    """
    return _matched(config.model_dump_json())


def model_d_ff(config: ModelConfig) -> int:
    """The d_ff that is built: `config.d_ff` or its default, widened where `match_params` asks for it."""
    return matched_d_ff(config) if config.match_params else config.resolved_d_ff


def meta_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config on the meta device: parameters without memory, to be counted or loaded into.

    Load weights with `load_state_dict(weights, assign=True)`. `config.vocab_size` must be set.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # torch's own start draws numbers there, too
        return Decoder(config, d_ff=model_d_ff(config), backend=backend)


def build_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config on the default device, ready to use: its weights are drawn as `config.init` says.

    They come from torch's global generator, so `torch.manual_seed` decides them. `config.vocab_size` must be set.
    Layers are not given torch's own start first, which would be drawn over and takes a CPU three times as long.

    Raises:
        UserError: for a model that is larger than this machine's memory, and where `match_params` cannot be met.
        TypeError: for a module that has parameters and no way to draw them, see `Decoder.init_weights`.
    """
    model = meta_decoder(config, backend=backend)
    _check_memory(model)
    weights = {name: _memory_for(bare) for name, bare in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.init_weights()
    return model


def _memory_for(bare: Tensor) -> Tensor:
    """An uninitialised tensor like `bare`, on the default device."""
    return torch.empty(bare.shape, dtype=bare.dtype)


def _check_memory(model: Decoder) -> None:
    """Refuse a model that the machine cannot hold, before the system ends the process that tries."""
    if torch.get_default_device().type != "cpu" or not hasattr(os, "sysconf"):  # Windows has none
        return
    wanted = sum(p.numel() * p.element_size() for p in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise UserError(
            f"model has {count_parameters(model):,} parameters, {wanted / 2**30:,.1f} GiB of weights, and this machine "
            f"has {there / 2**30:,.1f} GiB of memory; lower model.d_model, model.n_layers or model.vocab_size"
        )


def layer_flops_per_token(model: Decoder, seq_len: int) -> list[float]:
    """Forward FLOPs of one token in one pass through each layer, averaged over a causal sequence of `seq_len`.

    Weight matrices cost 2 a weight. Scores and weighted values cost 2 H (D + E) for each key seen: a query sees
    (seq_len + 1) / 2 keys on average, fewer through a window. Gated retention costs 4 H D E whatever the length.
    """
    config, plan = model.config, model.plan
    totals = []
    for i, block in enumerate(model.blocks):
        weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
        window = min(plan.layers[i].window or seq_len, seq_len)
        seen = window - window * (window - 1) / (2 * seq_len)
        attention = plan.source(i).attention_flops(config.n_heads, config.resolved_head_dim, seen)
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
