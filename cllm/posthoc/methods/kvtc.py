"""KVTC (arXiv 2511.01815): transform coding of stored prefixes. Principal components across layers, entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.budget import check_all_sinks, elements_left
from cllm.posthoc.code import Code, Codes
from cllm.posthoc.entropy import SIZE_BYTES, Streams, compress
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.lowrank import Solver
from cllm.posthoc.method import Engine, naming
from cllm.posthoc.projecting import check_tokens
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.tensor_tree import TensorTree

SOLVER = Solver("gram", "fp32")
"""Of all bases: energies of columns are needed, which are singular values."""
_TRIES = 8
"""Times that all groups are coded at most until they fit the budget; without components if none has fitted before."""


@dataclass(frozen=True)
class Components(TensorTree):
    """A (n, r) of a group of slots, which share it."""

    streams: Streams
    """The codes of the entire cache."""
    place: int
    """Which code is A, in steps."""
    step: Tensor
    """(B,), in the cache's dtype; one tensor for the entire cache."""

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        """A (n, r) fp32 of each sequence, and the steps (r,) of its B; r differs between sequences."""
        return self.streams.each_row(self.place, self._decode_row)

    def _decode_row(self, row: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        step = self.step[row]
        a = numbers.to(step.device).float().mul_(step.float())
        return a, basis_steps(a, step)


class ModelBasis:
    """The basis of a group of slots for all prompts. It belongs to the method and is no tensor of a cache."""

    def __init__(self, means: list[Tensor], scales: list[Tensor], vectors: Tensor):
        self.means, self.scales, self.vectors = means, scales, vectors
        """(C,) and () of each slot, and V (layers · C, layers · C), in the cache's dtype."""

    def to(self, device: torch.device) -> ModelBasis:
        """The same on another device."""
        means, scales = ([t.to(device) for t in of] for of in (self.means, self.scales))
        return ModelBasis(means, scales, self.vectors.to(device))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.means, *self.scales, self.vectors))


