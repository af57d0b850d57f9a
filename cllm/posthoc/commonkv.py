"""CommonKV (arXiv 2508.16134): layers whose projections share a factor, and latents that neighbours share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Compressor, Exact, Part
from cllm.posthoc.held import Held

if TYPE_CHECKING:
    from cllm.posthoc.engine import Engine


class Weight:
    """A matrix (2 · width, r) and a bias (2 · width,) or None: a layer's part of the factored projections. It belongs
    to the method, serves every cache, and is none of a cache's tensors."""

    def __init__(self, matrix: Tensor, bias: Tensor | None):
        self.matrix, self.bias = matrix, bias

    def project(self, latent: Tensor, kind: Literal["k", "v"]) -> Tensor:
        """Keys before RoPE or values (B, m, width) of latents (B, m, r)."""
        half = len(self.matrix) // 2
        rows = slice(0, half) if kind == "k" else slice(half, None)
        return F.linear(latent.float(), self.matrix[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class Latents(Held):
    """What a slot stores of its tokens, for keys and values together."""

    merged: Tensor
    """(B, m, r): one latent for all slots of a group, held once."""
    index: Tensor
    """int32 (B, m): which tokens those are, ascending. Held once by a group."""
    own: Tensor | None
    """(B, n - m, r): the slot's latents of the other tokens; None where keys and values themselves are smaller."""
    length: int


@dataclass(frozen=True)
class Projected(Code):
    """Keys before RoPE, or values, of one slot."""

    latents: Latents
    rest: Tensor | None
    """(B, n - m, width): the tokens that are not merged, where `latents.own` has none."""
    weight: Weight
    kind: Literal["k", "v"]
    dtype: torch.dtype
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        index, held = self.latents.index.long(), self.latents
        merged = self.weight.project(held.merged, self.kind)
        rest = self.rest if held.own is None else self.weight.project(held.own, self.kind)
        assert rest is not None
        out = merged.new_zeros((len(merged), held.length, merged.shape[2]))
        out = out.scatter(1, index[..., None].expand_as(merged), merged)
        others = others_of(index, held.length)
        out = out.scatter(1, others[..., None].expand_as(rest), rest.float())
        return out.to(self.dtype).unflatten(-1, self.width)


def others_of(index: Tensor, length: int) -> Tensor:
    """(B, length - m): the places below `length` that are not in `index` (B, m), ascending."""
    free = torch.ones(len(index), length, dtype=torch.bool, device=index.device).scatter(1, index, False)
    return free.nonzero()[:, 1].view(len(index), -1)


def factored(projections: Sequence[tuple[Tensor, Tensor]], rank: int | None) -> tuple[list[Tensor], Tensor]:
    """Factors of the stacked projections of a group: for layers l, [W_k; W_v]_l ≈ M_l N.

        [W_k,1; W_v,1; ...; W_k,G; W_v,G] = U Σ Vᵀ,    M_l = U_l √Σ,    N = √Σ Vᵀ

    Args:
        projections: (width, d_model) weights of keys and of values, for each layer.
        rank: leading singular values to keep; None: all.

    Returns:
        M_l (2 · width, r) fp32 of every layer, and N (r, d_model) fp32.
    """
    stacked = torch.cat([w.double() for pair in projections for w in pair])
    u, s, vt = torch.linalg.svd(stacked, full_matrices=False)
    root = s[:rank].sqrt()
    left = (u[:, :rank] * root).float()
    return list(left.split([sum(len(w) for w in pair) for pair in projections])), (root[:, None] * vt[:rank]).float()


class CommonKV(Compressor):
    """CommonKV: for a group of layers the projections are factored together, so that layers differ in M_l
    only and cache latents z_l = N h_l (`factored`); the tokens whose latents are most alike share one,

        z = Σ_l w_l z_l,    w_l from how much the loss grows when keys of layer l are noise

    measured by the cosine of the first and the last layer's latents. Sinks and the last tokens are never merged.
    The share of tokens that is merged is the same in every group; the paper's allocation over groups is not here.
    """

    name: ClassVar[str] = "commonkv"
    keys_before_rope: ClassVar[bool] = True
    once: ClassVar[str | None] = "latents are made of what projections are given, which a compressed cache has not"

    group: int = Field(4, ge=2)
    """Slots that share projections, neighbours; the last group may be short."""
    merge: float = Field(0.6, ge=0, le=1)
    """The share of tokens, between `sinks` and `recent`, that are merged."""
    rank: int | None = Field(None, ge=1)
    """Width of the latents; null: as wide as loses nothing."""
    recent: int = Field(128, ge=0)
    """Last tokens that are not merged."""
    weights: Literal["sensitivity", "equal"] = "sensitivity"
    """w_l: measured on the calibration tokens, or all alike."""

    _sensitivity: dict[int, float] | None = PrivateAttr(None)
    _inputs: dict[int, list[Tensor]] = PrivateAttr(default_factory=dict)
    _weights: dict[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = PrivateAttr(default_factory=dict)
    _factors: dict[tuple[int, ...], tuple[list[Weight], Tensor]] = PrivateAttr(default_factory=dict)

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        for slot in engine.slots():
            engine.projections(slot)  # raises where there are none to factor
        if self.weights == "equal":
            return
        half = ids.shape[1] // 2
        if half < 1 or ids.shape[1] - half < 2:
            raise UserError(f"{self.name}: {ids.shape[1]} calibration tokens; allowed: 3 or more")
        cache = engine.new_cache()
        engine.hidden(ids[:, :half], cache)
        slots = list(engine.filled(cache).slots)

        def loss(slot: int) -> float:
            changed = engine.compress(cache, _Noise(slot=slot, sinks=self.sinks), measure=False)
            logits = engine.logits(ids[:, half:-1], changed).float()
            return F.cross_entropy(logits.flatten(0, 1), ids[:, half + 1 :].flatten()).item()

        exact = loss(-1)
        self._sensitivity = {slot: max(loss(slot) - exact, 1e-6) for slot in slots}

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Sees what projections are given while the cache is filled: latents are made of it."""
        cache_slots, handles = engine.slots(), []
        self._inputs = {slot: [] for slot in cache_slots}
        for slot in cache_slots:
            k, v = engine.projections(slot)
            self._weights[slot] = (k.weight, v.weight, k.bias, v.bias)
            seen = self._inputs[slot]
            handles.append(k.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach())))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def release(self) -> None:
        self._inputs = {}

    def facts(self) -> dict[str, Any]:
        if self._sensitivity is None:
            return {}
        return {"sensitivity": {str(slot): loss for slot, loss in self._sensitivity.items()}}

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        if values is None:
            raise UserError(f"{self.name}: a slot is a latent; allowed: slots of keys and values")
        codes: tuple[list[Code | None], list[Code | None]] = ([None] * len(keys.slots), [None] * len(keys.slots))
        for group in keys.groups(self.group):
            inputs = [self._seen(keys.slots[i], keys) for i in group]
            weights, shared = self._factored(tuple(keys.slots[i] for i in group))
            latents = [F.linear(x, shared) for x in inputs]
            stored = self._merged(latents, keys, group)
            for i, held, weight in zip(group, stored, weights, strict=True):
                others = others_of(held.index.long(), held.length)
                for part, found in ((keys, codes[0]), (values, codes[1])):
                    rest = None
                    if held.own is None:
                        flat = part.data[i].flatten(2)
                        rest = flat.gather(1, others[..., None].expand(-1, -1, flat.shape[2])).to(part.dtype)
                    width = tuple(part.data[i].shape[2:])
                    found[i] = Projected(held, rest, weight, part.kind, part.dtype, width)
        return codes

    def weight_bytes(self) -> int:
        factors = [weight.matrix for weights, _ in self._factors.values() for weight in weights]
        return sum(t.nbytes for t in (*factors, *(shared for _, shared in self._factors.values())))

    def _seen(self, slot: int, keys: Part) -> Tensor:
        """Inputs of the projections of `slot` (B, n, d_model), sinks left out as in `keys`."""
        seen = self._inputs.get(slot, [])
        if sum(x.shape[1] for x in seen) != keys.tokens:
            raise UserError(
                f"{self.name}: has not seen the cache being filled: fill it inside of `with method.watch(engine)`, and "
                "compress it before the next one and before release()"
            )
        inputs = torch.cat(seen, dim=1)
        return (inputs if keys.sinks is None else keys.sinks.without(inputs)).float()

    def _factored(self, slots: tuple[int, ...]) -> tuple[list[Weight], Tensor]:
        if slots not in self._factors:
            held = [self._weights[slot] for slot in slots]
            full = min(sum(len(k) + len(v) for k, v, *_ in held), held[0][0].shape[1])
            if self.rank is not None and self.rank > full:
                raise UserError(f"{self.name}: rank={self.rank}; allowed for {len(slots)} slots: 1 to {full}")
            left, shared = factored([(k, v) for k, v, *_ in held], self.rank or full)
            biases = [None if kb is None or vb is None else torch.cat((kb, vb)).float() for *_, kb, vb in held]
            self._factors[slots] = [Weight(m, b) for m, b in zip(left, biases, strict=True)], shared
        return self._factors[slots]

    def _shares(self, slots: list[int]) -> list[float]:
        if self.weights == "equal":
            return [1 / len(slots)] * len(slots)
        if self._sensitivity is None:
            raise UserError(f"{self.name}: not calibrated: call prepare(engine, ids) first, or weights=equal")
        total = sum(self._sensitivity[slot] for slot in slots)
        return [self._sensitivity[slot] / total for slot in slots]

    def _merged(self, latents: list[Tensor], part: Part, group: list[int]) -> list[Latents]:
        """What each slot of a group stores, of latents (B, n, r)."""
        tokens, rank = latents[0].shape[1:]
        count = math.floor(self.merge * max(tokens - self.recent, 0)) if len(group) > 1 else 0
        alike = F.cosine_similarity(latents[0], latents[-1], dim=-1)
        if part.text is not None:
            alike = alike.masked_fill(~part.text, 2.0)  # padding, that nobody reads, is merged first
        alike[:, max(tokens - self.recent, 0) :] = -math.inf
        index = alike.topk(count, dim=1).indices.sort(dim=1).values
        shares = self._shares([part.slots[i] for i in group])
        mean = sum(w * z for w, z in zip(shares, latents, strict=True))
        assert isinstance(mean, Tensor)

        def rows(x: Tensor, places: Tensor) -> Tensor:
            return x.gather(1, places[..., None].expand(-1, -1, rank)).to(part.dtype)

        merged, places = rows(mean, index), index.to(torch.int32)
        keeps_latents = rank < 2 * part.data[group[0]].flatten(2).shape[2]
        others = others_of(index, tokens)
        return [Latents(merged, places, rows(z, others) if keeps_latents else None, tokens) for z in latents]


class _Noise(Compressor):
    """Keys of one slot replaced by noise of their size, for measuring what that slot matters."""

    name: ClassVar[str] = "noise"

    slot: int

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        draw = torch.Generator().manual_seed(0)
        codes: list[Code | None] = [None] * len(keys.slots)
        for i, slot in enumerate(keys.slots):
            if slot == self.slot:
                x = keys.data[i]
                noise = torch.randn(x.shape, generator=draw).to(x.device) * x.float().std()
                codes[i] = Exact(noise.to(x.dtype))
        return codes, [None] * len(keys.slots)
