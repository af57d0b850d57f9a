"""What is measured of one design at one point: a decoding step, the time to first token, bytes, and that it is right.

A step is timed at the last token of a context that fills its cache: a static cache of `context` places that holds
`context` - 1 tokens, so that the step reads and the cache holds what `accounting` says of `context` tokens. What is in
the cache does not matter to a clock, so it is drawn and not prefilled, and the cache is rewound before every step.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.cache.accounting import cache_bytes, kv_bytes
from cllm.cache.cache import KVCache
from cllm.cache.stores import FP8, StateStore
from cllm.config import Config
from cllm.model.decoder import Decoder
from cllm.model.graph import StepGraph
from cllm.model.sizes import build_decoder
from cllm.model.sources import FusedRead
from decode_bench.designs import Design, Point

BF16 = torch.bfloat16
PROMPT, GREEDY = 64, 8
"""Tokens of the prompt, and of what is decoded after it, on which decoding is checked."""
LEAST_COSINE = 0.999
"""Between logits that should be equal but for rounding to bf16 and, in the cache, to fp8."""
LONG_PREFILL = 3.0
"""Seconds of all repetitions of a prefill; one that takes five times as long cold is timed once and cold."""
_PIECE = 2**28
Step = Callable[[Tensor], Tensor]


# ---- the device ------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what no longer has a name, compiled code included, which holds on to what it was compiled for."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start a new maximum of memory, from what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that torch had allocated on a GPU since `reset_peak`; None for a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def time_calls(run: Callable[[], Any], before: Callable[[], None], repeat: int, device: torch.device) -> list[float]:
    """ms of each of `repeat` calls of `run`, by device events on a GPU; `before` is called before each, untimed."""
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            before()
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
        return times
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeat)]
    for a, b in marks:  # without waiting: the host runs ahead, and a graph's launch is no part of its time
        before()
        a.record()
        run()
        b.record()
    wait(device)
    return [a.elapsed_time(b) for a, b in marks]


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy of `nbytes` inside the device, reads and writes counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = time_calls(lambda: target.copy_(source), lambda: None, 8, device)[3:]
    return 2 * nbytes / statistics.median(times) * 1000


# ---- model and cache -------------------------------------------------------------------------------------------------


def build(config: Config, device: torch.device) -> Decoder:
    """The decoder with drawn weights in bf16, fusion weights in fp32 and drawn from N(0, 1) so that every source of a
    fused read matters."""
    torch.manual_seed(0)
    with torch.device(device):
        decoder = build_decoder(config.model, backend=config.attention.backend)
    decoder.to(BF16).eval().requires_grad_(False)
    for module in decoder.modules():
        if isinstance(module, FusedRead):
            module.float().weight.normal_()
    return decoder


def set_length(cache: KVCache, length: int) -> None:
    """Make the first `length` tokens the ones that count, whatever the places hold."""
    assert cache.column is not None
    cache.seen = length
    cache.column.fill_(length)


@torch.inference_mode()
def fill(decoder: Decoder, cache: KVCache, batch: int) -> None:
    """Draw everything that `cache` holds, and count all of its places but one as stored.

    Numbers are N(0, 1), in fp8 any finite number, with factors that bring it near 1. Rings are full.
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
    """A step of one token, (B,) int64 to logits (B, V): recorded as a CUDA graph on a GPU."""
    assert cache.column is not None
    return StepGraph(decoder, cache) if cache.column.is_cuda else eager_step(decoder, cache)


def eager_step(decoder: Decoder, cache: KVCache) -> Step:
    """A step of one token, launched kernel by kernel."""
    return lambda tokens: decoder(tokens[:, None], cache=cache)[:, 0]


# ---- measurements ----------------------------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.nbytes for p in model.parameters())


def bytes_read(model: nn.Module, embedding: nn.Embedding, head: nn.Linear, kv_read: float, point: Point) -> int:
    """What a step must read: every weight but the rows of the embedding that nobody looks up, and the caches.

    Args:
        model: whose weights are read.
        embedding: its table, of which a sequence reads one row, and all if it is the head's too.
        head: the output head.
        kv_read: bytes read for each token of the context of one sequence.
        point: how many tokens and sequences.
    """
    table = embedding.weight
    unread = 0 if head.weight is table else table.nbytes - point.batch * table[0].nbytes
    return weight_bytes(model) - unread + round(kv_read * point.context) * point.batch


def bytes_of(design: Design, point: Point) -> dict[str, Any]:
    """Bytes of the cache at `point`, and those a token of the context: resident, written, read."""
    found = kv_bytes(design.model, context=point.context, storage=design.storage)
    held = cache_bytes(design.model, context=point.context, batch=point.batch, storage=design.storage)
    return {
        "cache_bytes": held,
        "kv_resident_per_token": found.resident,
        "kv_written_per_token": found.written,
        "kv_read_per_token": found.read,
    }


