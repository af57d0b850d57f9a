"""Measurements of one design at one point: a decoding step, the time to first token, bytes, a check of its logits.

A step is timed at the last token of its context, over a static cache with room for `context` tokens of which
`context` - 1 are stored. So the step reads, and the cache holds, the bytes that `accounting` computes for `context`
tokens. Times do not depend on the cached values, so the cache is filled with random numbers instead of a prefill. It is
rewound before every step.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decode.designs import Design, Point
from benchmarks.timing import BF16, peak_bytes, reset_peak, time_calls, wait, wall_time
from cllm.cache.accounting import cache_bytes, kv_bytes
from cllm.cache.cache import KVCache
from cllm.cache.stores import FP8, StateStore
from cllm.config import Config
from cllm.model.decoder import Decoder
from cllm.model.graph import StepGraph
from cllm.model.sizes import build_decoder
from cllm.model.sources import FusedRead

PROMPT, GREEDY = 64, 8
"""Prompt tokens and decoded tokens of the check of decoding."""
LEAST_COSINE = 0.998
"""Least cosine of logits that differ only by rounding: to bf16, and in an fp8 cache to fp8. With 24 layers and random
weights, 1 less it is 5e-4 for keys and values and 1.1e-3 for latents, whose queries are rounded once more (H200,
2026-11-28); in fp32 both are below 1e-6. A wrong decode is far below."""
LONG_PREFILL = 3.0
"""Seconds for all repetitions of a prefill. If the first, cold one takes five times as long, it is the only one."""
_PIECE = 2**28
"""Elements that are filled with random numbers at a time."""
Step = Callable[[Tensor], Tensor]
"""A decoding step, (B,) int64 tokens to logits (B, V)."""


# ---- model and cache -------------------------------------------------------------------------------------------------


def build(config: Config, device: torch.device) -> Decoder:
    """The decoder with random weights in bf16.

    Fusion weights are in fp32 and drawn from N(0, 1), so that every source of a fused read matters.
    """
    torch.manual_seed(0)
    with torch.device(device):
        decoder = build_decoder(config.model, backend=config.attention.backend)
    decoder.to(BF16).eval().requires_grad_(False)
    for module in decoder.modules():
        if isinstance(module, FusedRead):
            module.float().weight.normal_()
    return decoder


def set_length(cache: KVCache, length: int) -> None:
    """Set the number of cached tokens to `length` without changing what is stored."""
    assert cache.column is not None
    cache.seen = length
    cache.column.fill_(length)


@torch.inference_mode()
def fill(decoder: Decoder, cache: KVCache, batch: int) -> None:
    """Fill `cache` with random numbers and set its length to one token less than it has room for.

    Numbers are from N(0, 1). In fp8 they are any finite numbers, with scales that bring them near 1. Rings are full.
    """
    assert cache.max_len is not None
    if cache.batch is None:
        ids = torch.zeros(batch, 1, dtype=torch.long, device=decoder.embed.weight.device)
        cache.begin(decoder.plan, ids, None, BF16)
    for store in cache.stores.values():
        for name, tensor in store.tensors().items():
            for piece in tensor.view(-1).split(_PIECE):
                if piece.dtype == FP8:
                    bits = piece.view(torch.uint8)
                    bits.random_(0, 127)  # 127 is NaN
                    bits.bitwise_or_(torch.empty_like(bits).random_(0, 2).mul_(128))
                elif name.endswith("_scale"):
                    piece.uniform_(0.005, 0.015)
                else:
                    piece.normal_()
    set_length(cache, cache.max_len - 1)


def make_step(decoder: Decoder, cache: KVCache) -> Step:
    """A step of one token; on a GPU it is recorded as a CUDA graph."""
    assert cache.column is not None
    return StepGraph(decoder, cache) if cache.column.is_cuda else eager_step(decoder, cache)


def eager_step(decoder: Decoder, cache: KVCache) -> Step:
    """A step of one token, without a CUDA graph."""
    return lambda tokens: decoder(tokens[:, None], cache=cache)[:, 0]


# ---- measurements ----------------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; tied ones count only one time."""
    return sum(p.nbytes for p in model.parameters())


