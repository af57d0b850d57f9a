"""A stand-in for vLLM: the names that the plug-in imports, paged caches in shuffled blocks, and attention in torch.

It lets the normal suite run the plug-in's decoder. `Engine` is an engine and its scheduler in one: it makes the cache
of the layers that ask for it, and runs steps of several requests. Ranks of tensor parallelism are threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 4
"""Tokens of a block."""


class Rank(threading.local):
    """The rank of this thread, its layers of attention, and the step that it computes."""

    number = 0
    size = 1
    meet: threading.Barrier | None = None
    board: list[Tensor | None] = []  # noqa: RUF012
    layers: dict[str, Any] = {}  # noqa: RUF012
    context: Any = None

    def begin(self, number: int, size: int, meet: threading.Barrier | None, board: list[Tensor | None]) -> None:
        """Become a rank, in its thread."""
        self.number, self.size, self.meet, self.board, self.layers = number, size, meet, board, {}


RANK = Rank()


def all_reduce(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors."""
    if RANK.meet is None:
        return x
    RANK.board[RANK.number] = x
    RANK.meet.wait()
    total = sum(t for t in RANK.board if t is not None)
    RANK.meet.wait()
    assert isinstance(total, Tensor)
    return total


# ---- linear layers ---------------------------------------------------------------------------------------------------


