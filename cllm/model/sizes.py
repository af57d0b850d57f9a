"""Parameter and FLOP counts of a model, the width that matches two designs, and building a decoder.

Counts come from the modules themselves, built on the meta device without memory. Only attention, which has no weights,
is counted by an equation.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor, nn

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sources import Reader
from cllm.plan.presets import MHA


def count_parameters(model: nn.Module, *, embeddings: bool = True) -> int:
    """Number of parameters, tied ones once; without `embeddings`, the embedding and the head are not counted."""
    skipped: set[int] = set()
    if not embeddings and isinstance(model, Decoder):
        skipped = {id(model.embed.weight), id(model.head.weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


MATCH_TOLERANCE = 0.005
"""Largest difference of parameters that `match_params` accepts, relative to the mha model's."""


def _count(config: ModelConfig, d_ff: int) -> int:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return count_parameters(Decoder(config, d_ff=d_ff))


@functools.lru_cache(maxsize=64)
def _matched(config_json: str) -> int:
    config = ModelConfig.model_validate_json(config_json)
    start = config.resolved_d_ff
    target = _count(config.model_copy(update={"kv": MHA()}), start)
    have = _count(config, start)
    plan = config.plan()
    per_channel = 3 * config.d_model * len({plan.weights_of(i) for i in range(config.n_layers)})
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

    It is a multiple of the largest of 64, 32, ... 1 that comes within a quarter of a percent, because kernels are
    faster with round widths.

    Raises:
        UserError: if no width comes within `MATCH_TOLERANCE`.
    """
    return _matched(config.model_dump_json())


def model_d_ff(config: ModelConfig) -> int:
    """The d_ff of the model: `config.d_ff` or its default, or with `match_params` the matched width."""
    return matched_d_ff(config) if config.match_params else config.resolved_d_ff


def meta_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config on the meta device: parameters without memory, to be counted or loaded.

    Load weights with `load_state_dict(weights, assign=True)`. `config.vocab_size` must be set.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # torch's initialisation advances the generator
        return Decoder(config, d_ff=model_d_ff(config), backend=backend)


def build_decoder(config: ModelConfig, *, backend: str = "auto") -> Decoder:
    """The decoder of a config on the default device, with weights initialised as `config.init` says.

    Weights are drawn from torch's global generator: set `torch.manual_seed`. `config.vocab_size` must be set. torch's
    initialisation of layers is skipped: it would be overwritten, and makes this three times as slow on a CPU.

    Raises:
        UserError: for a model that is larger than this machine's memory, and if `match_params` finds no width.
        TypeError: for a module whose parameters cannot be initialised, see `Decoder.init_weights`.
    """
    model = meta_decoder(config, backend=backend)
    _check_memory(model)
    weights = {name: _uninitialised(meta) for name, meta in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.init_weights()
    return model


def _uninitialised(meta: Tensor) -> Tensor:
    """A tensor like `meta` on the default device."""
    return torch.empty(meta.shape, dtype=meta.dtype)


def _check_memory(model: Decoder) -> None:
    """Raise `UserError` for a model larger than the memory, before the operating system kills the process."""
    if torch.get_default_device().type != "cpu" or not hasattr(os, "sysconf"):  # no sysconf on Windows
        return
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"model has {count_parameters(model):,} parameters, {needed / 2**30:,.1f} GiB of weights, and this machine "
            f"has {available / 2**30:,.1f} GiB of memory; lower model.d_model, model.n_layers or model.vocab_size"
        )


def _weights_of_products(block: nn.Module) -> int:
    """Numbers in the matrices of `block` that multiply every token."""
    found = 0
    for module in block.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, Reader) and module.is_projection):
            found += sum(p.numel() for name, p in module.named_parameters(recurse=False) if name == "weight")
    return found


def layer_flops_per_token(model: Decoder, seq_len: int) -> list[float]:
    """Forward FLOPs of one token in one pass through each layer, averaged over a causal sequence of `seq_len`.

    Matrix products cost 2 for each weight. Scores and weighted values cost 2 H (D + E) for each key seen: a query sees
    (seq_len + 1) / 2 keys on average, and fewer with a window. Gated retention costs 4 H D E at any length. Values that
    matrices fuse cost 2 G D D for each source.
    """
    config, plan = model.config, model.plan
    totals = []
    for i, block in enumerate(model.blocks):
        weights = _weights_of_products(block)
        mixing = 0.0
        for slots, limit in plan.attended(i):
            window = min(limit or seq_len, seq_len)
            seen = window - window * (window - 1) / (2 * seq_len)
            source = plan.owned(slots[0])
            mixing += source.attention_flops(config.n_heads, config.resolved_head_dim, seen)
        totals.append(2 * weights + mixing + plan.read_flops(i, config.resolved_head_dim))
    return totals


def forward_flops_per_token(model: Decoder, seq_len: int) -> float:
    """FLOPs of one token's forward pass. Cyclic layers count once for each pass; the embedding costs nothing."""
    iterations = model.plan.iterations
    passes = iterations.forward + iterations.backward if iterations else 1
    return _total(model, seq_len, others=1, cyclic=passes)


def training_flops_per_token(model: Decoder, seq_len: int) -> float:
    """FLOPs of one token's forward and backward: three times the forward, and once for passes without gradient."""
    iterations = model.plan.iterations
    cyclic = iterations.forward + 3 * iterations.backward if iterations else 3
    return _total(model, seq_len, others=3, cyclic=cyclic)


def _total(model: Decoder, seq_len: int, *, others: int, cyclic: int) -> float:
    repeated = {i for first, last in model.plan.cyclic_spans() for i in range(first, last + 1)}
    flops = layer_flops_per_token(model, seq_len)
    head = 2 * model.head.weight.numel()
    return others * head + sum(f * (cyclic if i in repeated else others) for i, f in enumerate(flops))