def bytes_read(model: nn.Module, embedding: nn.Embedding, head: nn.Linear, kv_read: float, point: Point) -> int:
    """Bytes that a step must read: all weights, except unused rows of the embedding, and the cache.

    Args:
        model: the model whose weights are read.
        embedding: its embedding. A sequence reads one row of it; with tied weights the head reads all of them.
        head: the output head.
        kv_read: bytes read from the cache per token of context of one sequence.
        point: context and batch.
    """
    table = embedding.weight
    unread = 0 if head.weight is table else table.nbytes - point.batch * table[0].nbytes
    return weight_bytes(model) - unread + round(kv_read * point.context) * point.batch


def bytes_of(design: Design, point: Point) -> dict[str, Any]:
    """Bytes of the cache at `point`, and bytes per token of context: resident, written, read."""
    per_token = kv_bytes(design.model, context=point.context, storage=design.storage)
    return {
        "cache_bytes": cache_bytes(design.model, context=point.context, batch=point.batch, storage=design.storage),
        "kv_resident_per_token": per_token.resident,
        "kv_written_per_token": per_token.written,
        "kv_read_per_token": per_token.read,
    }


@torch.inference_mode()
def check_decoding(decoder: Decoder, cache: KVCache, batch: int) -> dict[str, Any]:
    """Decode greedily after a random prompt and compare the logits with those of one forward over all tokens.

    Returns:
        `check`: the least cosine over sequences and steps, and the share of steps with the same most likely token. The
        forward of a cyclic plan is not exact, so `check` then has only the reason for skipping it. `first_step_s`:
        seconds of the first step, which compiles.

    Raises:
        RuntimeError: if the logits differ by more than rounding explains.
    """
    assert cache.max_len is not None
    config, device = decoder.config, decoder.embed.weight.device
    assert config.vocab_size is not None
    greedy = min(GREEDY, cache.max_len // 2)
    prompt = torch.randint(config.vocab_size, (batch, min(PROMPT, cache.max_len - greedy)), device=device)
    logits = [decoder.head(decoder.prefill(prompt, cache))[:, 0]]
    tokens = [prompt]
    wait(device)
    begin = time.perf_counter()
    step = make_step(decoder, cache)
    for _ in range(greedy):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        logits.append(step(tokens[-1][:, 0]).clone())
        wait(device)
        if len(logits) == 2:
            first = time.perf_counter() - begin
    if decoder.plan.iterations is not None:
        return {"first_step_s": first, "check": {"skipped": "a forward of a cyclic plan is not exact"}}
    expected = decoder(torch.cat(tokens, dim=1))[:, prompt.shape[1] - 1 :]
    decoded = torch.stack(logits, dim=1)
    cosine = float(F.cosine_similarity(decoded.float(), expected.float(), dim=-1).min())
    same = float((decoded.argmax(-1) == expected.argmax(-1)).float().mean())
    if not cosine >= LEAST_COSINE:  # also true for NaN
        raise RuntimeError(
            f"decoding is not right: logits have a cosine of {cosine:.5f} with those of a full forward; "
            f"expected: {LEAST_COSINE} or more"
        )
    return {"first_step_s": first, "check": {"cosine": cosine, "same_argmax": same, "steps": greedy}}


@torch.inference_mode()
def measure_step(decoder: Decoder, cache: KVCache, repeat: int, *, eager: bool = False) -> dict[str, Any]:
    """ms of a step at the last token of a full cache, and peak memory.

    The step is built two times, so that memory for compiling and tuning is not part of the peak.

    Raises:
        RuntimeError: for logits that are not finite, and for a cache whose size differs from `accounting`.
    """
    assert cache.max_len is not None
    assert cache.batch is not None
    config, device, last = decoder.config, decoder.embed.weight.device, cache.max_len - 1
    expected = cache_bytes(config, context=cache.max_len, batch=cache.batch, storage=cache.storage)
    if cache.nbytes() != expected:
        raise RuntimeError(f"the cache has {cache.nbytes()} bytes, and accounting.cache_bytes says {expected}")
    assert config.vocab_size is not None
    tokens = torch.randint(config.vocab_size, (cache.batch,), device=device)
    make = eager_step if eager else make_step
    step: Step | None = None
    for _ in range(2):
        step = None  # frees the memory of its graph
        reset_peak(device)
        set_length(cache, last)
        step = make(decoder, cache)
        for _ in range(3):
            set_length(cache, last)
            logits = step(tokens)
        wait(device)
        peak = peak_bytes(device)
        finite = bool(logits.isfinite().all())
        del logits
    assert step is not None
    run = functools.partial(step, tokens)
    if not finite:
        raise RuntimeError("logits of a step are not finite")
    times = time_calls(run, repeat, device, before=lambda: set_length(cache, last))
    return step_row(times, cache.batch, peak)


def step_row(times: list[float], batch: int, peak: int | None) -> dict[str, Any]:
    """The columns of a step: median, range, tokens/s, peak memory. `times` are in ms."""
    ms = statistics.median(times)
    return {
        "step_ms": ms,
        "step_ms_range": [min(times), max(times)],
        "tokens_per_s": batch / ms * 1000,
        "peak_bytes": peak,
    }


def measure_point(decoder: Decoder, design: Design, point: Point, repeat: int) -> dict[str, Any]:
    """Check the decoding of `design` at `point`, then time a step."""
    cache = KVCache(design.model, max_len=point.context, storage=design.storage)
    checked = check_decoding(decoder, cache, point.batch)
    fill(decoder, cache, point.batch)
    return checked | {"weight_bytes": weight_bytes(decoder)} | measure_step(decoder, cache, repeat)


@torch.inference_mode()
def measure_first_token(
    decoder: Decoder, design: Design, point: Point, chunk: int, limit: float = LONG_PREFILL
) -> dict[str, Any]:
    """ms from a random prompt of `context` tokens to the logits after it, with early exit and without.

    Prompts are prefilled in chunks of `chunk` tokens, those of all sequences counted. The result is the median of up to
    five prefills after a warm-up. A prefill longer than five times `limit` seconds is timed only one time, cold. Times
    are by the host's clock, so launches count. If memory suffices only with early exit, `ttft_without_exit_error` has
    the error.

    Raises:
        RuntimeError: if early exit changes the logits by more than rounding explains.
    """
    config, device = decoder.config, decoder.embed.weight.device
    cache = KVCache(config, max_len=point.context, storage=design.storage)
    assert config.vocab_size is not None
    ids = torch.randint(config.vocab_size, (point.batch, point.context), device=device)
    size = max(1, chunk // point.batch)

    def early_exit() -> Tensor:
        return decoder.head(decoder.prefill(ids, cache, chunk=size))[:, 0]

    def all_layers() -> Tensor:
        last = ids.new_empty(0)
        for part in ids.split(size, dim=1):
            last = decoder.hidden(part, cache=cache)[:, -1:]
        return decoder.head(last)[:, 0]

    row: dict[str, Any] = {"chunk": size}
    logits: list[Tensor] = []
    for name, run in (("ttft", early_exit), ("ttft_without_exit", all_layers)):
        reset_peak(device)
        try:
            times, out = _time_prefill(run, cache, limit, device)
        except torch.OutOfMemoryError as error:
            if run is early_exit:
                raise
            return row | {"ttft_without_exit_error": " ".join(str(error).split())}
        logits.append(out.float())
        warm = times[1:] or times
        row |= {f"{name}_ms": statistics.median(warm), f"{name}_cold": len(times) == 1}
        row |= {f"{name}_ms_range": [min(warm), max(warm)], f"{name}_peak_bytes": peak_bytes(device)}
    cosine = float(F.cosine_similarity(logits[0], logits[1], dim=-1).min())
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"early exit is not exact: logits have a cosine of {cosine:.5f} with those without it")
    return row | {"early_exit_cosine": cosine}


def _time_prefill(
    run: Callable[[], Tensor], cache: KVCache, limit: float, device: torch.device
) -> tuple[list[float], Tensor]:
    """ms of each run, the first one cold, and the logits of the last run."""
    times: list[float] = []
    while True:
        _empty(cache)
        out, ms = wall_time(run, device)
        times.append(ms)
        warm = times[1:]  # the first run also compiles kernels
        if len(warm) == 5 or sum(warm) > 1000 * limit or times[0] > 1000 * 5 * limit:
            return times, out


def _empty(cache: KVCache) -> None:
    """Set the cache's length to 0 without allocating memory. Slots are overwritten later; states are set to zero."""
    if cache.batch is None:
        return
    set_length(cache, 0)
    for store in cache.stores.values():
        if isinstance(store, StateStore):
            store.state.zero_()