@torch.inference_mode()
def check_decoding(decoder: Decoder, cache: KVCache, batch: int) -> dict[str, Any]:
    """Decode greedily after a drawn prompt and compare the logits with those of one forward over all tokens.

    Returns:
        The least cosine over sequences and steps, and the share of steps with the same most likely token; for a cyclic
        plan, whose forward is not exact, the reason why there are none. Seconds of the first step, which compiles.

    Raises:
        RuntimeError: where the logits differ by more than rounding explains.
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
    whole = decoder(torch.cat(tokens, dim=1))[:, prompt.shape[1] - 1 :]
    found = torch.stack(logits, dim=1)
    cosine = float(F.cosine_similarity(found.float(), whole.float(), dim=-1).min())
    same = float((found.argmax(-1) == whole.argmax(-1)).float().mean())
    if not cosine >= LEAST_COSINE:  # also where it is NaN
        raise RuntimeError(
            f"decoding is not right: logits have a cosine of {cosine:.5f} with those of a full forward; "
            f"expected: {LEAST_COSINE} or more"
        )
    return {"first_step_s": first, "check": {"cosine": cosine, "same_argmax": same, "steps": greedy}}


@torch.inference_mode()
def measure_step(decoder: Decoder, cache: KVCache, repeat: int, *, eager: bool = False) -> dict[str, Any]:
    """ms of a step at the last place of a filled cache, and the peak of memory around it.

    The step is made twice: what compiling and tuning allocate is no part of what a step needs.

    Raises:
        RuntimeError: for logits that are not finite, and a cache of another size than `accounting` says.
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
        step = None  # with it goes the memory of its graph
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
    return step_row(time_calls(run, lambda: set_length(cache, last), repeat, device), cache.batch, peak)


def step_row(times: list[float], batch: int, peak: int | None) -> dict[str, Any]:
    """The figures of a step from its `times` in ms."""
    ms = statistics.median(times)
    return {
        "step_ms": ms,
        "step_ms_range": [min(times), max(times)],
        "tokens_per_s": batch / ms * 1000,
        "peak_bytes": peak,
    }


def measure_point(decoder: Decoder, design: Design, point: Point, repeat: int) -> dict[str, Any]:
    """A step of `design` at `point`, after a check that its decoding is right."""
    cache = KVCache(design.model, max_len=point.context, storage=design.storage)
    checked = check_decoding(decoder, cache, point.batch)
    fill(decoder, cache, point.batch)
    return checked | {"weight_bytes": weight_bytes(decoder)} | measure_step(decoder, cache, repeat)


@torch.inference_mode()
def measure_first_token(
    decoder: Decoder, design: Design, point: Point, chunk: int, limit: float = LONG_PREFILL
) -> dict[str, Any]:
    """ms from a drawn prompt of `context` tokens to the logits after it, with early exit and without.

    Prompts go through in chunks of `chunk` tokens of all sequences. The median of up to five, after one that warms up;
    a prefill longer than five times `limit` seconds is timed once and cold. By the clock on the wall: launches count.
    Where memory is enough with early exit only, `ttft_without_exit_error` says so.

    Raises:
        RuntimeError: where early exit changes the logits by more than rounding explains.
    """
    config, device = decoder.config, decoder.embed.weight.device
    cache = KVCache(config, max_len=point.context, storage=design.storage)
    assert config.vocab_size is not None
    ids = torch.randint(config.vocab_size, (point.batch, point.context), device=device)
    size = max(1, chunk // point.batch)

    def early() -> Tensor:
        return decoder.head(decoder.prefill(ids, cache, chunk=size))[:, 0]

    def whole() -> Tensor:
        last = ids.new_empty(0)
        for part in ids.split(size, dim=1):
            last = decoder.hidden(part, cache=cache)[:, -1:]
        return decoder.head(last)[:, 0]

    found: dict[str, Any] = {"chunk": size}
    logits: list[Tensor] = []
    for name, run in (("ttft", early), ("ttft_without_exit", whole)):
        reset_peak(device)
        try:
            times, out = _time_prefill(run, cache, limit, device)
        except torch.OutOfMemoryError as error:
            if run is early:
                raise
            return found | {"ttft_without_exit_error": " ".join(str(error).split())}
        logits.append(out.float())
        warm = times[1:] or times
        found |= {f"{name}_ms": statistics.median(warm), f"{name}_cold": len(times) == 1}
        found |= {f"{name}_ms_range": [min(warm), max(warm)], f"{name}_peak_bytes": peak_bytes(device)}
    cosine = float(F.cosine_similarity(logits[0], logits[1], dim=-1).min())
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"early exit is not exact: logits have a cosine of {cosine:.5f} with those without it")
    return found | {"early_exit_cosine": cosine}


def _time_prefill(
    run: Callable[[], Tensor], cache: KVCache, limit: float, device: torch.device
) -> tuple[list[float], Tensor]:
    """ms of each run, the first of them cold, and the last one's logits."""
    times: list[float] = []
    while True:
        _empty(cache)
        wait(device)
        begin = time.perf_counter()
        out = run()
        wait(device)
        times.append(1000 * (time.perf_counter() - begin))
        warm = times[1:]  # the first run also compiles kernels, which says nothing of how long the next takes
        if len(warm) == 5 or sum(warm) > 1000 * limit or times[0] > 1000 * 5 * limit:
            return times, out


def _empty(cache: KVCache) -> None:
    """Forget all tokens without touching slots, which are overwritten, so that no memory is needed for it."""
    if cache.batch is None:
        return
    set_length(cache, 0)
    for store in cache.stores.values():
        if isinstance(store, StateStore):
            store.state.zero_()