class _Linear(nn.Module):
    """A projection of which each rank has a part of the rows (`dim` 0) or of the columns (1)."""

    dim = 0

    def __init__(self, n_in: int, n_out: int, bias: bool = True, return_bias: bool = True, **_: Any):
        super().__init__()
        assert not return_bias
        shape = [n_out // RANK.size, n_in] if self.dim == 0 else [n_out, n_in // RANK.size]
        self.weight = nn.Parameter(torch.zeros(shape))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor) -> None:
        size = parameter.shape[self.dim]
        parameter.data.copy_(loaded.narrow(self.dim, RANK.number * size, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(_Linear):
    dim = 1

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(super().forward(x))


class MergedColumnParallelLinear(_Linear):
    def __init__(self, n_in: int, sizes: Sequence[int], **more: Any):
        super().__init__(n_in, sum(sizes), **more)

    def load_part(self, parameter: Tensor, loaded: Tensor, part: int) -> None:
        size = loaded.shape[0] // RANK.size
        rows = loaded.narrow(0, RANK.number * size, size)
        parameter.data.narrow(0, part * size, size).copy_(rows)


class Embedding(nn.Module):
    """On each rank entire."""

    def __init__(self, rows: int, width: int, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def tie_weights(self, other: nn.Module) -> nn.Module:
        self.weight = other.weight  # type: ignore[assignment]
        return self

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()

    def forward(self, head: Embedding, x: Tensor) -> Tensor:
        return F.linear(x, head.weight)


@dataclass
class WeightsMapper:
    orig_to_new_stacked: dict[str, tuple[str, int]]


class AutoWeightsLoader:
    def __init__(self, module: nn.Module):
        self.parameters = dict(module.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], mapper: WeightsMapper) -> set[str]:
        loaded = set()
        for name, weight in weights:
            old = next((old for old in mapper.orig_to_new_stacked if old in name), None)
            if old is None:
                parameter = self.parameters[name]
                load: Callable[..., None] = getattr(parameter, "weight_loader", lambda p, w: p.data.copy_(w))
                load(parameter, weight)
            else:
                new, part = mapper.orig_to_new_stacked[old]
                name = name.replace(old, new)
                parameter = self.parameters[name]
                parameter.weight_loader.__self__.load_part(parameter, weight, part)  # type: ignore[attr-defined]
            loaded.add(name)
        return loaded


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    num_kv_heads: int
    head_size: int
    head_size_v: int


@dataclass
class Metadata:
    """The requests of a step, as one layer of attention sees them."""

    starts: list[int]
    """Of each request: its first query, and in the end the number of queries."""
    seq_lens: list[int]
    positions: Tensor
    """(T,) of the queries."""
    blocks: list[Tensor]
    """The block table of each request."""


@dataclass
class FastPrefill(Metadata):
    """Metadata of a layer that gets only some of the tokens."""

    logits_indices_padded: Tensor | None = field(default=None, kw_only=True)


class Impl:
    """Keys are stored with their channels reversed, so that no tensor of keys may be read as one of values."""

    def __init__(
        self, heads: int, size: int, scale: float, kv_heads: int, slopes: None, window: int | None, dtype: str
    ):
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = heads, size, scale, kv_heads
        self.window = window

    def _tensors(self, cache: Any) -> tuple[Tensor, Tensor]:
        blocks, heads, size, _ = cache.size()
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        assert keys.stride() == values.stride(), "the kernel has one stride for both"
        return keys, values

    def do_kv_cache_update(self, layer: Any, k: Tensor, v: Tensor, cache: Any, slots: Tensor) -> None:
        keys, values = self._tensors(cache)
        assert k.shape[1:] == v.shape[1:] == (keys.shape[1], keys.shape[3])
        keys[slots // BLOCK, :, slots % BLOCK] = k.flip(-1)
        values[slots // BLOCK, :, slots % BLOCK] = v

    def forward(
        self, layer: Any, q: Tensor, key: None, value: None, cache: Any, metadata: Metadata, *, output: Tensor
    ) -> None:
        keys, values = self._tensors(cache)
        assert q.shape[1:] == (self.num_heads, self.head_size)
        for n, (length, blocks) in enumerate(zip(metadata.seq_lens, metadata.blocks, strict=True)):
            rows = slice(metadata.starts[n], metadata.starts[n + 1])
            k, v = (t[blocks].transpose(1, 2).flatten(0, 1)[:length] for t in (keys, values))  # tokens, G, D
            k, v = (t.repeat_interleave(self.num_heads // t.shape[1], dim=1) for t in (k.flip(-1), v))
            seen = torch.arange(length) <= metadata.positions[rows, None]
            if self.window is not None:
                seen &= torch.arange(length) > metadata.positions[rows, None] - self.window
            scores = torch.einsum("qhd,khd->hqk", q[rows], k) * self.scale
            output[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class Backend:
    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []


class Attention(nn.Module):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        cache_config: Any,
        per_layer_sliding_window: int | None,
        prefix: str,
        kv_sharing_target_layer_name: str | None = None,
    ):
        super().__init__()
        assert prefix not in RANK.layers
        assert kv_sharing_target_layer_name is None or kv_sharing_target_layer_name in RANK.layers
        RANK.layers[prefix] = self
        self.layer_name, self.target = prefix, kv_sharing_target_layer_name
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.window, self.kv_cache_dtype, self.attn_backend = per_layer_sliding_window, "auto", Backend
        self.impl = Impl(num_heads, head_size, scale, num_kv_heads, None, per_layer_sliding_window, "auto")

    def get_kv_cache_spec(self, vllm_config: Any) -> Spec:
        return Spec(self.num_kv_heads, self.head_size, self.head_size)


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    tokens: list[int]
    done: int = 0
    blocks: list[Tensor] = field(default_factory=list)
    """The block table of each cache group."""


class Engine:
    """The decoder of a transformers model, on one or several ranks, with a cache of each group's own blocks."""

    def __init__(self, model: Any, *, ranks: int = 1, fast_prefill: bool = False, groups: Any = None):
        self.fast_prefill, self.ranks = fast_prefill, ranks
        barrier = threading.Barrier(ranks) if ranks > 1 else None
        board: list[Tensor | None] = [None] * ranks
        self.pool = [ThreadPoolExecutor(1) for _ in range(ranks)]  # a thread for each rank
        for number, thread in enumerate(self.pool):
            thread.submit(RANK.begin, number, ranks, barrier, board).result()
        self.models = self._all(lambda: self._load(model))
        self.groups = groups or {}
        self._all(self._allocate)

    def _all(self, work: Callable[[], Any]) -> list[Any]:
        return [future.result(timeout=300) for future in [thread.submit(work) for thread in self.pool]]

    def _load(self, model: Any) -> Any:
        from cllm.serve.vllm.model import ServedDecoder

        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=model.config),
            quant_config=None,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=self.ranks),
            cache_config=SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=self.fast_prefill),
        )
        served = ServedDecoder(vllm_config=config)
        tied = model.config.tie_word_embeddings
        weights = {n: w for n, w in model.state_dict().items() if not (tied and n == "model.head.weight")}
        loaded = served.load_weights(weights.items())
        assert loaded == dict(served.named_parameters()).keys()
        return served.eval()

    def _allocate(self) -> int:
        """The cache of every layer that asks for one, full of NaN; returns the numbers of a token."""
        total = 0
        for layer in RANK.layers.values():
            if layer.target is None:
                spec = layer.get_kv_cache_spec(None)
                width = spec.head_size + spec.head_size_v
                layer.kv_cache = torch.full((64, spec.num_kv_heads, BLOCK, width), torch.nan)
                total += spec.num_kv_heads * width
        return total

    @property
    def numbers(self) -> int:
        """Numbers that a token adds to the cache of all ranks."""
        return sum(self._all(self._allocate))

    def run(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Tensor]:
        """One step: the next `counts` tokens of each request. Returns the logits (count, vocabulary) of each, or with
        fast prefill (1, vocabulary), those of its last token."""
        parts = self._all(lambda: self._step(requests, counts))[0]
        for request, count in zip(requests, counts, strict=True):
            request.done += count
        return parts

    @torch.no_grad()
    def _step(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Tensor]:
        ids = [t for r, n in zip(requests, counts, strict=True) for t in r.tokens[r.done : r.done + n]]
        positions = torch.cat([torch.arange(r.done, r.done + n) for r, n in zip(requests, counts, strict=True)])
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        lengths = [r.done + n for r, n in zip(requests, counts, strict=True)]
        last = torch.tensor(starts[1:]) - 1
        # As vLLM chooses them: the layers at the end of its list that share the cache of others.
        exits = set[str]()
        for name, layer in reversed(RANK.layers.items()):
            if layer.target is None:
                break
            exits.add(name)
        metadata, slots, group_slots = {}, {}, dict[int, Tensor]()
        for name, layer in RANK.layers.items():
            group = self.groups.get(layer.target or name, 0)
            blocks = [r.blocks[group] for r in requests]
            metadata[name] = Metadata(starts, lengths, positions, blocks)
            if self.fast_prefill and name in exits:
                every = list(range(len(requests) + 1))
                metadata[name] = FastPrefill(every, lengths, positions[last], blocks, logits_indices_padded=last)
            if group not in group_slots:
                places = [
                    b[torch.arange(r.done, end) // BLOCK] * BLOCK + torch.arange(r.done, end) % BLOCK
                    for b, r, end in zip(blocks, requests, lengths, strict=True)
                ]
                group_slots[group] = torch.cat(places)
            slots[name] = group_slots[group]
        RANK.context = SimpleNamespace(attn_metadata=metadata, slot_mapping=slots)
        served = self.models[RANK.number]
        logits = served.compute_logits(served(torch.tensor(ids), positions))
        return [part[-1:] if self.fast_prefill else part for part in logits.split(list(counts))]


_EMBEDDINGS = ("ParallelLMHead", "VocabParallelEmbedding")
MODULES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.config": {"CacheConfig": object, "VllmConfig": object},
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": lambda: RANK.number,
        "get_tensor_model_parallel_world_size": lambda: RANK.size,
    },
    "vllm.forward_context": {"get_forward_context": lambda: RANK.context},
    "vllm.logger": {"init_logger": __import__("logging").getLogger},
    "vllm.model_executor.layers.activation": {"SiluAndMul": SiluAndMul},
    "vllm.model_executor.layers.attention": {"Attention": Attention},
    "vllm.model_executor.layers.linear": {
        "ColumnParallelLinear": _Linear,
        "MergedColumnParallelLinear": MergedColumnParallelLinear,
        "RowParallelLinear": RowParallelLinear,
    },
    "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "vllm.model_executor.layers.vocab_parallel_embedding": dict.fromkeys(_EMBEDDINGS, Embedding),
    "vllm.model_executor.models.utils": {
        "AutoWeightsLoader": AutoWeightsLoader,
        "WeightsMapper": WeightsMapper,
        "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    },
    "vllm.v1.attention.backends.utils": {"KVSharingFastPrefillMetadata": FastPrefill},
    "vllm.v1.attention.selector": {"get_attn_backend": lambda *_, **__: Backend},
}


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of vLLM, until `patch` ends."""
    parents = {name.rsplit(".", n)[0] for name in MODULES for n in range(1, name.count(".") + 1)}
    for name in sorted({*MODULES, *parents}):
        module = ModuleType(name)
        vars(module).update(MODULES.get(name, {}))
        patch.setitem(sys.modules, name, module)
    for name in ("cllm.serve.vllm.attention", "cllm.serve.vllm.model"):
        patch.delitem(sys.modules, name, raising=False)
