"""Codes whose width differs between heads: more bits where they save the most error in attention's output.

A unit is the keys, or the values, of one KV head of one slot. With codes x' of b bits its error is the sum over tokens

    E_u(b) = Σ_j w_j (x'_j - x_j)ᵀ M_u (x'_j - x_j)

with the forms M and the weights of tokens w of `weighting.py`. x' is decoded from real codes, in every width that the
method has.

**Keys against values.** E_u compares keys with keys and values with values. It is wrong between the two, because the
errors of few bits are neither small nor independent: codes shorten values, and these errors add up over tokens, while
attention with wrong scores changes by less than in proportion. So the sums of both kinds are measured. If all keys have
b0 bits, the largest width up to mean_bits, the outputs of attention for the prompt's last queries change by C_k, and if
all values have, by C_v (`ErrorWeights.output_changes`). Then

    E_u(b) of keys is multiplied by C_k / Σ_u E_u(b0), the sum over all units of keys, and values likewise.

**Choice.** Widths are those for which

    Σ_u E_u(b_u) is least,    Σ_u N_u b_u ≤ mean_bits Σ_u N_u

for N_u numbers, and no keys have fewer than b0 bits. Scales and lengths do not depend on the width, so this budget is
one of bytes. Keys start with b0 bits, values with the smallest width. Then the step that saves the most for its bits is
taken, of all units, until the next one exceeds the budget. A unit's steps are those on the lower convex hull of its
errors, so they save less and less for their bits, and no other choice that takes as many bits has a smaller sum
(Everett, 1963).

**Why keys keep b0 bits.** Wrong keys send the attention of later queries to other tokens. E_u shows that only for
queries like the prompt's own last ones. A head that these hardly use would lose bits that later queries need.

Shapes: B batch, n tokens, G KV heads, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from cllm.posthoc.code import Code, Codes, Rotation
from cllm.posthoc.grown import join_all
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.weighted import Weighted
from cllm.posthoc.weighting import ErrorWeights, Weights, row_weights


@dataclass(frozen=True)
class HeadCodes(Code):
    """The codes of one slot's tensor (B, n, G, D): a part for each width, of the heads that have it."""

    parts: tuple[Code, ...]
    """(B, n, heads of the part, D) each."""
    heads: tuple[tuple[int, ...], ...]
    """The heads of each part."""
    bits: tuple[int, ...]
    """The width of each part."""

    def decode(self) -> Tensor:
        of_head: dict[int, Tensor] = {}
        for part, heads in zip(self.parts, self.heads, strict=True):
            of_head |= dict(zip(heads, part.decode().unbind(2), strict=True))
        return torch.stack([of_head[head] for head in sorted(of_head)], dim=2)


@dataclass(frozen=True)
class _Part:
    """The heads of one width, of all slots that have such heads."""

    bits: int
    members: list[int]
    """Indices into the slots."""
    tensors: SlotTensors
    """(B, n, heads, D) each."""


