"""Layers fitted to what they read, by least squares on a calibration text; owners stay as they are.

A layer that owns nothing wants the keys K and values V that it had in the teacher and reads F = Σ_s a_s ⊙ K_s and
H = Σ_s b_s ⊙ V_s over source slots, one with weight 1 where it shares. Two things are free: the fusion weights, and
what the layer's own q_proj and o_proj can make of what they read (heads.py): an order of heads, a complex factor m for
every pair of keys, a matrix for every head of values. So

    minimise |K - m ⊙ F|² and |V - N H|², over tokens, post-RoPE

Weights are closed-form for a given turn, the turn for given weights; they alternate, the turn keeping lengths, and a
last step frees lengths (`map`): m = Σ conj(F) K / Σ |F|², N = Σ V Hᵀ (Σ H Hᵀ)⁻¹. Each step lowers the error. Only sums
of products are kept, in fp64: about G D² numbers a layer for each pair of sources.

Least squares shortens what it cannot explain. Keys that the teacher normalises (`qk_norm`) have a length that scores
rely on and queries cannot make up for, so weights that fuse such keys are scaled to give it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.config.uptraining import Align
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sources import FusedRead, OwnKV, Reader
from cllm.plan.plan import KVPlan
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder, attention_of, owner_of
from cllm.uptrain.heads import Grams, Turn, procrustes, to_pairs, unit
from cllm.uptrain.project import Part, anchors
from cllm.uptrain.ridge import solve

_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Fitted:
    """One read: fusion weights (s, 1 or G, 1 or n), the turn's part, and |own - what is read|² / |own|²."""

    weight: Tensor
    turn: Tensor
    error: float


@dataclass(slots=True)
class ReadSums:
    """Sums over tokens for one read: products of its s sources, and of sources with the layer's own."""

    part: Part
    sources: Tensor
    """Sources with each other: keys (s, s, G, P) complex, conj(first) second; values (s, s, G, D, D)."""
    cross: Tensor
    """Sources with own: keys (s, G, P) complex, conj(source) own; values (s, G, D, D)."""
    own: Tensor
    """(): squares of the layer's own."""

    @classmethod
    def of(cls, part: Part, sources: Sequence[Tensor], own: Tensor) -> ReadSums:
        """From heads (G, D, N), head h of the sources against head h of `own`."""
        square = own.double().square().sum()
        if part == "k":
            z, w = torch.stack([to_pairs(s) for s in sources]), to_pairs(own)
            products = torch.einsum("sgpn,tgpn->stgp", z.conj(), z)
            return cls(part, products, torch.einsum("sgpn,gpn->sgp", z.conj(), w), square)
        x = torch.stack([s.double() for s in sources])
        products = torch.einsum("sgdn,tgen->stgde", x, x)
        return cls(part, products, torch.einsum("sgdn,gen->sgde", x, own.double()), square)

    def __add__(self, more: ReadSums) -> ReadSums:
        return ReadSums(self.part, self.sources + more.sources, self.cross + more.cross, self.own + more.own)

    def cpu(self) -> ReadSums:
        """The same on the CPU, which solves and decomposes matrices of a head's size sooner than a GPU is asked to."""
        return ReadSums(self.part, self.sources.cpu(), self.cross.cpu(), self.own.cpu())

    def fit(self, start: Tensor, turn: Tensor, ridge: float, *, learn: bool, align: Align) -> Fitted:
        """Weights from `start`, which stay unless `learn`, and the turn from `turn`, which `align` may let move."""
        weight, turn = start.double(), turn.to(self.cross.dtype)
        rounds = _ROUNDS if align in ("turn", "map") else 1
        error = float("inf")
        for n in range(rounds):
            if learn:
                weight = self._weights(start.double(), turn, ridge)
            found = self._error(weight, turn)
            if error - found < 1e-9 or n == rounds - 1:
                break
            error = found
            turn = unit(self._read_own(weight)) if self.part == "k" else procrustes(self._read_own(weight))
        if align == "map":
            turn = self._free(weight, turn, ridge)
        return Fitted(weight, turn, self._error(weight, turn))

    def at_length(self, fitted: Fitted) -> Fitted:
        """`fitted` with weights scaled until what is read has the mean square of the layer's own."""
        weight = fitted.weight * (self.own / self._read_read(fitted.weight).sum().clamp(min=1e-30)).sqrt()
        return Fitted(weight, fitted.turn, self._error(weight, fitted.turn))

    def _weights(self, start: Tensor, turn: Tensor, ridge: float) -> Tensor:
        """The best weights under a turn that keeps lengths."""
        one = [dim for dim in (1, 2) if start.shape[dim] == 1]  # dims that share a weight
        if self.part == "k":
            a, b = self.sources.real, (self.cross * turn).real
        else:
            a, b = self.sources.diagonal(dim1=-2, dim2=-1), (self.cross * turn).sum(-1)
        if one:
            a, b = a.sum([dim + 1 for dim in one], keepdim=True), b.sum(one, keepdim=True)
        found = solve(a.permute(2, 3, 0, 1), b.permute(1, 2, 0)[..., None], start.permute(1, 2, 0)[..., None], ridge)
        return found[..., 0].permute(2, 0, 1)

    def _read_own(self, weight: Tensor) -> Tensor:
        """Products of what is read with the layer's own: (G, P) or (G, D, D)."""
        return (self.cross * (weight if self.part == "k" else weight[..., None])).sum(0)

    def _read_read(self, weight: Tensor) -> Tensor:
        """Products of what is read with itself: (G, P) real or (G, D, D)."""
        if self.part == "k":
            return (self.sources * weight[:, None] * weight[None]).sum((0, 1)).real
        w = weight.expand(-1, *self.cross.shape[1:-1])
        return torch.einsum("sgd,stgde,tge->gde", w, self.sources, w)

    def _free(self, weight: Tensor, turn: Tensor, ridge: float) -> Tensor:
        """The best map of any lengths, as a turn."""
        read_own, read_read = self._read_own(weight), self._read_read(weight)
        if self.part == "v":
            return solve(read_read, read_own, turn, ridge)
        penalty = max(ridge, 1e-12) * read_read.mean().clamp(min=1e-30)
        return ((read_own + penalty * turn.conj()) / (read_read + penalty)).conj()

    def _error(self, weight: Tensor, turn: Tensor) -> float:
        """|own - read|² / |own|²; a layer turned by u reads conj(u) F where it had K, one turned by M reads Mᵀ H."""
        read_own, read_read = self._read_own(weight), self._read_read(weight)
        if self.part == "k":
            left = -2 * (read_own * turn).real.sum() + (turn.abs().square() * read_read).sum()
        else:
            left = -2 * (read_own * turn).sum() + (turn * (read_read @ turn)).sum()
        return float((self.own + left) / self.own.clamp(min=1e-30))


