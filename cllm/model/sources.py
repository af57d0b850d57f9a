"""Where keys and values come from, as modules: owners write slots, readers turn slots into keys or values.

Keys are stored after RoPE, so reading them never needs positions.

Shapes: B batch, T tokens, G KV heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from cllm.cache.slot import Slot
from cllm.cache.stores import from_fp8
from cllm.config import ModelConfig
from cllm.kernels.decode import Stored
from cllm.model.norm import BlockRMSNorm, RMSNorm
from cllm.model.rope import apply_rope
from cllm.plan.forms import OwnMixed, OwnTied
from cllm.plan.fuse import Fuse
from cllm.plan.kinds import Own, Read, Retention, Share, Source
from cllm.plan.latent import Latent
from cllm.plan.registry import owner_module, read_module

Part = Literal["k", "v"]


class RopeTables(Protocol):
    """cos and sin for a head dimension."""

    def __call__(self, dim: int) -> tuple[Tensor, Tensor]: ...


class _Projecting(nn.Module):
    """The input of an owner's projections."""

    def __init__(self, config: ModelConfig, own: Own):
        super().__init__()
        self.head_dim = own.head_size(config.resolved_head_dim)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps) if own.kv_norm else None
        self.has_input = own.input is not None

    def projected(self, residual: Tensor, normed: Tensor) -> Tensor:
        """What is projected (B, T, d_model), of the arguments of `forward`."""
        return residual if self.has_input else normed if self.norm is None else self.norm(residual)

    def heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(B, T, G, D)."""
        return linear(x).unflatten(-1, (-1, self.head_dim))


@owner_module(Own)
class OwnKV(_Projecting):
    """Projects a layer's own keys and values, or one of the two."""

    k_proj: nn.Linear
    """None in the module of a slot without keys."""
    v_proj: nn.Linear
    """None in the module of a slot without values."""

    def __init__(self, config: ModelConfig, own: Own):
        super().__init__(config, own)
        width = own.n_kv_heads * self.head_dim
        for half, name in (("keys", "k_proj"), ("values", "v_proj")):
            linear = nn.Linear(config.d_model, width, bias=config.kv_bias) if half in own.halves else None
            self.register_module(name, linear)
        has_norm = config.qk_norm and "keys" in own.halves
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if has_norm else None

    def forward(self, residual: Tensor, normed: Tensor, rope: RopeTables) -> Slot:
        """The slot for `residual` (B, T, d_model), the stream as it enters the layer, and `normed`, its norm.

        With `input`, `residual` is the normalised output of that layer.
        """
        x = self.projected(residual, normed)
        k, v = (None if linear is None else self.heads(linear, x) for linear in (self.k_proj, self.v_proj))
        if k is None:
            return Slot(v.new_empty((*v.shape[:2], 0, self.head_dim)), v)
        if self.k_norm is not None:
            k = self.k_norm(k)
        k = apply_rope(k, rope(self.head_dim))
        return Slot(k, k.new_empty((*k.shape[:2], 0, self.head_dim)) if v is None else v)


class StoredForm(nn.Module):
    """Base of owner modules whose slots are stored in another form than readers see."""

    head_dim: int
    """Channels that RoPE rotates in the keys that readers see."""

    def as_read(self, stored: Slot, table: tuple[Tensor, Tensor], dtype: torch.dtype) -> Slot:
        """The slot as readers see it, in `dtype`, from all of its stored tokens and their RoPE table."""
        raise NotImplementedError

    def as_decoded(self, stored: Slot, table: tuple[Tensor, Tensor]) -> Slot:
        """The slot as decoding kernels read it, without a copy of the stored tokens."""
        raise NotImplementedError


@owner_module(OwnTied)
class OwnTiedKV(_Projecting, StoredForm):
    """Projects keys and values at once: K = RoPE(n), V = n with n = norm(W x) (Q-K=V, arXiv 2606.04032)."""

    def __init__(self, config: ModelConfig, own: OwnTied):
        super().__init__(config, own)
        self.kv_proj = nn.Linear(config.d_model, own.n_kv_heads * self.head_dim, bias=config.kv_bias)
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, residual: Tensor, normed: Tensor, rope: RopeTables) -> Slot:
        """The slot as it is stored: no keys, and n; arguments as those of `OwnKV`."""
        n = self.heads(self.kv_proj, self.projected(residual, normed))
        n = n if self.k_norm is None else self.k_norm(n)
        return Slot(n.new_empty((*n.shape[:2], 0, self.head_dim)), n)

    def as_read(self, stored: Slot, table: tuple[Tensor, Tensor], dtype: torch.dtype) -> Slot:
        n = stored.v if stored.v_scale is None else from_fp8(stored.v, stored.v_scale, dtype)
        return Slot(apply_rope(n, table), n)

    def as_decoded(self, stored: Slot, table: tuple[Tensor, Tensor]) -> Slot:
        return Slot(stored.v, stored.v, stored.v_scale, stored.v_scale, *table)


