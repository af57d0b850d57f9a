"""cllm's and transformers' models behind one interface: fill a cache, compress it, continue from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from cllm.cache.accounting import cache_bytes, mha_twin
from cllm.cache.cache import KVCache
from cllm.cache.stores import GrowingSlot, SlotStore
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.decoder import Decoder
from cllm.model.sources import FusedRead, Reader, SharedRead
from cllm.plan.kinds import Read
from cllm.posthoc import hf
from cllm.posthoc.cache import CompressedKVCache, compress_cache, compressible_slots
from cllm.posthoc.key_norm import KeyNorm
from cllm.posthoc.method import Compressor, Engine
from cllm.posthoc.readers import SlotReader
from cllm.posthoc.slots import CompressibleSlots
from cllm.posthoc.stores import CompressedSlot, SharingSlot
from cllm.posthoc.tensor_tree import fp32_numbers, total_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecoderEngine(Engine):
    """A cllm decoder and `KVCache`."""

    def __init__(self, model: Decoder):
        self.model, self.head = model, model.head

    def new_cache(self, shares: dict[int, int] | None = None) -> KVCache:
        return _SharingCache(self.model, shares) if shares else KVCache(self.model.config)

    def hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        return self.model.hidden(ids, cache=cache)

    @contextmanager
    def all_tokens(self) -> Iterator[None]:
        self.model.observers += 1
        try:
            yield
        finally:
            self.model.observers -= 1

    def compressible(self, cache: KVCache) -> CompressibleSlots:
        return compressible_slots(cache)

    def compress(self, cache: KVCache, method: Compressor, *, measure: bool = True) -> CompressedKVCache:
        return compress_cache(cache, method, measure=measure)

    def nbytes(self, cache: KVCache) -> int:
        return cache.nbytes()

    def host_tensors(self, cache: KVCache) -> list[Tensor]:
        return cache.host_tensors() if isinstance(cache, CompressedKVCache) else []

    def fp32_numbers(self, cache: KVCache) -> int:
        slots = [store for store in cache.stores.values() if isinstance(store, SlotStore)]
        left_out = {id(slot.prefix.scores) for slot in slots if isinstance(slot, CompressedSlot)}
        left_out |= {id(tensor) for tensor in self.host_tensors(cache)}
        stored = (tensor for slot in slots for tensor in slot.tensors().values())
        return fp32_numbers(tensor for tensor in stored if id(tensor) not in left_out)

    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        return cache_bytes(mha_twin(self.model.config), context=tokens, batch=batch, bytes_per_element=element)

    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        owner = self._owner(slot)
        return owner.k_proj, owner.v_proj

    def key_norm(self, slot: int) -> KeyNorm | None:
        owner = self._owner(slot)
        return None if owner.k_norm is None else KeyNorm.of(slot, owner.k_norm, owner.k_proj.out_features)

    def _owner(self, slot: int) -> Any:
        """The module that projects the keys and values of a slot."""
        if not self.model.plan.owned(slot).is_plain:
            raise UserError(f"slot {slot} is a latent; allowed: slots of keys and values")
        if not (own := self.model.plan.owned(slot)).is_compressible:
            raise UserError(f"slot {slot} stores {own.text}; allowed: slots of keys and values")
        block: Any = self.model.blocks[slot % len(self.model.blocks)]
        return block.attention.owner if slot < len(self.model.blocks) else block.attention.local

    def layers(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def layer_of(self, slot: int) -> nn.Module | None:
        return None if self.model.plan.loop is None else self.model.blocks[slot % len(self.model.blocks)]

    def readers(self, slot: int) -> list[SlotReader]:
        plan, found = self.model.plan, list[SlotReader]()
        local = {slot - len(plan)} if slot >= len(plan) else set()  # the second slot of a layer, which it alone reads
        layers = local or {*plan.readers("keys")[slot], *plan.readers("values")[slot]}
        for layer in sorted(layers):
            block: Any = self.model.blocks[layer]
            attention = block.attention
            if not isinstance(attention, Attention):
                seen = type(attention).__name__
                raise UserError(f"layer {layer} reads slot {slot} through {seen}; allowed: Attention")
            keys = _factors(layer, slot, attention.keys, plan.keys(layer))
            values = _factors(layer, slot, attention.values, plan.values(layer))
            queries = attention.q_proj if attention.q_norm is None else attention.q_norm
            output = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))
            inside = self.layer_of(layer)
            found.append(SlotReader(layer, queries, block.mlp_norm, output, keys, values, inside))
        return found


def _factors(layer: int, slot: int, reader: Reader, read: Read) -> Tensor | None:
    """How often `reader` reads each channel of a slot: (1 or G, 1 or D); None: not at all."""
    if slot not in read.layers:
        return None
    if isinstance(reader, SharedRead):
        return torch.ones(1, 1)
    if isinstance(reader, FusedRead):
        return reader.channel_weights()[read.layers.index(slot)]
    raise UserError(f"layer {layer} reads slot {slot} through {type(reader).__name__}; allowed: shared and fused reads")


class _SharingCache(KVCache):
    """A growing cache in which some slots store nothing."""

    def __init__(self, model: Decoder, shares: dict[int, int]):
        super().__init__(model.config)
        self._shares = shares

    def _allocate(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        super()._allocate(batch, device, dtype)
        for slot, source in self._shares.items():
            store = self.stores[source]
            assert isinstance(store, GrowingSlot)
            self.stores[slot] = SharingSlot(store)


_OTHER_NORM = re.compile(r"(?!k_norm$)(k|key|v|value|qk|kv)_?(layer_?)?norms?")
"""Names of modules that change keys or values after their projection, in an unknown place or way: HunYuan's
key_layernorm comes after RoPE, and Gemma 4 also normalises values."""


class TransformersEngine(Engine):
    """A transformers decoder and `DynamicCache`, for sequences without padding."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        head = model.get_output_embeddings()
        assert head is not None
        self.head = head

    def new_cache(self, shares: dict[int, int] | None = None) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for slot, source in (shares or {}).items():
            shared: Any = cache.layers[source]
            cache.layers[slot] = hf.SharingLayer(shared)
        return cache

    def hidden(self, ids: Tensor, cache: Any) -> Tensor:
        return self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def compressible(self, cache: Any) -> CompressibleSlots:
        return hf.compressible_layers(cache, self.model, None)

    def compress(self, cache: Any, method: Compressor, *, measure: bool = True) -> Any:
        return hf.compress_dynamic(cache, method, self.model, measure=measure)

    def nbytes(self, cache: Any) -> int:
        if hasattr(cache, "nbytes"):
            return cache.nbytes()
        return total_bytes([tensor for layer in cache.layers for tensor in hf.layer_tensors(layer)])

    def fp32_numbers(self, cache: Any) -> int:
        if hasattr(cache, "tensors"):
            return fp32_numbers(cache.tensors())
        return fp32_numbers(tensor for layer in cache.layers for tensor in hf.layer_tensors(layer))

    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        config = self.model.config.get_text_config()
        if getattr(config, "kv_lora_rank", None):
            width = config.num_hidden_layers * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        else:
            width = sum(2 * hf.heads_of(layer)[1] for layer in hf.layer_configs(config))
        return config.num_attention_heads * width * tokens * batch * element

    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        attention = self._attention(slot)
        return attention.k_proj, attention.v_proj

    def key_norm(self, slot: int) -> KeyNorm | None:
        attention = self._attention(slot)
        norm = getattr(attention, "k_norm", None)
        return None if norm is None else KeyNorm.of(slot, norm, attention.k_proj.out_features)

    def _attention(self, slot: int) -> Any:
        """The attention of layer `slot`, whose `k_proj` and `v_proj` project its keys and values."""
        layers: Any = getattr(self.model.base_model, "layers", None)
        attention = None if layers is None else getattr(layers[slot], "self_attn", None)
        if getattr(attention, "kv_a_proj_with_mqa", None) is not None:
            raise UserError(f"slot {slot} is a latent; allowed: slots of keys and values")
        if attention is None or not (hasattr(attention, "k_proj") and hasattr(attention, "v_proj")):
            raise UserError(
                f"{type(self.model).__name__}: slot {slot} has no projections of its own for keys and values; allowed: "
                "models with layers.N.self_attn.k_proj and v_proj, as Llama's"
            )
        for name, module in attention.named_children():
            if _OTHER_NORM.fullmatch(name):
                raise UserError(
                    f"slot {slot}: its keys or values pass through {name}, {type(module).__name__}; allowed: a norm of "
                    "keys before RoPE, k_norm"
                )
        return attention

    def layers(self) -> list[nn.Module]:
        if (layers := getattr(self.model.base_model, "layers", None)) is None:
            raise UserError(f"{type(self.model).__name__} has no layers.N; allowed: models with it, such as Llama's")
        return list(layers)

    def readers(self, slot: int) -> list[SlotReader]:
        layers: Any = getattr(self.model.base_model, "layers", None)
        layer = None if layers is None else layers[slot]
        attention: Any = getattr(layer, "self_attn", None)
        before_mlp: Any = getattr(layer, "post_attention_layernorm", None)
        needed = [getattr(attention, name, None) for name in ("q_proj", "v_proj", "o_proj")]
        if None in (*needed, before_mlp, getattr(layer, "input_layernorm", None)):
            raise UserError(
                f"{type(self.model).__name__}: layer {slot} has other modules than Llama's; allowed: layers.N with "
                "input_layernorm, self_attn.q_proj, v_proj and o_proj, and post_attention_layernorm"
            )
        # Queries are rotated like keys. Gemma 3, which has two kinds of RoPE, also orders its queries (B, H, T, D).
        hf.check_rope(getattr(self.model.base_model, "rotary_emb", None))
        before_mlp = getattr(layer, "pre_feedforward_layernorm", before_mlp)
        weight = attention.o_proj.weight
        one = weight.new_ones(1, 1)
        queries = getattr(attention, "q_norm", None) or attention.q_proj
        return [SlotReader(slot, queries, before_mlp, weight.unflatten(1, (-1, attention.head_dim)), one, one)]


def engine_of(model: nn.Module) -> Engine:
    """The engine of a cllm decoder, a `CLLMForCausalLM`, or any other transformers decoder."""
    from cllm.hub.model import CLLMForCausalLM

    if isinstance(model, Decoder):
        return DecoderEngine(model)
    if isinstance(model, CLLMForCausalLM):
        return DecoderEngine(model.model)
    return TransformersEngine(model)  # type: ignore[arg-type]
