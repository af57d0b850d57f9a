"""The decoder for vLLM: its linear layers and attention are vLLM's, its cache is that of the KV plan.

Tensors have the names that they have in exported folders, except that the MLP's gate and up projections are one. Norms,
RoPE and fusion are those of training. Weights of a fusion stay in fp32. With tensor parallelism each rank has a share
of the heads of every layer, and of the fusion weights that are separate for heads.

Shapes: T tokens of a step, of all requests, H query heads and G KV heads of this rank, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata
from vllm.v1.attention.selector import get_attn_backend

from cllm.cache.slot import Slot
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.fusion import WeightedRead
from cllm.model.norm import RMSNorm
from cllm.model.rope import apply_rope, rope_table
from cllm.model.sources import FusedRead, WriteMix, make_read
from cllm.plan.forms import OwnMixed, OwnTied
from cllm.plan.fuse import Fuse
from cllm.plan.kinds import Half, Own, Read
from cllm.plan.plan import KVPlan
from cllm.serve.vllm.attention import BACKENDS, EntryAttention, Reading, write
from cllm.serve.vllm.layout import Entry, LayerRead, Layout, check_decoder, make_layout

log = init_logger(__name__)
Slots = dict[int, tuple[Tensor, Tensor]]
Table = tuple[Tensor, Tensor]


def column(n_in: int, n_out: int, bias: bool, prefix: str, quant_config: Any) -> ColumnParallelLinear:
    """A projection whose outputs are divided among the ranks."""
    return ColumnParallelLinear(n_in, n_out, bias=bias, quant_config=quant_config, prefix=prefix, return_bias=False)


class OwnerProjections(nn.Module):
    """Projects the keys and values that a layer owns, see `cllm.model.sources`."""

    def __init__(self, config: ModelConfig, own: Own, prefix: str, quant_config: Any):
        super().__init__()
        self.head_dim, self.own = config.resolved_head_dim, own
        self.is_tied = isinstance(own, OwnTied)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps) if own.kv_norm else None
        width = own.n_kv_heads * self.head_dim
        names = ("kv_proj",) if self.is_tied else tuple(f"{half[0]}_proj" for half in own.halves)
        for name in names:
            linear = column(config.d_model, width, config.kv_bias, f"{prefix}.{name}", quant_config)
            self.register_module(name, linear)
        self.names = names
        has_norm = config.qk_norm and "keys" in own.halves
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if has_norm else None
        if isinstance(own, OwnMixed):
            self.mixed_keys, self.mixed_values = (WriteMix(len(own.mix) + 1, part) for part in ("k", "v"))

    def forward(
        self, residual: Tensor, normed: Tensor, table: Table, lower: Slots
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys after RoPE and values of the step, (T, G, D) each; None for a half that the layer does not own.

        Args:
            residual: (T, d_model), the stream as it enters the layer, or the normalised output of a lower layer.
            normed: (T, d_model), its norm.
            table: RoPE of the tokens.
            lower: keys and values of lower owners, for those that mix them in.
        """
        x = residual if self.own.input is not None else normed if self.norm is None else self.norm(residual)
        made = {name: getattr(self, name)(x).unflatten(-1, (-1, self.head_dim)) for name in self.names}
        if self.is_tied:
            n = made["kv_proj"]
            n = n if self.k_norm is None else self.k_norm(n)
            return apply_rope(n, table), n
        k, v = made.get("k_proj"), made.get("v_proj")
        if k is not None:
            k = apply_rope(k if self.k_norm is None else self.k_norm(k), table)
        if self.own.mixes and k is not None and v is not None:
            slots = [*(Slot(*lower[j]) for j in self.own.mixes), Slot(k, v)]
            k, v = self.mixed_keys(slots), self.mixed_values(slots)
        return k, v


def shard_of_heads(weight: Tensor, heads: int, rank: int) -> Tensor:
    """The `heads` of a rank, of fusion weights (sources, KV heads of all ranks, ...), or all if heads share."""
    return weight if weight.shape[1] == 1 else weight.narrow(1, rank * heads, heads)


