"""KVQuant (arXiv 2401.18079): keys before RoPE per channel, values per token, levels that follow the numbers, outliers
kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.bit_planes import pack_codes, unpack_codes
from cllm.posthoc.code import Code, Codes, smallest_scale, unstack
from cllm.posthoc.grown import first_of, join_all
from cllm.posthoc.method import Compressor, Engine, naming
from cllm.posthoc.projecting import FISHER_TOKENS, KINDS, Place, check_tokens
from cllm.posthoc.registry import register
from cllm.posthoc.sensitivity import sensitivities
from cllm.posthoc.slots import SlotTensors

_BINS = 2048
"""Bins of [-1, 1] in which numbers are counted to fit the levels."""


@dataclass(frozen=True)
class DenseAndSparse(Code):
    """m vectors of L numbers: codes of all, and exact outliers in their place. All parameters are the slot's."""

    packed: Tensor
    """uint8 (B, bytes)."""
    middle: Tensor
    """(B, m): the middle of a vector's range, without its outliers."""
    half: Tensor
    """(B, m): half of the range."""
    levels: Tensor
    """(B, 2^bits), ascending, in [-1, 1]."""
    index: Tensor
    """(B, m, k) uint8, int16 or int32: positions of the outliers in a vector."""
    outliers: Tensor
    """(B, m, k), exact."""
    bits: int
    size: int
    """L."""
    per_channel: bool
    """Whether a vector is a channel of all tokens; else, a token of all channels."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        batch, count = self.middle.shape
        codes = unpack_codes(self.packed, self.bits, count * self.size)
        unit = self.levels.float().gather(1, codes.long()).view(batch, count, self.size)
        x = unit * self.half.float()[..., None] + self.middle.float()[..., None]
        x = x.to(self.middle.dtype).scatter(2, self.index.long(), self.outliers)
        return (x.mT if self.per_channel else x).contiguous().unflatten(-1, self.width)


@dataclass(frozen=True)
class _Split:
    """Where the outliers of m vectors (B, m, L) of a slot are, and the range of the other numbers."""

    index: Tensor
    """(B, m, k): positions of the outliers."""
    middle: Tensor
    """(B, m), in the cache's dtype, as `half`."""
    half: Tensor

    def unit(self, x: Tensor) -> Tensor:
        """The vectors `x` (B, m, L) fp32 scaled to [-1, 1]."""
        return ((x - self.middle.float()[..., None]) / self.half.float()[..., None]).clamp(-1, 1)