@dataclass(frozen=True)
class OnModelBasis(Code):
    """One slot's part of A Vᵀ with the columns of V that a sequence keeps, scaled and moved; the last tokens are
    exact."""

    components: Components
    """A, followed by a code of a number for each column of V: -1 for those that are kept."""
    basis: ModelBasis
    part: int
    """Which slot of the group."""
    rest: Tensor
    """(B, remaining tokens, C), exact."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        rows, streams, place = [], self.components.streams, self.components.place + 1
        v = self.basis.vectors.unflatten(0, (len(self.basis.means), -1))[self.part].float()
        for i, (a, _) in enumerate(self.components.decode()):
            kept = streams.numbers(i, place)[:, 0].to(v.device) != 0
            rows.append(
                (a @ v[:, kept].mT) * self.basis.scales[self.part].float() + self.basis.means[self.part].float()
            )
        return torch.cat((torch.stack(rows).to(self.rest.dtype), self.rest), dim=1).unflatten(-1, self.width)


@dataclass(frozen=True)
class Transformed(Code):
    """One slot's part of A Bᵀ, scaled and moved; the last tokens are exact."""

    components: Components
    place: int
    """Which code of the components' streams is B (C, r)."""
    scale: Tensor
    """(B,)."""
    mean: Tensor
    """(B, C)."""
    rest: Tensor
    """(B, remaining tokens, C), exact."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        rows = []
        for i, (a, steps) in enumerate(self.components.decode()):
            b = self.components.streams.numbers(i, self.place).to(a.device).float() * steps
            rows.append((a @ b.mT).mul_(self.scale[i].float()).add_(self.mean[i].float()))
        return torch.cat((torch.stack(rows).to(self.rest.dtype), self.rest), dim=1).unflatten(-1, self.width)


def basis_steps(a: Tensor, step: Tensor) -> Tensor:
    """(r,): the steps of the columns of B, for A (n, r) as it is decoded and its step.

    With the steps Δ of A and Δ_j of column j of B, a number of A adds Δ²/12 to the squared error, and one of B adds
    Σ_t A_tj² Δ_j² / 12. Bits are spent best where all numbers add the same, so Δ_j = Δ / ‖A_j‖.
    """
    return step.float() / a.double().norm(dim=0).clamp(min=1e-30).float()


@dataclass
class _Group:
    """A group of slots while it is coded."""

    tensors: SlotTensors
    slots: list[int]
    """Indices into `tensors.slots`."""
    means: list[Tensor]
    scales: list[Tensor]
    projected: Tensor
    """X V (B, n, r) fp32."""
    vectors: Tensor
    """V (B, layers · C, r) fp32."""
    energies: Tensor
    """‖X v_j‖² (B, r) fp64."""
    basis: ModelBasis | None = None
    """Whose vectors V are, if they are not stored."""

    @property
    def channels(self) -> int:
        """Numbers of a column of V that are stored."""
        return self.vectors.shape[1] if self.basis is None else 0

    @property
    def codes(self) -> int:
        """Codes of a sequence: A, and the parts of V or which of its columns are kept."""
        return 1 + len(self.slots) if self.basis is None else 2


@register(
    "kvtc", summary="entropy-coded principal components across slots, for prefixes at rest", sweep=("kvtc:ratio=8",)
)
class KVTC(Factorising):
    """KVTC: for a group of slots, separately for keys before RoPE and for values,

        X = [(X_l - m_l) / s_l]_l ≈ A Bᵀ,    A = X V,    B = V

    with the channels' means m_l, the slot's root mean square s_l and the eigenvectors V of XᵀX. A and B are rounded to
    multiples of steps and entropy-coded (`entropy.py`). One step Δ for all A of a sequence, keys and values, allocates
    bits best for the squared error (reverse water-filling): a column of energy n σ² takes about ½ log2(1 + 2πe σ²/Δ²)
    bits a number, and is dropped if its gain does not pay for its column of B. Δ is the smallest at which the entire
    compressed cache has at most 1/ratio of the bytes of the uncompressed one, as coded. This holds for every sequence
    of a batch, whose step does not depend on the others: the codes of a sequence are stored one after the other, and
    padded together to the longest sequence.

    `basis=calibration` is the paper's: m, s and V come from calibration tokens, once for a model. A prompt stores
    nothing of them but which columns of V it keeps. V is complete, so nothing of a prompt is outside of it. By
    default V belongs to the prompt. Entropy-coded steps of one size take the place of the paper's bits, which dynamic
    programming chooses.

    Made for storage (`cllm.PrefixStore`, `at_rest`): every pass over a compressed cache decodes it again.
    """

    keys_before_rope: ClassVar[bool] = True
    no_every: ClassVar[str | None] = (
        "kvtc codes prefixes at rest: one entropy-coded stream, with one step for all of its numbers; recompress codes "
        "all tokens again"
    )

    ratio: float = Field(8, gt=1)
    """Bytes of the uncompressed cache over bytes of the compressed one, at this length. Windows, states, sinks and
    recent tokens count."""
    group: int = Field(4, ge=1)
    """Neighbouring slots with common components; the last group may be smaller."""
    recent: int = Field(0, ge=0)
    """Last tokens that stay exact; 128 in the paper."""
    basis: Literal["prompt", "calibration"] = "prompt"
    """Fit the components to each prompt, with which they are stored, or once to calibration tokens."""

    _bases: dict[tuple[str, tuple[int, ...]], ModelBasis] = PrivateAttr(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        return self.basis == "calibration"

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        self._bases = {}
        if not self.calibrates:
            return
        check_tokens(self.name, ids, self.sinks)
        cache = engine.new_cache()
        engine.hidden(ids, cache)
        cached = engine.compressible(cache)
        with naming(self.name):
            sinks = cached.sinks(self.sinks)
        for keys, values in cached.tensors(before_rope=True, sinks=sinks):
            for tensors in (keys,) if values is None else (keys, values):
                for slots in tensors.groups(self.group):
                    self._bases[_place(tensors, slots)] = self._calibrate(tensors, slots)

    def _calibrate(self, tensors: SlotTensors, slots: list[int]) -> ModelBasis:
        """The basis of a group of slots, from all tokens of all sequences as one."""
        means, scales, rows = [], [], []
        for i in slots:
            x = tensors.flat(i).flatten(0, 1)
            means.append(x.mean(0).to(tensors.dtype))
            x = x - means[-1].float()
            scales.append(x.square().mean().sqrt().clamp(min=1e-6).to(tensors.dtype))
            rows.append(x / scales[-1].float())
        joined = torch.cat(rows, dim=-1).double()
        self.note_solver(SOLVER)
        vectors = torch.linalg.eigh(joined.mT @ joined)[1].flip(-1)
        return ModelBasis(means, scales, vectors.to(tensors.dtype).contiguous())

    def weight_bytes(self) -> int:
        return sum(basis.nbytes() for basis in self._bases.values())

    def check_all_sinks(self, tokens: int) -> None:
        check_all_sinks(self.name, self.ratio, self.sinks, tokens, allowed="")

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        tokens = keys.data[0].shape[1] - self.recent
        if tokens < 2:
            raise UserError(
                f"{self.name}: {keys.data[0].shape[1]} tokens without sinks, of which recent={self.recent} stay exact; "
                f"allowed: {self.recent + 2} tokens or more"
            )
        kinds = [keys] if values is None else [keys, values]
        groups = [self._transform(tensors, slots, tokens) for tensors in kinds for slots in tensors.groups(self.group)]
        budget = self._budget(keys, groups)
        device, size = keys.data[0].device, len(keys.slots)
        fitted = [self._fit(groups, row, budget) for row in range(len(keys.data[0]))]
        step = torch.stack([step for step, _ in fitted]).to(device)
        streams, place = Streams.of([codes for _, codes in fitted], device), 0
        codes: dict[str, Codes] = {"k": [None] * size, "v": [None] * size}
        for group in groups:
            components = Components(streams, place, step)
            for n, i in enumerate(group.slots):
                x = group.tensors.data[i]
                rest, width = x[:, tokens:].flatten(2).to(keys.dtype, copy=True).contiguous(), tuple(x.shape[2:])
                codes[group.tensors.kind][i] = (
                    Transformed(components, place + 1 + n, group.scales[n], group.means[n], rest, width)
                    if group.basis is None
                    else OnModelBasis(components, group.basis, n, rest, width)
                )
            place += group.codes
        return codes["k"], codes["v"]

    def _transform(self, tensors: SlotTensors, slots: list[int], tokens: int) -> _Group:
        return (
            self._on_model_basis(tensors, slots, tokens) if self.calibrates else self._fit_basis(tensors, slots, tokens)
        )

    def _on_model_basis(self, tensors: SlotTensors, slots: list[int], tokens: int) -> _Group:
        known = self._bases.get(_place(tensors, slots))
        if known is None or len(known.vectors) != sum(tensors.data[i][0, 0].numel() for i in slots):
            raise UserError(
                f"{self.name}: basis=calibration is not calibrated for slot {tensors.slots[slots[0]]}: call "
                "prepare(engine, ids) first"
            )
        device = tensors.data[slots[0]].device
        basis = known.to(device)
        rows = [
            (tensors.flat(i, padding="repeat")[:, :tokens] - mean.float()) / scale.float()
            for i, mean, scale in zip(slots, basis.means, basis.scales, strict=True)
        ]
        projected = torch.cat(rows, dim=-1) @ basis.vectors.float()
        projected = projected if tensors.is_text is None else projected * tensors.is_text[:, :tokens, None]
        vectors = basis.vectors.expand(len(projected), -1, -1)
        energies = projected.double().square().sum(1)
        return _Group(tensors, slots, [], [], projected, vectors, energies, basis)

    def _fit_basis(self, tensors: SlotTensors, slots: list[int], tokens: int) -> _Group:
        dtype, rows, means, scales = tensors.dtype, [], [], []
        text = None if tensors.is_text is None else tensors.is_text[:, :tokens, None]
        for i in slots:
            x = tensors.flat(i)[:, :tokens]
            count = torch.full_like(x[:, 0, :1], tokens) if text is None else text.sum(1).clamp(min=1)
            means.append((x.sum(1) / count).to(dtype))
            x = x - means[-1].float()[:, None]
            x = x if text is None else x * text
            size = (x.square().sum((1, 2)) / (x.shape[2] * count[:, 0])).sqrt()
            scales.append(size.clamp(min=1e-6).to(dtype))
            rows.append(x / scales[-1].float()[:, None, None])
        joined = torch.cat(rows, dim=-1)
        vectors, _ = self.singular_vectors(joined, None, SOLVER)
        vectors = vectors[..., : min(joined.shape[1:])]
        projected = joined @ vectors
        return _Group(tensors, slots, means, scales, projected, vectors, projected.double().square().sum(1))

    def _budget(self, keys: SlotTensors, groups: Sequence[_Group]) -> float:
        """Bytes that the codes of one sequence may have, without their sizes."""
        size = keys.dtype.itemsize
        tensors = [group.tensors.data[i].flatten(2) for group in groups for i in group.slots]
        total = keys.uncompressed_elements or sum(x.shape[1] * x.shape[2] for x in tensors)
        fixed = keys.incompressible_elements + sum(self.recent * x.shape[2] for x in tensors) + 1
        fixed += sum(x.shape[2] + 1 for x in tensors) * (not self.calibrates)  # means and scales
        fixed += sum(group.codes for group in groups) * SIZE_BYTES / size
        what = "(windows, states, RoPE keys of latents, sinks, recent tokens) or are means"
        return elements_left(self.name, self.ratio, keys, total, fixed, what) * size

    def _fit(self, groups: Sequence[_Group], row: int, budget: float) -> tuple[Tensor, list[bytes]]:
        """The smallest step of sequence `row` at which all codes fit `budget`, and the codes of A and the Bs of every
        group."""
        dtype, estimate, fits, exceeds = groups[0].tensors.dtype, budget, 0.0, math.inf
        best: tuple[int, Tensor, list[bytes]] | None = None
        for n in range(_TRIES):
            estimate = 0.0 if n == _TRIES - 1 and best is None else estimate
            step = torch.tensor(_step(groups, row, estimate), dtype=torch.float64).to(dtype)
            streams = [code for group in groups for code in _code(group, row, step)]
            size = sum(map(len, streams))
            if size <= budget and (best is None or size > best[0]):
                best = size, step, streams
            if 0.98 * budget < size <= budget:
                break
            fits, exceeds = (max(fits, estimate), exceeds) if size <= budget else (fits, min(exceeds, estimate))
            estimate += 0.997 * budget - size  # what headers and widths take stays about the same
            if not fits < estimate < exceeds:
                estimate = (fits + exceeds) / 2
        if best is not None:
            return best[1:]
        raise UserError(
            f"{self.name}: ratio={self.ratio:g}: {groups[0].tensors.tokens} tokens do not fit even without components; "
            "allowed: a lower ratio, or more tokens"
        )


def _place(tensors: SlotTensors, slots: list[int]) -> tuple[str, tuple[int, ...]]:
    return tensors.kind, tuple(tensors.slots[i] for i in slots)


def _kept(energy: Tensor, tokens: int, channels: int | Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Which columns (r,) of groups of `channels` are kept at a step, and the estimated bits of each.

    Args:
        energy: ‖X v_j‖² of each column, fp64.
        tokens: numbers of a column of A.
        channels: stored numbers of a column of B, one number or (r,).
        step: Δ.
    """
    square = energy / tokens / step**2  # of a number of A, in steps
    of_b = energy / torch.as_tensor(channels).clamp(min=1) / step**2  # of a number of B, in its own steps
    bits = (tokens * (1 + 17.08 * square).log2() + channels * (1 + 17.08 * of_b).log2()) / 2
    # A bit is worth 2 ln 2 Δ²/12 of squared error. Kept numbers of A and of B add about Δ²/12 each.
    error = (tokens * 12 * square / (12 * square + 1) + channels) / 12
    return energy / step**2 - error > math.log(2) / 6 * bits, bits