class HeadBits(Weighted):
    """A quantiser that can give each head its own width. Heads are coded independently of each other."""

    widths: ClassVar[tuple[int, ...]]
    """Bits that a number can have, ascending."""
    no_mean_bits: ClassVar[str | None] = None
    """Why heads cannot have their own widths; None: they can."""

    mean_bits: float | None = Field(None, ge=1, le=8)
    """Mean bits of a number. The keys and the values of every KV head of every slot get their own width, where it saves
    the most error in attention's output by the prompt's own queries (`head_bits.py`); null: `bits` for all."""

    _bits: dict[str, list[list[int]]] = PrivateAttr(default_factory=dict)
    """The widths of the last cache, of `k` and `v`: of each slot and head."""

    @abstractmethod
    def code_slots(self, tensors: SlotTensors, bits: int | None = None) -> Codes:
        """The codes of keys, latents or values, as `tensors.kind` says, in `bits` bits; None: in the method's own."""

    def extend_slots(self, tensors: SlotTensors, codes: Sequence[Code], bits: int | None = None) -> Codes:
        """`codes` of `code_slots` with those of later tokens behind them."""
        return join_all(codes, self.code_slots(tensors, bits))

    @model_validator(mode="after")
    def _check_mean_bits(self) -> Self:
        if self.mean_bits is None:
            return self
        if self.no_mean_bits is not None:
            raise ValueError(f"mean_bits={self.mean_bits:g}: {self.no_mean_bits}; allowed: leave it out")
        if given := sorted({"bits", "bits_v"} & self.model_fields_set):
            raise ValueError(
                f"mean_bits={self.mean_bits:g} chooses the bits of every head, and {given[0]} is given too; allowed: "
                "one of the two"
            )
        return self

    @property
    def weighting(self) -> str | None:
        return None if self.mean_bits is None else f"mean_bits={self.mean_bits:g}"

    @property
    def unweighted(self) -> str:
        return "bits"

    @property
    def chooses_for_batch(self) -> bool:
        return self.mean_bits is not None

    @property
    def _equal_width(self) -> int:
        """The largest width that all heads can have within `mean_bits`: b0."""
        assert self.mean_bits is not None
        return max(bits for bits in self.widths if bits <= self.mean_bits)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if self.mean_bits is None:
            return self.code_slots(keys), [None] * len(keys.slots) if values is None else self.code_slots(values)
        weights = self.error_weights(keys if keys.rope is None else keys.before_rope(), values)
        assert values is not None
        errors = [head for slot in self.errors(weights, keys, values) for head in slot.tolist()]
        numbers, least = list[int](), list[int]()
        for tensors, width in ((keys, self._equal_width), (values, self.widths[0])):
            for x in tensors.data:
                numbers += [x.shape[3]] * x.shape[2]
                least += [width] * x.shape[2]
        if any(any(of) for of in errors):
            bits = choose_bits(errors, numbers, self.widths, self.mean_bits, least)
        else:  # the prompt is too short to be coded, so nothing is known about later tokens
            bits = [self._equal_width] * len(errors)
        chosen = iter(bits)
        k, v = ([[next(chosen) for _ in range(x.shape[2])] for x in tensors.data] for tensors in (keys, values))
        self._bits = {"k": k, "v": v}
        return self._code_heads(keys, k), self._code_heads(values, v)

    def facts(self) -> dict[str, Any]:
        return {"bits": self._bits} if self._bits else {}

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """Later tokens are coded in the widths that the heads have."""
        extend = self.extend_slots if self.mean_bits is None else self._extend_heads
        return extend(keys, codes[0]), [None] * len(keys.slots) if values is None else extend(values, codes[1])

    def errors(self, weights: ErrorWeights, keys: SlotTensors, values: SlotTensors) -> list[Tensor]:
        """(G, widths) fp64 for the keys of each slot, then for its values: E_u(b), the mean over sequences.

        Args:
            weights: of keys before RoPE, and of values.
            keys: after RoPE.
            values: of the same slots.
        """
        bits = self._equal_width
        first = self.widths.index(bits)
        k, v = (self.code_slots(of, bits) for of in (keys, values))
        kinds = (
            self._weighted_errors(keys, weights.of_keys(), keys.rotations(), {bits: k}),
            self._weighted_errors(values, weights.of_values(), {}, {bits: v}),
        )
        codes_k, codes_v = (
            {j: code for j, code in zip(of.slots, codes, strict=True) if code} for of, codes in ((keys, k), (values, v))
        )
        found: list[Tensor] = []
        for errors, change in zip(kinds, weights.output_changes(codes_k, codes_v), strict=True):
            total = sum(float(of_slot[:, first].sum()) for of_slot in errors)
            found += [of_slot * change / max(total, 1e-300) for of_slot in errors]
        return found

    def _weighted_errors(
        self,
        tensors: SlotTensors,
        weights: dict[int, Weights],
        rotations: dict[int, Rotation],
        known: dict[int, Codes],
    ) -> list[Tensor]:
        """See `errors`, of one kind and not scaled; `rotations` by slot, for keys; `known`: codes by their width."""
        found = [torch.zeros(x.shape[2], len(self.widths), dtype=torch.float64) for x in tensors.data]
        for n, bits in enumerate(self.widths):
            for i, code in enumerate(known.get(bits) or self.code_slots(tensors, bits)):
                assert code is not None
                slot, exact = tensors.slots[i], tensors.data[i]
                error = code.decode().float() - exact.float()
                if slot in rotations:
                    error = rotations[slot].undo(error)
                rows = tensors.without_padding(error.flatten(2), "zero")
                rows = weights[slot].weigh(rows) * row_weights([weights[slot]])
                found[i][:, n] = rows.unflatten(2, exact.shape[2:]).double().square().sum((1, 3)).mean(0).cpu()
        return found

    def _code_heads(self, tensors: SlotTensors, bits: list[list[int]]) -> Codes:
        """The codes of all slots, for the width of every head of every slot."""
        parts = [{b: tuple(h for h, own in enumerate(of) if own == b) for b in sorted(set(of))} for of in bits]
        codes: list[dict[int, Code]] = [{} for _ in parts]
        for part in _parts(tensors, parts):
            for i, code in zip(part.members, self.code_slots(part.tensors, part.bits), strict=True):
                assert code is not None
                codes[i][part.bits] = code
        found = zip(codes, parts, strict=True)
        return [HeadCodes(tuple(of[b] for b in heads), tuple(heads.values()), tuple(heads)) for of, heads in found]

    def _extend_heads(self, tensors: SlotTensors, codes: Sequence[Code]) -> Codes:
        before = [code for code in codes if isinstance(code, HeadCodes)]
        assert len(before) == len(codes)
        new: list[dict[int, Code]] = [dict(zip(code.bits, code.parts, strict=True)) for code in before]
        for part in _parts(tensors, [dict(zip(code.bits, code.heads, strict=True)) for code in before]):
            extended = self.extend_slots(part.tensors, [new[i][part.bits] for i in part.members], part.bits)
            for i, code in zip(part.members, extended, strict=True):
                assert code is not None
                new[i][part.bits] = code
        return [dataclasses.replace(code, parts=tuple(of.values())) for code, of in zip(before, new, strict=True)]