@register(
    "kvquant",
    summary="keys before RoPE per channel and values per token, fitted levels, outliers exact",
    sweep=("kvquant:bits=4", "kvquant:bits=2"),
)
class KVQuant(Compressor):
    """KVQuant: every vector, a channel of keys before RoPE or a token's values, is stored as

        x_i ≈ m + h L[q_i]

    m ± h is the range of the vector without its outliers. L are 2^b levels, one table for the keys of a slot and one
    for its values: the means of 1-dimensional k-means over all (x - m) / h, or 2^b equal steps. The share `outliers` of
    a vector's numbers, those farthest from its median, is stored exactly, with positions.

    The paper's levels are computed once from a calibration text, as the minimum of

        Σ_i F_ii (x_i - x_i')²,    F_ii = (∂loss / ∂x_i)²

    which is `levels=fisher`: k-means over (x - m) / h with the weights F_ii h². (The authors' code leaves h² out.) By
    default levels come from the prompt, without weights. Ranges come from the prompt in both cases, where the paper
    calibrates those of keys. Q-Norm is left out.
    """

    keys_before_rope: ClassVar[bool] = True

    bits: int = Field(4, ge=1, le=8)
    """Bits of a code."""
    bits_v: int | None = Field(None, ge=1, le=8)
    """`bits` for values; null: the same."""
    levels: Literal["kmeans", "uniform", "fisher"] = "kmeans"
    """L: `fisher`, the paper's, weighted by the gradients of the loss on calibration tokens; `kmeans`: of the prompt,
    without weights; `uniform`: coarser for most numbers and finer for the large ones."""
    outliers: float = Field(0.01, ge=0, lt=0.5)
    """Share of the numbers of every vector that are stored exactly."""

    _tables: dict[Place, Tensor] = PrivateAttr(default_factory=dict)
    """The levels (2^bits,) of `levels=fisher`, by slot and kind."""

    @property
    def calibrates(self) -> bool:
        return self.levels == "fisher"

    def prepare(self, engine: Engine, ids: Tensor) -> None:
        self._tables = {}
        if not self.calibrates:
            return
        check_tokens(self.name, ids, self.sinks)
        counts: dict[Place, Tensor] = {}
        with naming(self.name):
            for piece in sensitivities(engine, ids, "levels=fisher"):
                for (slot, kind), found in piece.items():
                    x, gradient = (t[:, self.sinks :].float() for t in (found.x, found.gradient))
                    if x.shape[1]:
                        of_piece = self._weighted_counts(SlotTensors(kind, (slot,), (x,), found.x.dtype), gradient)
                        counts[slot, kind] = counts.get((slot, kind), 0) + of_piece
        if not counts:
            raise UserError(
                f"{self.name}: levels=fisher takes pieces of {FISHER_TOKENS} tokens, all of them sinks; "
                "allowed: fewer sinks"
            )
        for kind, bits in zip(KINDS, (self.bits, self._bits_v), strict=True):
            places = [place for place in counts if place[1] == kind]
            self._tables |= zip(places, levels_of(torch.cat([counts[place] for place in places]), bits), strict=True)

    def _weighted_counts(self, tensors: SlotTensors, gradient: Tensor) -> Tensor:
        """(1, 2048) fp64: the weights F_ii h² of the numbers in each bin, for `gradient` (1, n, C) fp32."""
        x = _vectors(tensors)
        part, counted = self._split(tensors, x)
        weights = (gradient.mT if tensors.kind == "k" else gradient).double() * part.half.double()[..., None]
        return count_bins(part.unit(x), weights.square() * counted)

    @property
    def _bits_v(self) -> int:
        return self.bits if self.bits_v is None else self.bits_v

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        kinds = [(keys, self.bits), *([] if values is None else [(values, self._bits_v)])]
        tables = None
        if self.levels == "fisher":
            tables = [[self._table(tensors, i) for i in range(len(tensors.slots))] for tensors, _ in kinds]
        k, *v = self._code_all(kinds, tables)
        return k, v[0] if v else [None] * len(keys.slots)

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        if self.levels != "fisher":
            return super().absorb(keys, values, codes)
        assert values is not None
        blocks = self._code_all(
            [(keys, self.bits), (values, self._bits_v)], [[_levels_in(code) for code in of] for of in codes]
        )
        return join_all(codes[0], blocks[0]), join_all(codes[1], blocks[1])

    def _code_all(
        self, kinds: Sequence[tuple[SlotTensors, int]], tables: Sequence[Sequence[Tensor]] | None
    ) -> list[Codes]:
        """The codes of all slots of each of `kinds`, tensors and the bits of a number.

        Args:
            kinds: keys, and values if there are any.
            tables: the levels (B, 2^bits) of each slot of each kind if they are known; None: they are those of the
                tensors, and all fitted together.
        """
        parts, counts = list[_Split](), dict[int, list[Tensor]]()
        for tensors, bits in kinds:
            for _, stack in tensors.stacks():
                x = _vectors(stack)
                part, counted = self._split(stack, x)
                parts.append(part)
                if tables is None and self.levels == "kmeans":
                    counts.setdefault(bits, []).append(count_bins(part.unit(x), counted))
                del x, counted
        fitted = {bits: _fit_all(of, bits) for bits, of in counts.items()}
        left, codes = iter(parts), list[Codes]()
        for n, (tensors, bits) in enumerate(kinds):
            codes.append([])
            for members, stack in tensors.stacks():
                if tables is not None:
                    levels = torch.cat([tables[n][i] for i in members])
                else:
                    levels = next(fitted[bits]) if fitted else _equal_steps(stack, bits)
                codes[-1] += unstack(self._code(stack, next(left), levels, bits), len(members))
        return codes

    def _table(self, tensors: SlotTensors, i: int) -> Tensor:
        """(B, 2^bits) fp32: the calibrated levels of slot `i`."""
        place, x = (tensors.slots[i], tensors.kind), tensors.data[i]
        if place not in self._tables:
            raise UserError(
                f"{self.name}: levels=fisher is not calibrated for slot {place[0]}: call prepare(engine, ids) first"
            )
        return self._tables[place].to(x.device).repeat(len(x), 1)

    def _split(self, tensors: SlotTensors, x: Tensor) -> tuple[_Split, Tensor]:
        """The parts of the vectors `x` (B, m, L) of one slot; and (B, m, L) booleans, True for numbers that are neither
        outliers nor padding."""
        per_channel = tensors.kind == "k"
        counted = torch.ones_like(x, dtype=torch.bool)
        if tensors.is_text is not None:
            counted = counted & (tensors.is_text[:, None] if per_channel else tensors.is_text[..., None])
        count = round(self.outliers * x.shape[2])
        median = x.masked_fill(~counted, torch.nan).nanmedian(dim=2, keepdim=True).values
        distance = (x - median).abs().masked_fill(~counted, -1)
        own = torch.full_like(distance[:, :1, :1], count, dtype=torch.long)
        if per_channel and tensors.is_text is not None:
            # A padded sequence has fewer outliers. Its other entries point to padding, in the first columns.
            own = (self.outliers * tensors.is_text.sum(1).double()).round().long()[:, None, None]
        index, place = _farthest(distance, own, count), torch.arange(count, device=x.device)
        index = torch.where(place < own, index, place - own)
        # Tokens of padding, which have no range, are never read.
        dense = (counted | ~counted.any(2, keepdim=True)).scatter(2, index, False)
        low, high = x.masked_fill(~dense, torch.inf).amin(2), x.masked_fill(~dense, -torch.inf).amax(2)
        dtype = tensors.dtype
        middle = ((low + high) / 2).to(dtype)
        half = ((high - low) / 2).clamp(min=smallest_scale(dtype)).to(dtype)
        return _Split(index, middle, half), dense & counted

    def _code(self, tensors: SlotTensors, part: _Split, levels: Tensor, bits: int) -> DenseAndSparse:
        """The code of one slot with `levels` (B, 2^bits) fp32."""
        x, index, dtype = _vectors(tensors), part.index, tensors.dtype
        levels = levels.to(dtype)
        bounds = (levels.float()[:, 1:] + levels.float()[:, :-1]) / 2
        codes = torch.searchsorted(bounds, part.unit(x).flatten(1)).to(torch.uint8)
        return DenseAndSparse(
            pack_codes(codes, bits), part.middle, part.half, levels, index.to(_index_dtype(x.shape[2])),
            x.gather(2, index).to(dtype), bits, x.shape[2], tensors.kind == "k", tuple(tensors.data[0].shape[2:]),
        )  # fmt: skip


