"""Layers fitted to the slots that they read, by least squares on a calibration text.

Slots do not change. In the teacher the layer had keys K and values V. It now reads F = Σ_s a_s ⊙ K_s and
H = Σ_s b_s ⊙ V_s over its source slots; a layer that shares has one source, with weight 1. Free are the fusion weights
and an alignment, which the layer's q_proj and o_proj take on (heads.py): an order of heads, a complex factor m for each
pair of keys, and a matrix N for each head of values. So

    minimise |K - m ⊙ F|² and |V - N H|², over tokens, post-RoPE

Weights are closed-form for a given alignment, and the alignment for given weights. They alternate, with alignments that
keep lengths. With `map` a last step frees lengths: m = Σ conj(F) K / Σ |F|², N = Σ V Hᵀ (Σ H Hᵀ)⁻¹. Each step lowers
the error. Only sums of products are stored, in fp64: about G D² numbers a layer for each pair of sources.

Complex weights of keys and matrix weights of values include every such factor and map. One solution of the normal
equations is then the best: Σ_t (Σ conj(K_s) K_t) a_t = Σ conj(K_s) K for each pair and head, and Σ_t (Σ V_s V_tᵀ) B_t =
Σ V_s Vᵀ for each head, where the inner sums are over tokens.

The result of least squares is shorter than its target. Scores rely on the length of keys that the teacher normalises
(`qk_norm`), and queries cannot compensate, so weights that fuse such keys are scaled to restore it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.config.uptraining import Align, InitFrom
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.decoder import Decoder
from cllm.model.fusion import ComplexRead, MatrixRead
from cllm.model.sources import FusedRead, OwnKV, Reader
from cllm.plan.plan import KVPlan
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder, attention_of
from cllm.uptrain.heads import Alignment, Grams, procrustes, to_pairs, unit
from cllm.uptrain.project import Part, anchors
from cllm.uptrain.ridge import solve

_ROUNDS = 20
_Fused = FusedRead | ComplexRead | MatrixRead


@dataclass(frozen=True, slots=True)
class Fitted:
    """One read, of keys or of values, after its fit."""

    weight: Tensor
    """(s, 1 or G, 1 or n): fusion weights of the s sources; or (s, G, P) complex; or (s, G, D, D)."""
    transform: Tensor
    """The alignment's `key_factors` or `value_maps`."""
    error: float
    """|own - read|² / |own|²."""