@owner_module(Latent)
class OwnLatent(nn.Module):
    """Projects a layer's own latent and its RoPE key: DeepSeek-V2 (arXiv 2405.04434), eq. 9 and 15.

    Each of several blocks i is √(d_model / r) RMSNorm_i(c_i), r its width (MLRA, arXiv 2603.02188). The factor gives
    the block's up-projection an input of the size that a projection of d_model channels has.
    """

    def __init__(self, config: ModelConfig, latent: Latent):
        super().__init__()
        self.rank, self.rope_dim = latent.kv_lora_rank, latent.qk_rope_head_dim
        self.down_proj = nn.Linear(config.d_model, self.rank + self.rope_dim, bias=False)
        scale, blocks = math.sqrt(config.d_model * latent.blocks / self.rank), latent.blocks
        self.norm = (
            RMSNorm(self.rank, eps=config.norm_eps)
            if blocks == 1
            else BlockRMSNorm(self.rank, blocks=blocks, scale=scale, eps=config.norm_eps)
        )

    def forward(self, residual: Tensor, normed: Tensor, rope: RopeTables) -> Slot:
        """The slot for `normed` (B, T, d_model)."""
        latent, key = self.down_proj(normed).split((self.rank, self.rope_dim), dim=-1)
        key = apply_rope(key[:, :, None], rope(self.rope_dim))[:, :, 0]  # one head for all
        return Slot(self.norm(latent), key)


def make_owner(config: ModelConfig, source: Source | None) -> nn.Module | None:
    """The module that writes a layer's slot, or None for a layer that owns none."""
    return None if source is None else owner_module.of(source)(config, source)


@owner_module(Retention)
def _no_owner(config: ModelConfig, source: Retention) -> None:
    """A recurrent state is written by its mixer."""


class Reader(nn.Module):
    """The keys, or the values, of a layer, made from slots.

    A subclass computes `forward`. In decoding, the default makes the tensor that the layer reads anew for every token;
    a subclass that is linear in the stored tensors may override `queries`, `stored` and `combine` instead. Readers'
    parameters get no weight decay and a learning rate of their own, and exports keep them in fp32.
    """

    is_projection: ClassVar[bool] = False
    """Its weight is a matrix that multiplies the layer's input."""

    def __init__(self, places: Sequence[int], part: Part):
        super().__init__()
        self.places, self.part = tuple(places), part

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        """(B, T, G, D) in the slots' dtype."""
        raise NotImplementedError

    def parts(self, slots: Sequence[Slot]) -> list[Tensor]:
        """The tensors (B, T, G, D) of the slots that this read is made of, in the order of `Read.layers`."""
        return [getattr(slots[place], self.part) for place in self.places]

    def queries(self, q: Tensor) -> list[Tensor]:
        """Queries (B, H, D) for each tensor of `stored`: all as they are."""
        return [q]

    def stored(self, slots: Sequence[Slot]) -> list[Stored]:
        """The tensors that decoding attends to: those in the cache, or made from them."""
        return [Stored(self([unpacked(slot) for slot in slots]))]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Attention's output (B, H, D) from the outputs over each tensor of `stored`."""
        return outputs[0]


def unpacked(slot: Slot, dtype: torch.dtype | None = None) -> Slot:
    """A slot as plain tensors: fp8 numbers times their factors, compressed data rebuilt, keys rotated.

    fp8 numbers become `dtype`, by default that of their factors.
    """
    k, v = (t if isinstance(t, Tensor) else t[:] for t in (slot.k, slot.v))
    if slot.k_scale is not None and slot.v_scale is not None:
        k, v = (from_fp8(t, scale, dtype or scale.dtype) for t, scale in ((k, slot.k_scale), (v, slot.v_scale)))
    return Slot(k if slot.k_cos is None or slot.k_sin is None else apply_rope(k, (slot.k_cos, slot.k_sin)), v)


class SharedRead(Reader):
    """K = K_j: one owner's keys or values as they are."""

    def __init__(self, place: int, part: Part):
        super().__init__((place,), part)

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        return self.parts(slots)[0]

    def stored(self, slots: Sequence[Slot]) -> list[Stored]:
        """One tensor, as it lies in the cache."""
        return [stored_part(slots[self.places[0]], self.part)]


MIX_SCALE = 35.0
"""s of `OwnMixed`, the factor on its learned weights (the authors' code of YOCO++)."""