def fusion_weights(read: Read, half: Half, n_kv_heads: int, head_dim: int) -> FusedRead | WeightedRead | None:
    """The fused read of a layer for `n_kv_heads` of this rank; None for a slot that is read as it is."""
    if not isinstance(read, Fuse):
        return None
    places = {j: n for n, j in enumerate(read.layers)}
    fused = make_read(read, "k" if half == "keys" else "v", places, n_kv_heads, head_dim)
    assert isinstance(fused, FusedRead | WeightedRead)

    def load(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(shard_of_heads(loaded, parameter.shape[1], get_tensor_model_parallel_rank()))

    fused.weight.weight_loader = load  # type: ignore[attr-defined]
    return fused


class LayerAttention(nn.Module):
    """The attention of a layer: writes its slot into the cache, and reads the entries that the plan names."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, prefix: str, quant_config: Any):
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.layer, self.plan, self.head_dim = layer, plan, config.resolved_head_dim
        width = config.n_heads * self.head_dim
        self.q_proj = column(config.d_model, width, config.q_bias, f"{prefix}.q_proj", quant_config)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        own = plan.layers[layer].own
        assert own is None or isinstance(own, Own)
        self.owner = None if own is None else OwnerProjections(config, own, f"{prefix}.owner", quant_config)
        heads = (plan.source(layer).kv_heads or 0) // ranks
        self.keys = fusion_weights(plan.keys(layer), "keys", heads, self.head_dim)
        self.values = fusion_weights(plan.values(layer), "values", heads, self.head_dim)
        self.o_proj = RowParallelLinear(
            width, config.d_model, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj", return_bias=False
        )

    def queries(self, x: Tensor, table: Table) -> Tensor:
        """(T, H, D) after RoPE, for normalised hidden states (T, d_model)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return apply_rope(q if self.q_norm is None else self.q_norm(q), table)

    def attend(self, q: Tensor, reading: Reading) -> Tensor:
        """The output (T, d_model) for queries (T, H, D)."""
        entry = reading.calls[0][0].keys
        read = self.plan.keys(self.layer)
        parts = [q] if self.keys is None else self.keys.queries(q)
        if len(entry.owners) > 1:
            by_owner = dict(zip(read.layers, parts, strict=True))
            q = torch.cat([by_owner[j] if j in by_owner else torch.zeros_like(q) for j in entry.owners], dim=-1)
        else:
            q = parts[0]
        owners = self.plan.values(self.layer).layers
        outputs: list[Tensor] = [q] * len(owners)
        for call, out in reading(q):
            for n in call.value_sources:
                place = call.values.owners.index(owners[n]) * self.head_dim
                outputs[n] = out[..., place : place + self.head_dim]
        out = outputs[0] if self.values is None else self.values.combine(outputs)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int, prefix: str, quant_config: Any):
        super().__init__()
        more = {"bias": False, "quant_config": quant_config, "return_bias": False}
        self.gate_up_proj = MergedColumnParallelLinear(d_model, [d_ff] * 2, prefix=f"{prefix}.gate_up_proj", **more)
        self.down_proj = RowParallelLinear(d_ff, d_model, prefix=f"{prefix}.down_proj", **more)
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_model) for `x` of that shape."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, d_ff: int, prefix: str, quant_config: Any):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = LayerAttention(config, plan, layer, f"{prefix}.attention", quant_config)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config.d_model, d_ff, f"{prefix}.mlp", quant_config)


