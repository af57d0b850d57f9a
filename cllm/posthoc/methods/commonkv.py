"""CommonKV (arXiv 2508.16134): layers whose projections share a factor, and latents that neighbouring layers share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.inputs import RecordedInputs
from cllm.posthoc.lowrank import Solver
from cllm.posthoc.method import Compressor, Engine, naming
from cllm.posthoc.registry import register
from cllm.posthoc.slots import NOTHING_TO_COMPRESS, SlotTensors
from cllm.posthoc.tensor_tree import TensorTree

SOLVER = Solver("exact", "fp32")
"""Of the projections, in fp64."""


class Weight:
    """A layer's factor of the projections: a matrix (2 · width, r) and a bias (2 · width,) or None. It belongs to the
    method, which uses it for all caches, and does not count as a cache's tensor."""

    def __init__(self, matrix: Tensor, bias: Tensor | None):
        self.matrix, self.bias = matrix, bias

    def project(self, latent: Tensor, kind: Literal["k", "v"]) -> Tensor:
        """Keys before RoPE or values (B, m, width) of latents (B, m, r)."""
        half = len(self.matrix) // 2
        rows = slice(0, half) if kind == "k" else slice(half, None)
        return F.linear(latent.float(), self.matrix[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class Latents(TensorTree):
    """The latents that a slot stores, for keys and values together."""

    merged: Tensor
    """(B, m, r): latents of the merged tokens, shared by the slots of a group."""
    index: Tensor
    """int32 (B, m): the merged tokens, ascending; shared by the group."""
    own: Tensor | None
    """(B, n - m, r): the slot's latents of the other tokens; None if storing their keys and values takes fewer
    bytes."""
    length: int


@dataclass(frozen=True)
class Projected(Code):
    """Keys before RoPE, or values, of one slot."""

    latents: Latents
    rest: Tensor | None
    """(B, n - m, width): the tokens that are not merged, if `latents.own` is None."""
    weight: Weight
    kind: Literal["k", "v"]
    dtype: torch.dtype
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        index, latents = self.latents.index.long(), self.latents
        merged = self.weight.project(latents.merged, self.kind)
        rest = self.rest if latents.own is None else self.weight.project(latents.own, self.kind)
        assert rest is not None
        out = merged.new_zeros((len(merged), latents.length, merged.shape[2]))
        out = out.scatter(1, index[..., None].expand_as(merged), merged)
        others = others_of(index, latents.length)
        out = out.scatter(1, others[..., None].expand_as(rest), rest.float())
        return out.to(self.dtype).unflatten(-1, self.width)

    def read_flops(self) -> int:
        latents = self.latents
        tokens = latents.length if latents.own is not None else latents.merged.shape[1]
        return 2 * len(latents.merged) * tokens * latents.merged.shape[2] * math.prod(self.width)


def others_of(index: Tensor, length: int) -> Tensor:
    """(B, length - m): the indices below `length` that are not in `index` (B, m), ascending."""
    free = torch.ones(len(index), length, dtype=torch.bool, device=index.device).scatter(1, index, False)
    return free.nonzero()[:, 1].view(len(index), -1)


def factorize(projections: Sequence[tuple[Tensor, Tensor]], rank: int | None) -> tuple[list[Tensor], Tensor]:
    """Factorise the stacked projections of a group: for layers l, [W_k; W_v]_l ≈ M_l N.

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


@register(
    "commonkv",
    summary="latents of jointly factorised projections, merged over a group of slots for tokens where they are alike",
    sweep=("commonkv:group={group}",),
)
class CommonKV(Factorising):
    """CommonKV: the projections of a group of layers are factorised jointly (`factorize`), so that layers differ only
    in M_l and cache latents z_l = N h_l. Tokens whose latents are most alike store one latent for the group,

        z = Σ_l w_l z_l,    w_l from how much the loss grows when keys of layer l are replaced by noise

    Likeness is the cosine of the first and the last layer's latents. Sinks and the last tokens are never merged.
    Groups whose layers are less alike merge fewer tokens: the most similar of all groups' tokens are merged. With
    `allocation=equal` every group merges the same share instead.
    """

    keys_before_rope: ClassVar[bool] = True
    no_recompress: ClassVar[str | None] = (
        "CommonKV needs the projections' inputs, which a compressed cache no longer holds"
    )

    no_every: ClassVar[str | None] = (
        "CommonKV compares the latents of later tokens, which are products of the projections' inputs, and those are "
        "not recorded"
    )

    group: int = Field(4, ge=2)
    """Neighbouring slots whose projections are factorised jointly; the last group may be smaller."""
    merge: float = Field(0.6, ge=0, le=1)
    """Share of the tokens between `sinks` and `recent` that are merged, mean over groups."""
    rank: int | None = Field(None, ge=1)
    """Width of the latents; null: full rank."""
    recent: int = Field(128, ge=0)
    """Last tokens that are not merged."""
    allocation: Literal["similarity", "equal"] = "similarity"
    """Merge the most similar tokens of all groups, or the same number in every group."""
    weights: Literal["sensitivity", "equal"] = "sensitivity"
    """w_l: measured on the calibration tokens, or all equal."""

    _sensitivity: dict[int, float] | None = PrivateAttr(None)
    _inputs: RecordedInputs = PrivateAttr(default_factory=RecordedInputs)
    _weights: dict[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = PrivateAttr(default_factory=dict)
    _factors: dict[tuple[int, ...], tuple[list[Weight], Tensor]] = PrivateAttr(default_factory=dict)

    @property
    def chooses_for_batch(self) -> bool:
        return self.allocation == "similarity"

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        with naming(self.name):
            for slot in engine.slots():
                _projections(engine, slot)
            if not engine.slots():
                raise UserError(NOTHING_TO_COMPRESS)
        if self.weights == "equal":
            return
        half = ids.shape[1] // 2
        if half < 1 or ids.shape[1] - half < 2:
            raise UserError(f"{self.name}: {ids.shape[1]} calibration tokens; allowed: 3 or more")
        cache = engine.new_cache()
        engine.hidden(ids[:, :half], cache)
        slots = list(engine.compressible(cache).slots)

        def loss(slot: int) -> float:
            changed = engine.compress(cache, _Noise(slot=slot, sinks=self.sinks), measure=False)
            logits = engine.logits(ids[:, half:-1], changed).float()
            return F.cross_entropy(logits.flatten(0, 1), ids[:, half + 1 :].flatten()).item()

        exact = loss(-1)
        self._sensitivity = {slot: max(loss(slot) - exact, 1e-6) for slot in slots}

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Record the inputs of the projections while the cache is filled; latents are computed from them."""
        with naming(self.name):
            for slot in engine.slots():
                k, v = _projections(engine, slot)
                self._weights[slot] = (k.weight, v.weight, k.bias, v.bias)
        self._inputs = RecordedInputs()
        with self._inputs.record(engine):
            yield

    def release(self) -> None:
        self._inputs = RecordedInputs()

    def facts(self) -> dict[str, Any]:
        if self._sensitivity is None:
            return super().facts()
        return {**super().facts(), "sensitivity": {str(slot): loss for slot, loss in self._sensitivity.items()}}

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise UserError(f"{self.name}: a slot is a latent; allowed: slots of keys and values")
        codes: tuple[Codes, Codes] = ([None] * len(keys.slots), [None] * len(keys.slots))
        groups = keys.groups(self.group)
        if self.rank is None and max(map(len, groups)) < 2:
            raise UserError(
                f"{self.name}: group={self.group}: of {len(keys.slots)} slots no two are merged, and rank=null drops "
                "nothing; allowed: a rank, or groups of two slots or more"
            )
        alike = [self._likeness(self._latents(keys, group, [group[0], group[-1]]), keys) for group in groups]
        for group, likeness, count in zip(groups, alike, self._counts(groups, alike, keys), strict=True):
            weights, _ = self._factored(tuple(keys.slots[i] for i in group))
            stored = self._merged(self._latents(keys, group, group), keys, group, likeness.topk(count, dim=1).indices)
            for i, slot_latents, weight in zip(group, stored, weights, strict=True):
                for tensors, slot_codes in ((keys, codes[0]), (values, codes[1])):
                    rest = None
                    if slot_latents.own is None:
                        others = others_of(slot_latents.index.long(), slot_latents.length)
                        flat = tensors.data[i].flatten(2)
                        rest = flat.gather(1, others[..., None].expand(-1, -1, flat.shape[2])).to(tensors.dtype)
                    width = tuple(tensors.data[i].shape[2:])
                    slot_codes[i] = Projected(slot_latents, rest, weight, tensors.kind, tensors.dtype, width)
        return codes

    def weight_bytes(self) -> int:
        factors = [weight.matrix for weights, _ in self._factors.values() for weight in weights]
        return sum(t.nbytes for t in (*factors, *(shared for _, shared in self._factors.values())))

    def _factored(self, slots: tuple[int, ...]) -> tuple[list[Weight], Tensor]:
        if slots not in self._factors:
            projections = [self._weights[slot] for slot in slots]
            full = min(sum(len(k) + len(v) for k, v, *_ in projections), projections[0][0].shape[1])
            if self.rank is not None and self.rank > full:
                raise UserError(f"{self.name}: rank={self.rank}; allowed for {len(slots)} slots: 1 to {full}")
            self.note_solver(SOLVER)
            left, shared = factorize([(k, v) for k, v, *_ in projections], self.rank or full)
            biases = [None if kb is None or vb is None else torch.cat((kb, vb)).float() for *_, kb, vb in projections]
            self._factors[slots] = [Weight(m, b) for m, b in zip(left, biases, strict=True)], shared
        return self._factors[slots]

    def _shares(self, slots: list[int]) -> list[float]:
        if self.weights == "equal":
            return [1 / len(slots)] * len(slots)
        if self._sensitivity is None:
            raise UserError(f"{self.name}: not calibrated: call prepare(engine, ids) first, or weights=equal")
        total = sum(self._sensitivity[slot] for slot in slots)
        return [self._sensitivity[slot] / total for slot in slots]

    def _latents(self, keys: SlotTensors, group: list[int], slots: list[int]) -> list[Tensor]:
        """The latents (B, n, r) of some slots of a group."""
        inputs = [self._inputs.of(keys.slots[i], keys, self.name).float() for i in slots]
        _, shared = self._factored(tuple(keys.slots[i] for i in group))
        return [F.linear(x, shared) for x in inputs]

    def _likeness(self, latents: list[Tensor], tensors: SlotTensors) -> Tensor:
        """(B, n): how much the tokens of a group are alike, from the latents of its first and last slot. Padding, which
        is never read, is 2, so that it is merged first; recent tokens are -inf."""
        alike = F.cosine_similarity(latents[0], latents[-1], dim=-1)
        if tensors.is_text is not None:
            alike = alike.masked_fill(~tensors.is_text, 2.0)
        alike[:, max(alike.shape[1] - self.recent, 0) :] = -math.inf
        return alike

    def _counts(self, groups: list[list[int]], alike: list[Tensor], tensors: SlotTensors) -> list[int]:
        """How many tokens each group merges. If sequences differ, their mean."""
        free = max(alike[0].shape[1] - self.recent, 0)
        count = math.floor(self.merge * free)
        several = [g for g, group in enumerate(groups) if len(group) > 1]
        counts = [count if len(group) > 1 else 0 for group in groups]
        if self.allocation == "similarity" and several and free:
            joined = torch.stack([alike[g][:, :free] for g in several], dim=1)  # B, groups, tokens
            order = joined.flatten(1).argsort(dim=1, descending=True, stable=True)[:, : count * len(several)]
            chosen = torch.zeros_like(joined).flatten(1).scatter(1, order, 1.0).unflatten(1, joined.shape[1:])
            means = chosen.sum(2).mean(0)
            numbers = means.floor().long()
            fractions = (means - numbers).argsort(descending=True, stable=True)
            numbers[fractions[: count * len(several) - int(numbers.sum())]] += 1
            for g, number in zip(several, numbers.tolist(), strict=True):
                counts[g] = number
        return counts

    def _merged(self, latents: list[Tensor], tensors: SlotTensors, group: list[int], index: Tensor) -> list[Latents]:
        """The stored latents of each slot of a group, from all its latents (B, n, r) and the merged tokens (B, m)."""
        tokens, rank = latents[0].shape[1:]
        index = index.sort(dim=1).values
        shares = self._shares([tensors.slots[i] for i in group])
        mean = sum(w * z for w, z in zip(shares, latents, strict=True))
        assert isinstance(mean, Tensor)

        def rows(x: Tensor, indices: Tensor) -> Tensor:
            return x.gather(1, indices[..., None].expand(-1, -1, rank)).to(tensors.dtype)

        merged, stored_index = rows(mean, index), index.to(torch.int32)
        keeps_latents = rank < 2 * tensors.data[group[0]].flatten(2).shape[2]
        others = others_of(index, tokens) if keeps_latents else None
        return [Latents(merged, stored_index, None if others is None else rows(z, others), tokens) for z in latents]


def _projections(engine: Engine, slot: int) -> tuple[nn.Linear, nn.Linear]:
    """Those of a slot whose keys before RoPE are a product of a weight. Raises `UserError` for others."""
    if engine.key_norm(slot) is not None:
        raise UserError(
            f"slot {slot}: its keys are normalised (qk_norm), and a merged latent gives products of a weight; allowed: "
            "keys without a norm"
        )
    return engine.projections(slot)


class _Noise(Compressor):
    """Keys of one slot replaced by noise of the same standard deviation, to measure how much the slot matters."""

    name: ClassVar[str] = "noise"

    slot: int

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        draw = torch.Generator().manual_seed(0)
        codes: Codes = [None] * len(keys.slots)
        for i, slot in enumerate(keys.slots):
            if slot == self.slot:
                x = keys.data[i]
                noise = torch.randn(x.shape, generator=draw).to(x.device) * x.float().std()
                codes[i] = Exact(noise.to(x.dtype))
        return codes, [None] * len(keys.slots)
