"""ShadowKV's values in pinned host memory: a step reads the numbers of values on the device, to the bit."""

from __future__ import annotations

import gc

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, Rope
from cllm.kernels import triton_decode
from cllm.kernels.decode import Visible
from cllm.kernels.lowrank_decode import lowrank_decode, lowrank_decode_reference
from cllm.kernels.selection import Factored
from cllm.model.decoder import Decoder
from cllm.model.graph import StepGraph
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.landmarks import make_landmarks
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import consecutive_table

SPEC = "shadowkv:rank=64,select=64,outliers=2"
HOST = SPEC + ",values=host"
PROMPT, LENGTH, SINKS = 500, 512, 4


def pinned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


@pytest.mark.skipif(triton_decode.MISSING is not None, reason=f"no triton: {triton_decode.MISSING}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("first", [None, (0, 5000)])
def test_a_step_of_an_8b_model(gpu, dtype, first):
    """2,048 chosen tokens of 8,189, with padding, as launches and as a CUDA graph."""
    tokens, tail, groups, heads, dim, rank = 8189, 64, 8, 32, 128, 160
    generator = torch.Generator(gpu).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=gpu, generator=generator).to(dtype)

    keys = Factored(randn(2, tokens, rank), randn(2, groups * dim, rank) / rank**0.5, randn(2, tail, groups, dim))
    values = Factored(randn(2, tokens, groups * dim), None, randn(2, tail, groups, dim))
    starts = None if first is None else torch.tensor(first, device=gpu)
    is_text = None if starts is None else torch.arange(tokens, device=gpu) >= starts[:, None]
    selection = make_landmarks(randn(2, tokens, groups, dim), is_text, chunk=8, budget=2048, outliers=48)
    visible = Visible(torch.tensor([tokens + 50], device=gpu), starts, None, False)
    table = consecutive_table(Rope(theta=500_000), dim, torch.arange(tokens, device=gpu))
    query, host = randn(2, heads, dim), Factored(pinned(values.a), None, values.tail)

    def read(part: Factored, **options) -> torch.Tensor:
        return lowrank_decode([query], [keys], [part], table, visible, scale=0.09, selection=selection, **options)[0]

    wanted = read(values, kernel="triton")
    assert host.a.is_pinned()
    assert torch.equal(read(host, kernel="triton"), wanted)
    (exact,) = lowrank_decode_reference([query], [keys], [values], table, visible, scale=0.09, selection=selection)
    assert (wanted.float() - exact.float()).norm() < (3e-5 if dtype == torch.float32 else 3e-2) * exact.float().norm()
    assert torch.equal(read(host, kernel="reference"), exact)
    unpinned = Factored(values.a.cpu(), None, values.tail)
    assert torch.equal(read(unpinned, kernel="triton"), wanted), "the index is copied to the host"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = read(host, kernel="triton")
    query.copy_(query.flip(0))
    host.a.copy_(host.a.flip(0))
    values.a.copy_(values.a.flip(0))
    graph.replay()
    assert torch.equal(out, read(values, kernel="triton"))
    assert not torch.equal(out, wanted)


@pytest.fixture
def model(gpu) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 512, "n_layers": 4, "n_heads": 8, "d_ff": 512, "max_seq_len": LENGTH}
    made = build_decoder(ModelConfig(**sizes, kv={"preset": "gqa", "n_kv_heads": 2}))
    made.init_weights()
    return made.to(gpu).requires_grad_(False).eval()


@pytest.fixture
def ids(gpu) -> torch.Tensor:
    return torch.randint(512, (2, LENGTH), device=gpu, generator=torch.Generator(gpu).manual_seed(1))


@pytest.fixture
def cache(model, ids, gpu) -> KVCache:
    made = KVCache(model.config)
    with torch.no_grad():
        model.prefill(ids[:, :PROMPT], made, starts=torch.tensor([0, 100], device=gpu))
    return made


def steps(model, compressed: KVCache, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(ids[:, i : i + 1], cache=compressed)[:, 0] for i in range(compressed.seen, LENGTH)], 1)


def test_steps_are_those_with_values_on_the_device(model, cache, ids):
    """Growing, as a CUDA graph, and after sequences are rearranged."""
    assert torch.equal(*(steps(model, compress_cache(cache, parse(spec)), ids) for spec in (HOST, SPEC)))
    replayed = []
    for spec in (HOST, SPEC):
        step = StepGraph(model, compress_cache(cache, parse(spec), room=LENGTH - PROMPT))
        replayed.append(torch.stack([step(ids[:, i]).clone() for i in range(PROMPT, LENGTH)], 1))
        assert step.is_valid
    assert torch.equal(*replayed)
    rearranged = []
    for spec in (HOST, SPEC):
        compressed = compress_cache(cache, parse(spec))
        model(ids[:, PROMPT : PROMPT + 1], cache=compressed)
        compressed.reorder_cache(torch.tensor([1, 0], device=ids.device))
        rearranged.append(steps(model, compressed, ids.flip(0)))
    assert torch.equal(*rearranged)


def test_the_device_has_all_but_the_values(model, cache):
    """The bytes that torch allocates differ by those of the values, and these are pinned."""

    def requested() -> int:
        gc.collect()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    def allocated(spec: str) -> int:
        compress_cache(cache, parse(spec), measure=False)  # with what libraries allocate in their first call
        before = requested()
        compressed = compress_cache(cache, parse(spec), measure=False)
        used = requested() - before
        del compressed
        return used

    values = 4 * 2 * (PROMPT - SINKS) * 2 * 64 * 4  # layers, sequences, tokens, KV heads, channels, bytes of a number
    assert allocated(SPEC) - allocated(HOST) == values
    compressed = compress_cache(cache, parse(HOST))
    assert compressed.host_nbytes() == values
    assert all(tensor.is_pinned() for tensor in compressed.host_tensors())
    compressed.batch_repeat_interleave(2)
    assert all(tensor.is_pinned() for tensor in compressed.host_tensors())
    assert compressed.host_nbytes() == 2 * values
