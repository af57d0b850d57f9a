"""Hugging Face's Llama of the same shape, decoding over a cache of the same length.

StaticCache comes with the forward compiled in mode `reduce-overhead`, which replays CUDA graphs. DynamicCache comes
with the eager forward and copies the cache at every token. Both caches hold `context` - 1 tokens of random numbers and
are rewound before every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn

from benchmarks.decode.designs import Design, Point
from benchmarks.decode.measure import bytes_read, step_row, weight_bytes
from benchmarks.timing import BF16, peak_bytes, reset_peak, time_calls, wait
from cllm.config import ModelConfig
from cllm.model.sizes import model_d_ff
from cllm.plan.plan import KVPlan, LayerPlan

KINDS = ("static", "dynamic")
"""Kinds of cache; with `static` the forward is compiled."""
WARM_UP = 5
"""Calls that compile, record the graph and replay it for the first time."""


def llama_heads(config: ModelConfig) -> int | None:
    """KV heads, if `config` is a Llama: every layer reads its own keys and values with full attention. Else None."""
    own = config.plan().layers[0].own
    if own is None or not own.is_ordinary or KVPlan.of([LayerPlan(own=own)] * config.n_layers) != config.plan():
        return None
    other = own.normalises or config.qk_norm or config.q_bias or config.kv_bias or config.rope.scaling is not None
    return None if other or config.beyond_llama else own.kv_heads


def has_llama(design: Design) -> bool:
    """Whether the design is a Llama with a cache in bf16, so that Hugging Face's can be compared with it."""
    return llama_heads(design.model) is not None and design.storage == "model"


def llama(design: Design, point: Point, device: torch.device) -> nn.Module:
    """Hugging Face's Llama of the shape of `design`, for contexts up to that of `point`."""
    heads = llama_heads(design.model)
    assert heads is not None
    return build_llama(design.model, heads, point.context, device)


def build_llama(config: ModelConfig, n_kv_heads: int, context: int, device: torch.device) -> nn.Module:
    """LlamaForCausalLM of the shape of `config` in bf16, with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    assert config.vocab_size is not None
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=model_d_ff(config),
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=config.resolved_head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=max(context, config.max_seq_len),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=BF16, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def _static(model: Any, point: Point, device: torch.device) -> tuple[Any, Callable[[], None]]:
    """A StaticCache for `context` tokens, and a function that rewinds it to one token less."""
    from transformers import StaticCache

    shape = model.config
    cache: Any = StaticCache(config=shape, max_cache_len=point.context)
    cache.early_initialization(point.batch, shape.num_key_value_heads, shape.head_dim, BF16, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(point.context - 1)

    return cache, rewind


def _dynamic(model: Any, point: Point, device: torch.device) -> tuple[Any, Callable[[], None]]:
    """A DynamicCache, and a function that rewinds it to `context` - 1 tokens."""
    from transformers import DynamicCache

    shape = model.config
    cache: Any = DynamicCache(config=shape)
    size = (point.batch, shape.num_key_value_heads, point.context - 1, shape.head_dim)
    for i in range(shape.num_hidden_layers):
        cache.update(*(torch.randn(size, dtype=BF16, device=device) for _ in range(2)), i)

    def rewind() -> None:
        for layer in cache.layers:
            layer.keys, layer.values = (t[:, :, : point.context - 1] for t in (layer.keys, layer.values))

    return cache, rewind


@torch.no_grad()
def measure_peer(
    design: Design, point: Point, kind: str, repeat: int, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    """A decoding step of Hugging Face's Llama, timed like those of this project; `kind` is one of `KINDS`.

    Raises:
        RuntimeError: if the cache does not have `context` tokens after a step.
    """
    model: Any = llama(design, point, device)
    cache, rewind = (_static if kind == "static" else _dynamic)(model, point, device)
    forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if compiled else model.forward
    ids = torch.randint(model.config.vocab_size, (point.batch, 1), device=device)

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for _ in range(WARM_UP):
        rewind()
        step()
    if (length := int(cache.get_seq_length())) != point.context:
        raise RuntimeError(f"after a step the cache holds {length} tokens, and not {point.context}")
    wait(device)
    reset_peak(device)
    times = time_calls(step, repeat, device, before=rewind)
    row = step_row(times, point.batch, peak_bytes(device))
    kv_read = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    read = bytes_read(model, model.get_input_embeddings(), model.get_output_embeddings(), kv_read, point)
    cached = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    row |= {"weight_bytes": weight_bytes(model), "cache_bytes": cached, "bytes_read": read, "compiled": compiled}
    if compiled:
        row["cudagraph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] - skips
    return row