@torch.no_grad()
def fit_readers(
    student: Decoder,
    teacher: TracedDecoder,
    owners: Mapping[int, OwnKV],
    turns: Mapping[int, Turn],
    batches: Batches,
    *,
    ridge: float,
    align: Align,
) -> tuple[dict[int, Turn], dict[str, float]]:
    """Fit every layer of `student` that owns nothing to the slots its owners write, and set its fusion weights.

    Both from the heads as they are and from `turns`, and whichever leaves less is taken.

    Args:
        student: owners as they will be.
        teacher: computes the text.
        owners: each layer's own projections, that go with its queries and output as they are now.
        turns: where else to start from, by layer.
        batches: the text.
        ridge: pull towards the start.
        align: what is free besides fusion weights.

    Returns:
        The turn of each layer, still to be applied to it; and relative squared errors as `layer 5 keys`: value.
    """
    plan = student.plan
    layers = plan.borrowers
    for i in layers:
        for half, read in (("keys", plan.keys(i)), ("values", plan.values(i))):
            if not (read.is_stored or read.sums):
                raise UserError(
                    f"init.method: layer {i} reads its {half} by {read.key}, which least squares cannot fit; allowed: "
                    "copy, mean, aligned"
                )
    starts = {i: [Turn.none(_n_heads(owners[i]), owners[i].head_dim)] for i in layers}
    for i, turn in turns.items():
        starts[i].append(turn)
    sums: dict[tuple[int, int, Part], ReadSums] = {}
    for seen in observe(teacher, batches) if layers else ():
        slots = {j: seen.slot(j, owner_of(student, j)) for j in {j for i in layers for j in plan.reads(i)}}
        for i in layers:
            k, v = seen.slot(i, owners[i])
            for n, turn in enumerate(starts[i]):
                keys = ReadSums.of("k", [slots[j][0] for j in plan.keys(i).layers], k[turn.order])
                values = ReadSums.of("v", [slots[j][1] for j in plan.values(i).layers], v[turn.order])
                sums[i, n, "k"] = sums[i, n, "k"] + keys if (i, n, "k") in sums else keys
                sums[i, n, "v"] = sums[i, n, "v"] + values if (i, n, "v") in sums else values
    sums = {read: summed.cpu() for read, summed in sums.items()}
    chosen: dict[int, Turn] = {}
    errors: dict[str, float] = {}
    for i in layers:
        attention = attention_of(student, i)
        normed = attention.q_norm is not None
        keys_align: Align = "none" if normed else align
        tried = [
            (
                turn,
                _fit(attention.keys, sums[i, n, "k"], turn.pairs, ridge, keys_align, normed=normed),
                _fit(attention.values, sums[i, n, "v"], turn.maps, ridge, align),
            )
            for n, turn in enumerate(starts[i])
        ]
        turn, of_keys, of_values = min(tried, key=lambda found: found[1].error + found[2].error)
        chosen[i] = Turn(turn.order, of_keys.turn, of_values.turn)
        for module, fitted, what in ((attention.keys, of_keys, "keys"), (attention.values, of_values, "values")):
            errors[f"layer {i} {what}"] = fitted.error
            if isinstance(module, FusedRead):
                module.weight.copy_(fitted.weight)
    return chosen, errors


def _fit(read: Reader, sums: ReadSums, turn: Tensor, ridge: float, align: Align, *, normed: bool = False) -> Fitted:
    fused, device = isinstance(read, FusedRead), sums.cross.device
    weight = read.weight.detach().to(device) if isinstance(read, FusedRead) else torch.ones(1, 1, 1, device=device)
    fitted = sums.fit(weight, turn.to(device), ridge, learn=fused, align=align)
    return sums.at_length(fitted) if fused and normed else fitted


def _n_heads(owner: OwnKV) -> int:
    return owner.k_proj.out_features // owner.head_dim


@torch.no_grad()
def text_grams(
    plan: KVPlan, teacher: TracedDecoder, owners: Mapping[int, OwnKV], layers: Sequence[int], batches: Batches
) -> dict[int, Grams]:
    """Products of each of `layers` with its anchors over the text, post-RoPE; G² D² numbers a layer are kept."""
    grams: dict[int, Grams] = {}
    for seen in observe(teacher, batches) if layers else ():
        wanted = {*layers, *(j for i in layers for j in anchors(plan, i))}
        slots = {j: seen.slot(j, owners[j]) for j in wanted}
        for i in layers:
            of_keys, of_values = anchors(plan, i)
            more = Grams.of(slots[of_keys][0], slots[i][0], slots[of_values][1], slots[i][1])
            grams[i] = grams[i] + more if i in grams else more
    return grams