class PagedCache(nn.Module):
    """vLLM's layers for the entries and reads of a layout."""

    def __init__(self, layout: Layout, plan: KVPlan, config: ModelConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.layout = layout
        entries: dict[Entry, EntryAttention] = {}
        readings: dict[int, Reading] = {}
        cache_config = vllm_config.cache_config

        def reading(read: LayerRead) -> Reading:
            window = plan.layers[read.layer].window
            return Reading(read, entries, window, f"{prefix}.{read.layer}.read", cache_config)

        for item in layout.order():
            if isinstance(item, Entry):
                name = f"{prefix}.{item.layer}.{item.content}"
                scale = config.resolved_head_dim**-0.5
                entries[item] = EntryAttention(item, config.n_heads, scale, cache_config, name)
            else:
                readings[item.layer] = reading(item)
        for read in layout.reads:
            if read.layer not in readings:
                readings[read.layer] = reading(read)
        self.entries, self.readings = entries, readings
        self.layers = nn.ModuleList([*entries.values(), *readings.values()])  # found by vLLM as parts of the model

    def write(self, layer: int, k: Tensor | None, v: Tensor | None, slots: Slots) -> None:
        """Write what a layer owns into the cache, and remember it in `slots` for the rest of the step.

        An entry of several owners is written by each of them: with zeros in place of what higher owners will write.
        """
        like = k if k is not None else v
        assert like is not None
        halves: dict[Half, Tensor | None] = {"keys": k, "values": v}
        zeros = torch.zeros_like(like)
        slots[layer] = (zeros if k is None else k, zeros if v is None else v)
        found = {half: self.layout.of(layer, half) for half, tensor in halves.items() if tensor is not None}
        keys = found.get("keys") or self.layout.partners[found["values"]]
        values = found.get("values") or self.layout.partners[found["keys"]]
        new = [
            torch.cat([slots[j][n] if j in slots else zeros for j in entry.owners], dim=-1)
            for n, entry in enumerate((keys, values))
        ]
        write(self.entries[keys], self.entries[values], *new)


class PagedDecoder(nn.Module):
    """The layers of the decoder. Tensors are named as in `cllm.model.decoder.Decoder`."""

    def __init__(self, config: ModelConfig, layout: Layout, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config, self.plan, self.layout = config, config.plan(), layout
        quant_config = vllm_config.quant_config
        assert config.vocab_size is not None
        self.embed = VocabParallelEmbedding(
            config.vocab_size, config.d_model, quant_config=quant_config, prefix=f"{prefix}.embed"
        )
        d_ff = config.resolved_d_ff
        self.blocks = nn.ModuleList(
            Block(config, self.plan, i, d_ff, f"{prefix}.blocks.{i}", quant_config) for i in range(config.n_layers)
        )
        self.stream_norms = nn.ModuleDict(
            {str(i): RMSNorm(config.d_model, eps=config.norm_eps) for i in sorted(self.plan.inputs)}
        )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = ParallelLMHead(
            config.vocab_size, config.d_model, quant_config=quant_config, prefix=f"{prefix}.head"
        )
        if config.tie_embeddings:
            self.head = self.head.tie_weights(self.embed)
        self.cache = PagedCache(layout, self.plan, config, vllm_config, f"{prefix}.cache")

    def wanted_tokens(self) -> Tensor | None:
        """Indices of the tokens whose logits are wanted, in a step in which upper layers compute only those."""
        if self.layout.exit_at is None:
            return None
        metadata = self.cache.readings[len(self.plan) - 1].metadata
        if not isinstance(metadata, KVSharingFastPrefillMetadata) or metadata.logits_indices_padded is None:
            return None
        return metadata.logits_indices_padded

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """The normalised hidden states (T, d_model) that the head reads.

        In a step of vLLM's fast prefill, those of other tokens than the wanted ones are not computed up to the end.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        all_table = table = rope_table(self.config.rope, self.config.resolved_head_dim, positions)
        wanted, everything = self.wanted_tokens(), x
        slots: Slots = {}
        streams: dict[int, Tensor] = {}
        block: Any
        for i, block in enumerate(self.blocks):
            own = self.plan.layers[i].own
            normed = block.attention_norm(x)
            if own is not None:
                source = own.input
                residual = x if source is None else streams[source]
                k, v = block.attention.owner(residual, normed, all_table, slots)
                self.cache.write(i, k, v, slots)
            if wanted is not None and i == self.layout.exit_at:
                everything = x
                x, normed = x[wanted], normed[wanted]
                cos, sin = all_table
                table = (cos[wanted], sin[wanted])
            x = x + block.attention.attend(block.attention.queries(normed, table), self.cache.readings[i])
            x = x + block.mlp(block.mlp_norm(x))
            if i in self.plan.inputs:
                streams[i] = self.stream_norms[str(i)](x)
        x = self.norm(x)
        if wanted is None:
            return x
        everything = everything.clone()
        everything[wanted] = x
        return everything


class ServedDecoder(nn.Module):
    """The class that vLLM builds for exported folders."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
    )
    packed_modules_mapping: ClassVar[Mapping[str, Sequence[str]]] = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config.model_config
        self.config, self.quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        check_decoder(config)
        layout = _layout(config, vllm_config)
        self.model = PagedDecoder(config, layout, vllm_config, maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuse an attention backend that cannot read the keys and the values of two entries."""
        cache = self.model.cache
        is_split = any(call.keys != call.values for read in cache.layout.reads for call in read.calls)
        backend = next(iter(cache.entries.values())).attn_backend.get_name()
        if is_split and backend not in BACKENDS:
            raise UserError(
                f"attention backend {backend} reads keys and values of one layer of the cache; this KV plan needs "
                f"those of two: allowed: {', '.join(BACKENDS)} (--attention-backend)"
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(T, d_model) of token ids (T,)."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (T, d_model), see `PagedDecoder.forward`."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, vocab_size)."""
        return self.logits_processor(self.model.head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load an exported folder's tensors; returns the names of the parameters that have been loaded."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _layout(config: ModelConfig, vllm_config: VllmConfig) -> Layout:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UserError(
            f"pipeline parallel size is {parallel.pipeline_parallel_size}; allowed: 1, since layers read the cache of "
            "lower ones"
        )
    cache = vllm_config.cache_config
    if cache.cache_dtype.startswith(("fp8", "int", "nvfp4", "turboquant")):
        raise UserError(f"KV cache dtype is {cache.cache_dtype}; allowed: auto, since scales are those of one layer")
    backend = get_attn_backend(config.resolved_head_dim, torch.get_default_dtype(), cache.cache_dtype, use_mla=False)
    sizes = backend.get_supported_head_sizes() or None
    exits = bool(cache.kv_sharing_fast_prefill)
    layout = make_layout(
        config.plan(),
        config.n_heads,
        config.resolved_head_dim,
        head_sizes=sizes,
        ranks=parallel.tensor_parallel_size,
        exits=exits,
    )
    if exits and layout.exit_at is None:
        log.warning("fast prefill has no effect with this KV plan: all layers compute all tokens of a prompt")
    return layout