@dataclass(slots=True)
class ReadSums:
    """Sums over tokens for one read: products of its s sources, and of the sources with the layer's own tensor."""

    part: Part
    sources: Tensor
    """Sources with each other: keys (s, s, G, P) complex, conj(first) second; values (s, s, G, D, D)."""
    cross: Tensor
    """Sources with own: keys (s, G, P) complex, conj(source) own; values (s, G, D, D)."""
    own: Tensor
    """Scalar: sum of squares of the layer's own keys or values."""

    @classmethod
    def of(cls, part: Part, sources: Sequence[Tensor], own: Tensor) -> ReadSums:
        """The sums of heads (G, D, N): head h of the sources with head h of `own`."""
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
        """A copy on the CPU, which solves matrices of a head's size in less time than a GPU takes to launch."""
        return ReadSums(self.part, self.sources.cpu(), self.cross.cpu(), self.own.cpu())

    def fit(self, start: Tensor, transform: Tensor, ridge: float, *, learn: bool, align: Align) -> Fitted:
        """Fit weights from `start`, if `learn`, and the alignment from `transform`, as far as `align` allows."""
        start = start if start.is_complex() else start.double()
        weight, transform = start, transform.to(self.cross.dtype)
        includes_alignments = learn and (start.is_complex() or start.ndim == 4)
        align = "none" if includes_alignments else align
        rounds = _ROUNDS if align in ("turn", "map") else 1
        error = float("inf")
        for n in range(rounds):
            if learn:
                weight = self._weights(start, transform, ridge)
            found = self._error(weight, transform)
            if error - found < 1e-9 or n == rounds - 1:
                break
            error = found
            transform = unit(self._read_own(weight)) if self.part == "k" else procrustes(self._read_own(weight))
        if align == "map":
            transform = self._free(weight, transform, ridge)
        return Fitted(weight, transform, self._error(weight, transform))

    def at_length(self, fitted: Fitted) -> Fitted:
        """`fitted` with weights scaled so that the read has the mean square of the layer's own tensor."""
        weight = fitted.weight * (self.own / self._read_read(fitted.weight).sum().clamp(min=1e-30)).sqrt()
        return Fitted(weight, fitted.transform, self._error(weight, fitted.transform))

    def _weights(self, start: Tensor, transform: Tensor, ridge: float) -> Tensor:
        """The best weights under an alignment that keeps lengths."""
        if start.ndim == 4:
            return self._matrices(start, transform, ridge)
        one = [dim for dim in (1, 2) if start.shape[dim] == 1]  # dims that share a weight
        if self.part == "k":
            a, b = self.sources, self.cross * transform
            a, b = (a, b) if start.is_complex() else (a.real, b.real)
        else:
            a, b = self.sources.diagonal(dim1=-2, dim2=-1), (self.cross * transform).sum(-1)
        if one:
            a, b = a.sum([dim + 1 for dim in one], keepdim=True), b.sum(one, keepdim=True)
        found = solve(a.permute(2, 3, 0, 1), b.permute(1, 2, 0)[..., None], start.permute(1, 2, 0)[..., None], ridge)
        return found[..., 0].permute(2, 0, 1)

    def _matrices(self, start: Tensor, transform: Tensor, ridge: float) -> Tensor:
        """The best matrices (s, G, D, D) under an orthogonal alignment."""
        n, _, groups, d, _ = self.sources.shape
        a = self.sources.permute(2, 0, 3, 1, 4).reshape(groups, n * d, n * d)
        b = torch.einsum("sgde,gfe->gsdf", self.cross, transform).reshape(groups, n * d, d)
        found = solve(a, b, start.transpose(0, 1).reshape(groups, n * d, d), ridge)
        return found.unflatten(1, (n, d)).transpose(0, 1)

    def _read_own(self, weight: Tensor) -> Tensor:
        """Products of the read with the layer's own tensor: (G, P) or (G, D, D)."""
        if weight.ndim == 4:
            return torch.einsum("sgdf,sgde->gfe", weight, self.cross)
        return (self.cross * (weight.conj() if self.part == "k" else weight[..., None])).sum(0)

    def _read_read(self, weight: Tensor) -> Tensor:
        """Products of the read with itself: (G, P) real or (G, D, D)."""
        if self.part == "k":
            return (self.sources * weight.conj()[:, None] * weight[None]).sum((0, 1)).real
        if weight.ndim == 4:
            return torch.einsum("sgdf,stgde,tgeh->gfh", weight, self.sources, weight)
        w = weight.expand(-1, *self.cross.shape[1:-1])
        return torch.einsum("sgd,stgde,tge->gde", w, self.sources, w)

    def _free(self, weight: Tensor, transform: Tensor, ridge: float) -> Tensor:
        """The best alignment of any lengths."""
        read_own, read_read = self._read_own(weight), self._read_read(weight)
        if self.part == "v":
            return solve(read_read, read_own, transform, ridge)
        penalty = max(ridge, 1e-12) * read_read.mean().clamp(min=1e-30)
        return ((read_own + penalty * transform.conj()) / (read_read + penalty)).conj()

    def _error(self, weight: Tensor, transform: Tensor) -> float:
        """|own - read|² / |own|², for reads conj(u) F of keys and Mᵀ H of values."""
        read_own, read_read = self._read_own(weight), self._read_read(weight)
        if self.part == "k":
            left = -2 * (read_own * transform).real.sum() + (transform.abs().square() * read_read).sum()
        else:
            left = -2 * (read_own * transform).sum() + (transform * (read_read @ transform)).sum()
        return float((self.own + left) / self.own.clamp(min=1e-30))


@torch.no_grad()
def fit_readers(
    student: Decoder,
    teacher: TracedDecoder,
    owners: Mapping[int, OwnKV],
    alignments: Mapping[int, Alignment],
    batches: Batches,
    settings: InitFrom,
    changed: Iterable[int] = (),
) -> tuple[dict[int, Alignment], dict[str, float]]:
    """Fit every layer of `student` that reads another's slot to what it reads, and set its fusion weights.

    A layer in `alignments` is fitted twice, starting from the heads as they are and from its alignment. The fit with
    the smaller error is used.

    Args:
        student: with the final weights of owners.
        teacher: evaluates the text.
        owners: for each layer the projections that go with its queries and output as they are now.
        alignments: second starting points, by layer.
        batches: the text.
        settings: `ridge`, the pull towards the start, and `align`, what is free besides fusion weights.
        changed: owners whose slots are not the teacher's any more, which are fitted too.

    Returns:
        The alignment of each layer, which is still to be applied to it; and relative squared errors by read, as
        `layer 5 keys`: value.
    """
    plan = student.plan
    layers = sorted({*plan.inexact, *changed})
    for i in layers:
        for half, read in (("keys", plan.keys(i)), ("values", plan.values(i))):
            if not (read.is_stored or read.sums):
                raise UserError(
                    f"init.method: layer {i} reads its {half} by {read.key}, which least squares cannot fit; allowed: "
                    "copy, mean, aligned"
                )
    starts = {i: [Alignment.identity(_n_heads(owners[i]), owners[i].head_dim)] for i in layers}
    for i, alignment in alignments.items():
        starts[i].append(alignment)
    sums = _read_sums(student, teacher, owners, starts, batches)
    chosen: dict[int, Alignment] = {}
    errors: dict[str, float] = {}
    for i in layers:
        attention = attention_of(student, i)
        tried = [
            (start, *_fit_layer(attention, start, sums[i, n, "k"], sums[i, n, "v"], settings))
            for n, start in enumerate(starts[i])
        ]
        start, keys, values = min(tried, key=lambda fits: fits[1].error + fits[2].error)
        chosen[i] = Alignment(start.order, keys.transform, values.transform)
        for module, fitted, what in ((attention.keys, keys, "keys"), (attention.values, values, "values")):
            errors[f"layer {i} {what}"] = fitted.error
            if isinstance(module, _Fused):
                module.weight.copy_(_parameter(fitted.weight))
    return chosen, errors