class WriteMix(Reader):
    """The keys, or the values, that an owner stores: s Σ_j w_j K_j over slots, its own last (arXiv 2604.13556)."""

    def __init__(self, n_slots: int, part: Part):
        super().__init__(range(n_slots), part)
        self.weight = nn.Parameter(torch.empty(n_slots, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """The last slot as it is, and nothing of the others."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[-1] = 1 / MIX_SCALE

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        """(B, T, G, D) in the slots' dtype, computed in fp32."""
        parts = self.parts(slots)
        weights = MIX_SCALE * self.weight.float()
        total = sum(weight * part.float() for weight, part in zip(weights, parts, strict=True))
        assert isinstance(total, Tensor)
        return total.to(parts[-1].dtype)


@owner_module(OwnMixed)
class OwnMixedKV(OwnKV):
    """Projects a layer's own keys and values, and mixes those of lower owners into them."""

    def __init__(self, config: ModelConfig, own: OwnMixed):
        super().__init__(config, own)
        self.mixed_keys, self.mixed_values = (WriteMix(len(own.mix) + 1, part) for part in ("k", "v"))

    def mix(self, own: Slot, others: Sequence[Slot]) -> Slot:
        """What is stored, from the new tokens of this layer and of those of `OwnMixed.mix`."""
        slots = (*others, own)
        return Slot(self.mixed_keys(slots), self.mixed_values(slots))


class FusedRead(Reader):
    """K = Σ_j a_j ⊙ K_j over owners (FusedKV, arXiv 2512.03870, eq. 3-5), computed in fp32.

    Weights depend on the layer and the channel, never on data; the optimizer gives the parameters of this class no
    weight decay and a learning rate of their own. For keys, both channels of a rotated pair (j, j + D/2) have one
    weight: otherwise scores would depend on absolute positions (eq. 7 and 8). Values have no such tie.

    `weight` is (sources, 1 or G, n): n is 1 for `scalar`, else D/2 for keys, one a pair, and D for values.
    """

    def __init__(self, read: Fuse, places: Sequence[int], part: Part, n_kv_heads: int, head_dim: int):
        super().__init__(places, part)
        self.init = read.init
        self.tied_pairs = part == "k" and read.granularity == "channel"
        channels = 1 if read.granularity == "scalar" else head_dim // 2 if self.tied_pairs else head_dim
        shape = (len(read.layers), n_kv_heads if read.per_head else 1, channels)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """`lite`: all keys from the last source, all values from the first; `mean`: 1/sources; `randn`: N(0, 1)."""
        with torch.no_grad():
            if self.init == "randn":
                self.weight.normal_()
            elif self.init == "mean":
                self.weight.fill_(1 / len(self.places))
            else:
                self.weight.zero_()
                self.weight[-1 if self.part == "k" else 0] = 1.0

    def channel_weights(self) -> Tensor:
        """(sources, 1 or G, 1 or D) fp32: the weights as they multiply channels."""
        weight = self.weight.float()
        return torch.cat((weight, weight), dim=-1) if self.tied_pairs else weight

    def forward(self, slots: Sequence[Slot]) -> Tensor:
        """(B, T, G, D) in the slots' dtype."""
        parts = self.parts(slots)
        total = sum(w * part.float() for w, part in zip(self.channel_weights(), parts, strict=True))
        assert isinstance(total, Tensor)
        return total.to(parts[0].dtype)

    def queries(self, q: Tensor) -> list[Tensor]:
        """Queries (B, H, D) for each tensor of `stored`, so that no fused key is ever made: q·Σ a_j ⊙ k_j =
        Σ (a_j ⊙ q)·k_j."""
        return [(q.float() * weight).to(q.dtype) for weight in self._head_weights(q.shape[1])]

    def stored(self, slots: Sequence[Slot]) -> list[Stored]:
        """The tensors that this read is made of, as they lie in the cache."""
        return [stored_part(slots[place], self.part) for place in self.places]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Attention's output (B, H, D): Σ_t p_t Σ_j b_j ⊙ v_tj = Σ_j b_j ⊙ Σ_t p_t v_tj."""
        weights = self._head_weights(outputs[0].shape[1])
        total = sum(weight * out.float() for weight, out in zip(weights, outputs, strict=True))
        assert isinstance(total, Tensor)
        return total.to(outputs[0].dtype)

    def _head_weights(self, n_heads: int) -> Tensor:
        """(sources, 1 or H, 1 or D): a query head has the weights of its KV head."""
        weights = self.channel_weights()
        heads = weights.shape[1]
        return weights if heads == 1 else weights.repeat_interleave(n_heads // heads, dim=1)


def stored_part(slot: Slot, part: Part) -> Stored:
    """A slot's keys (`k`) or values (`v`) as decoding reads them."""
    if part == "v":
        return Stored(slot.v, slot.v_scale)
    return Stored(slot.k, slot.k_scale, None if slot.k_cos is None or slot.k_sin is None else (slot.k_cos, slot.k_sin))


@read_module(Share)
def _shared(read: Share, part: Part, places: Sequence[int], n_kv_heads: int, head_dim: int) -> SharedRead:
    return SharedRead(places[0], part)


def make_read(read: Read, part: Part, places: Mapping[int, int], n_kv_heads: int, head_dim: int) -> Reader:
    """The module that reads the keys (`k`) or values (`v`) of a layer.

    `places` says where each owner's slot stands in the sequence that the layer is handed. Modules know places and not
    layers, so that layers that do the same are the same code and compile once.
    """
    return read_module.of(read)(read, part, [places[j] for j in read.layers], n_kv_heads, head_dim)