def _fit_all(counts: Sequence[Tensor], bits: int) -> Iterator[Tensor]:
    """The levels (B, 2^bits) fp32 for each of `counts` (B, 2048)."""
    return iter(levels_of(torch.cat(list(counts)), bits).split([len(of_stack) for of_stack in counts]))


def _vectors(tensors: SlotTensors) -> Tensor:
    """(B, m, L) fp32: the channels of the keys of one slot, or the tokens of its values."""
    rows = tensors.flat(0, padding="repeat")  # B, n, C
    return (rows.mT if tensors.kind == "k" else rows).contiguous()


def _equal_steps(tensors: SlotTensors, bits: int) -> Tensor:
    """The levels (B, 2^bits) fp32 of `levels=uniform`."""
    x = tensors.data[0]
    return torch.linspace(-1, 1, 2**bits, device=x.device).repeat(len(x), 1)


def _levels_in(code: Code) -> Tensor:
    """(B, 2^bits): the levels of the first tokens of a slot."""
    first = first_of(code)
    assert isinstance(first, DenseAndSparse)
    return first.levels


def _index_dtype(size: int) -> torch.dtype:
    return torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32


def count_bins(unit: Tensor, counted: Tensor) -> Tensor:
    """(B, 2048) fp64: how many of the `counted` numbers of `unit` (B, ...) in [-1, 1] are in each bin; `counted` can be
    weights."""
    bins = ((unit.flatten(1) + 1) * (_BINS / 2)).long().clamp(max=_BINS - 1)
    weights = torch.zeros(len(unit), _BINS, dtype=torch.float64, device=unit.device)
    return weights.scatter_add_(1, bins, counted.flatten(1).double())


def fit_levels(unit: Tensor, counted: Tensor, bits: int) -> Tensor:
    """The 2^bits levels (B, 2^bits) of k-means over the `counted` numbers of `unit` (B, ...) in [-1, 1], per sequence.

    Numbers are counted in 2048 bins first.
    """
    return levels_of(count_bins(unit, counted), bits)


def levels_of(weights: Tensor, bits: int) -> Tensor:
    """The levels (rows, 2^bits) fp32 of `fit_levels` for each row of `weights`, the counts (rows, 2048) of bins.

    The first levels are quantiles. A level without numbers keeps its place. Rows are independent: sequences of all
    slots are fitted together, because one of them is far too little work for a GPU.
    """
    rows, count = len(weights), 2**bits
    device = weights.device
    centres = (torch.arange(_BINS, dtype=torch.float64, device=device) + 0.5) * (2 / _BINS) - 1
    mass, moment = (torch.nn.functional.pad(w.cumsum(1), (1, 0)) for w in (weights, weights * centres))
    shares = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count * mass[:, -1:]
    levels = centres[torch.searchsorted(mass[:, 1:].contiguous(), shares).clamp(max=_BINS - 1)]
    ends = torch.tensor([[0], [_BINS]], device=device)
    for _ in range(50):
        inner = torch.searchsorted(centres, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        cells = torch.cat((ends[0].expand(rows, 1), inner, ends[1].expand(rows, 1)), dim=1)
        number, total = (t.gather(1, cells).diff(dim=1) for t in (mass, moment))
        levels = torch.where(number > 0, total / number.clamp(min=1e-30), levels)
    return levels.float()


def _farthest(distance: Tensor, own: Tensor, count: int) -> Tensor:
    """(..., count): the places of the `own` largest distances (..., n) of each row, then others.

    Of equal ones the first are taken, so that padding before them changes nothing; torch's topk takes any.
    """
    if count == 0:
        return distance.new_empty((*distance.shape[:-1], 0), dtype=torch.long)
    largest = distance.topk(count, dim=-1).values
    last = largest.gather(-1, (own - 1).clamp(min=0).expand(*largest.shape[:-1], 1))
    above, equal = distance > last, distance == last
    taken = above | (equal & (equal.cumsum(-1) <= own - above.sum(-1, keepdim=True)))
    return taken.to(torch.uint8).topk(count, dim=-1).indices