def _read_sums(
    student: Decoder,
    teacher: TracedDecoder,
    owners: Mapping[int, OwnKV],
    starts: Mapping[int, Sequence[Alignment]],
    batches: Batches,
) -> dict[tuple[int, int, Part], ReadSums]:
    """Sums over the text for each layer in `starts`, start and part, on the CPU."""
    plan = student.plan
    sums: dict[tuple[int, int, Part], ReadSums] = {}
    for seen in observe(teacher, batches) if starts else ():
        slots = seen.slots(student, {j for i in starts for j in plan.reads(i)})
        for i in starts:
            k, v = seen.slot(i, owners[i])
            for n, start in enumerate(starts[i]):
                # Heads that the layer itself projects are reordered with it.
                k_read = [slots[j][0][start.order] if j == i else slots[j][0] for j in plan.keys(i).layers]
                v_read = [slots[j][1][start.order] if j == i else slots[j][1] for j in plan.values(i).layers]
                keys = ReadSums.of("k", k_read, k[start.order])
                values = ReadSums.of("v", v_read, v[start.order])
                sums[i, n, "k"] = sums[i, n, "k"] + keys if (i, n, "k") in sums else keys
                sums[i, n, "v"] = sums[i, n, "v"] + values if (i, n, "v") in sums else values
    return {read: summed.cpu() for read, summed in sums.items()}


def _fit_layer(
    attention: Attention, start: Alignment, keys: ReadSums, values: ReadSums, settings: InitFrom
) -> tuple[Fitted, Fitted]:
    """Fits of the keys and of the values that `attention` reads, starting from `start`."""
    ridge, align = settings.ridge, settings.align
    if attention.q_norm is None:
        of_keys = _fit(attention.keys, keys, start.key_factors, ridge, align)
    else:  # queries and keys are normalised: keys are only reordered
        of_keys = _fit(attention.keys, keys, start.key_factors, ridge, "none")
        if isinstance(attention.keys, _Fused):
            of_keys = keys.at_length(of_keys)
    return of_keys, _fit(attention.values, values, start.value_maps, ridge, align)


def _fit(read: Reader, sums: ReadSums, transform: Tensor, ridge: float, align: Align) -> Fitted:
    fused, device = isinstance(read, _Fused), sums.cross.device
    weight = _weight(read).to(device) if isinstance(read, _Fused) else torch.ones(1, 1, 1, device=device)
    return sums.fit(weight, transform.to(device), ridge, learn=fused, align=align)


def _weight(read: FusedRead | ComplexRead | MatrixRead) -> Tensor:
    """The weights of a read as in `Fitted`."""
    weight = read.weight.detach()
    return torch.complex(*weight.double().unbind(2)) if isinstance(read, ComplexRead) else weight


def _parameter(weight: Tensor) -> Tensor:
    """The inverse of `_weight`."""
    return torch.stack((weight.real, weight.imag), dim=2) if weight.is_complex() else weight


def _n_heads(owner: OwnKV) -> int:
    return owner.k_proj.out_features // owner.head_dim


@torch.no_grad()
def text_grams(
    plan: KVPlan, teacher: TracedDecoder, owners: Mapping[int, OwnKV], layers: Sequence[int], batches: Batches
) -> dict[int, Grams]:
    """Products of each of `layers` with its anchors over the text, post-RoPE: G² D² numbers a layer."""
    grams: dict[int, Grams] = {}
    for seen in observe(teacher, batches) if layers else ():
        wanted = {*layers, *(j for i in layers for j in anchors(plan, i))}
        slots = {j: seen.slot(j, owners[j]) for j in wanted}
        for i in layers:
            of_keys, of_values = anchors(plan, i)
            more = Grams.of(slots[of_keys][0], slots[i][0], slots[of_values][1], slots[i][1])
            grams[i] = grams[i] + more if i in grams else more
    return grams