def _step(groups: Sequence[_Group], row: int, budget: float) -> float:
    """The smallest step at which the streams are estimated to have at most `budget` bytes."""
    energy = torch.cat([group.energies[row] for group in groups])
    channels = torch.cat([torch.full_like(group.energies[row], group.channels) for group in groups])
    low, high = -30.0, 10 + math.log(float(energy.max()) + 1)
    for _ in range(40):
        middle = (low + high) / 2
        keep, bits = _kept(energy, groups[0].projected.shape[1], channels, math.exp(middle))
        low, high = (low, middle) if float((bits * keep).sum()) / 8 <= budget else (middle, high)
    return math.exp(high)


def _code(group: _Group, row: int, step: Tensor) -> list[bytes]:
    """The codes of a sequence: of A, and of every slot's B or of the columns that are kept."""
    keep, _ = _kept(group.energies[row], group.projected.shape[1], group.channels, float(step))
    numbers = (group.projected[row][:, keep] / step.float()).round().to(torch.int32)
    used = (numbers != 0).any(0)
    if group.basis is not None:
        columns = torch.zeros(len(keep), 1, dtype=torch.int32, device=keep.device)
        columns[keep.nonzero()[used]] = -1  # has the shortest code
        return [compress(numbers[:, used]), compress(columns)]
    numbers, b = numbers[:, used], group.vectors[row][:, keep][:, used]
    b = (b / basis_steps(numbers.float() * step.float(), step)).round().to(torch.int32)
    return [compress(numbers), *(compress(part) for part in b.chunk(len(group.slots)))]