def _parts(tensors: SlotTensors, heads: Sequence[dict[int, tuple[int, ...]]]) -> Iterator[_Part]:
    """The heads of each width, from the heads of each width of each slot."""
    for bits in sorted({b for of in heads for b in of}):
        members = [i for i, of in enumerate(heads) if bits in of]
        slots, data = tuple(tensors.slots[i] for i in members), [tensors.data[i][:, :, heads[i][bits]] for i in members]
        part = dataclasses.replace(tensors, slots=slots, data=tuple(data), cached=())
        yield _Part(bits, members, part)


def choose_bits(
    errors: Sequence[Sequence[float]],
    numbers: Sequence[int],
    widths: Sequence[int],
    mean_bits: float,
    least: Sequence[int],
) -> list[int]:
    """The width of every unit.

    Args:
        errors: of every unit in each of `widths`.
        numbers: of every unit; a common factor does not matter.
        widths: ascending.
        mean_bits: of all numbers, at most.
        least: the smallest width that each unit may have; their mean over numbers is at most `mean_bits`.
    """
    steps: list[tuple[float, int, int]] = []  # what a step saves for each bit, its unit, and the index of its width
    for unit, (of, count, smallest) in enumerate(zip(errors, numbers, least, strict=True)):
        at = widths.index(smallest)
        while at < len(widths) - 1:
            slope, to = max(((of[at] - of[i]) / (widths[i] - widths[at]), i) for i in range(at + 1, len(widths)))
            if slope <= 0:
                break
            steps.append((slope / count, unit, to))
            at = to
    chosen = list(least)
    left = mean_bits * sum(numbers) - sum(n * bits for n, bits in zip(numbers, least, strict=True))
    for _, unit, to in sorted(steps, key=lambda step: -step[0]):
        left -= numbers[unit] * (widths[to] - chosen[unit])
        if left < 0:
            break
        chosen[unit] = widths[to]
    return chosen
