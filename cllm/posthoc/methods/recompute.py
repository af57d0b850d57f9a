"""Keys and values rebuilt from the residual stream: its input to the projections is cached, or a low rank of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.budget import check_all_sinks, elements_for_ratio
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.inputs import RecordedInputs
from cllm.posthoc.key_norm import KeyNorm
from cllm.posthoc.later_rows import rows_on
from cllm.posthoc.lowrank import LowRank, ranks_for_budget
from cllm.posthoc.method import Codable, Engine
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors, together


class Projection:
    """A weight of the model (width, d_model), which does not count as a cache's tensor, and its bias or None; for keys
    also the norm after it, or None."""

    def __init__(self, linear: nn.Linear, norm: KeyNorm | None = None):
        self.weight, self.norm = linear.weight.detach(), norm
        self.bias = None if linear.bias is None else linear.bias.detach()


@dataclass(frozen=True)
class Recomputed(Code):
    """W x + b, or its norm, of a stored x."""

    x: Code
    """(B, n, d_model): the input of the projections, which keys and values share."""
    projection: Projection
    dtype: torch.dtype
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        weight, bias = self.projection.weight, self.projection.bias
        x = self.x.decode()
        y = F.linear(x.to(weight.dtype), weight, bias)
        y = y if self.projection.norm is None else self.projection.norm(y)
        return y.to(self.dtype).unflatten(-1, self.width)

    @property
    def has_factors(self) -> bool:
        return self.projection.bias is None and self.projection.norm is None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if not self.has_factors:
            return None
        x = self.x.decode()
        return x, self.projection.weight.to(x.dtype).expand(len(x), -1, -1)

    def read_flops(self) -> int:
        return 2 * self.x.decode().numel() * math.prod(self.width)


@register("recompute", summary="the input of a slot's projections, from which keys and values are computed when read")
class Recompute(Factorising, Codable):
    """Keys and values are computed from the residual stream when they are read: with the input x of the projections,
    which is the stream after the layer's norm,

        cached: x (d_model numbers),    read: K = RoPE(W_K x + b_K), V = W_V x + b_V

    with the norm of keys (`qk_norm`) between W_K x + b_K and RoPE, if the model has one.

    This loses nothing, and for multi-head attention, where keys and values have 2 · d_model numbers, it halves the
    bytes (compare KV-Direct, arXiv 2603.19664). It costs 2 · d_model · 2 · width operations for a token and a read,
    reported as `read_flops_per_token`.

    With a rank, x is replaced by r numbers. `fit=kv` takes those that keep keys and values best, each relative to its
    own size: by Eckart and Young, the joint singular value decomposition of both, [K, V] ≈ A [B_K, B_V]. `fit=input`
    takes the principal components of x, x ≈ A Bᵀ, and B_K = W_K B. Products with B are folded into the weights then.
    """

    keys_before_rope: ClassVar[bool] = True
    no_recompress: ClassVar[str | None] = "the inputs of later tokens are not recorded"

    rank: int | None = Field(None, ge=1)
    """Numbers for each token of a group of slots; null: x itself, or as `ratio` needs."""
    ratio: float | None = Field(None, gt=1)
    """Bytes of the uncompressed cache over bytes of the compressed one, at this length and before a quantiser after +;
    `rank` is chosen so."""
    fit: Literal["kv", "input"] = "kv"
    """The numbers kept with a rank: those that keep keys and values best, or the principal components of x."""
    group: int = Field(1, ge=1)
    """Neighbouring slots whose x are approximated together; the last group may be smaller."""

    _inputs: RecordedInputs = PrivateAttr(default_factory=RecordedInputs)
    _projections: dict[int, tuple[Projection, Projection]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _low_rank(self) -> Self:
        if self.rank is not None and self.ratio is not None:
            raise ValueError("give at most one of rank and ratio")
        if not self.is_low_rank and (alone := sorted({"fit", "group"} & self.model_fields_set)):
            raise ValueError(f"{alone[0]} goes with rank or ratio")
        return self

    @property
    def is_low_rank(self) -> bool:
        """Whether x is approximated."""
        return self.rank is not None or self.ratio is not None

    @property
    def adapts_solver(self) -> bool:
        return self.is_low_rank

    @property
    def watches(self) -> bool:
        return not self.is_low_rank or self.fit == "input"

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Record the inputs of the projections while the cache is filled, if they are needed."""
        if not self.watches:
            yield
            return
        self._inputs, self._projections = RecordedInputs(), {}
        for slot in engine.slots():
            try:
                (k, v), norm = engine.projections(slot), engine.key_norm(slot)
            except UserError as error:
                raise UserError(f"{self.name}: keys and values cannot be computed from the stream: {error}") from None
            if norm is not None:
                self._check_norm(slot)
            self._projections[slot] = Projection(k, norm), Projection(v)
        with self._inputs.record(engine):
            yield

    def _check_norm(self, slot: int) -> None:
        """Raise `UserError` if the options need keys of `slot` that are linear in x, which normalised ones are not."""
        normalised = f"slot {slot}: its keys are normalised (qk_norm)"
        if self.is_low_rank:
            raise UserError(f"{self.name}: fit=input: {normalised}, so they are no product of x; allowed: fit=kv")
        if self.every is not None:
            raise UserError(
                f"{self.name}: every={self.every}: {normalised}, so least squares cannot find the inputs of later "
                "tokens; allowed: without every, or with rank or ratio"
            )

    def release(self) -> None:
        self._inputs = RecordedInputs()

    def check_all_sinks(self, tokens: int) -> None:
        check_all_sinks(self.name, self.ratio, self.sinks, tokens)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise UserError(
                f"{self.name}: the slots are latents, which keys are computed from; allowed: keys and values"
            )
        codes: tuple[Codes, Codes] = ([None] * len(keys.slots), [None] * len(keys.slots))
        if not self.is_low_rank:
            for i, slot in enumerate(keys.slots):
                codes[0][i], codes[1][i] = self._exact(slot, keys, values, i)
            return codes
        groups = keys.groups(self.group)
        sizes = [sum(2 * math.prod(keys.data[i].shape[2:]) for i in group) for group in groups]
        shapes = zip(self._ranks(keys, values, groups, sizes), sizes, map(len, groups), strict=True)
        batch, tokens = keys.data[0].shape[:2]
        for (rank, size, _), found in itertools.groupby(zip(shapes, groups, strict=True), itemgetter(0)):
            alike = [group for _, group in found]
            most = max(1, together(keys.data[0].device) // (batch * tokens * size))
            for first in range(0, len(alike), most):
                self._code_groups(alike[first : first + most], rank, keys, values, codes)
        return codes

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """The inputs of later tokens are those that give their keys and values, by least squares."""
        assert values is not None
        joined: tuple[Codes, Codes] = ([None] * len(keys.slots), [None] * len(keys.slots))
        for group in keys.groups(self.group):
            places = [(side, i) for i in group for side in (0, 1)]
            rows = [(keys, values)[side].flat(i) for side, i in places]
            old = [codes[side][i] for side, i in places]
            if all(isinstance(code, LowRank) for code in old):
                new: Sequence[Code] = self._extend_low_rank(old, rows, keys.dtype)  # type: ignore[arg-type]
            else:
                new = self._extend_inputs(old, rows, keys.dtype)  # type: ignore[arg-type]
            for (side, i), code in zip(places, new, strict=True):
                joined[side][i] = code
        return joined

    def _extend_low_rank(self, codes: list[LowRank], rows: list[Tensor], dtype: torch.dtype) -> Sequence[Code]:
        """Keys and values of a group, each relative to its own size in the block."""
        sizes = [x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-30) for x in rows]
        scaled = torch.cat([x / size for x, size in zip(rows, sizes, strict=True)], dim=-1)
        basis = torch.cat([code.b.float() / size for code, size in zip(codes, sizes, strict=True)], dim=1)
        a = self.extended(codes[0].a, rows_on(scaled, basis, dtype), dtype)
        return [dataclasses.replace(code, a=a) for code in codes]

    def _extend_inputs(self, codes: list[Recomputed], rows: list[Tensor], dtype: torch.dtype) -> Sequence[Code]:
        """Keys and values of one slot: x of the least ‖W x + b - y‖, which is exact because W has more rows than
        columns."""
        biases = [code.projection.bias for code in codes]
        rows = [y if bias is None else y - bias.float() for y, bias in zip(rows, biases, strict=True)]
        weight = torch.cat([code.projection.weight for code in codes])[None]
        x = self.extended(codes[0].x, rows_on(torch.cat(rows, dim=-1), weight, dtype), dtype)
        return [dataclasses.replace(code, x=x) for code in codes]

    def _exact(self, slot: int, keys: SlotTensors, values: SlotTensors, i: int) -> tuple[Code, Code]:
        x = self._inputs.of(slot, keys, self.name)
        width = tuple(keys.data[i].shape[2:])
        both = 2 * math.prod(width)
        if x.shape[2] >= both:
            raise UserError(
                f"{self.name}: slot {slot}: the input has {x.shape[2]} numbers a token, and its keys and values have "
                f"{both}, so storing the input saves nothing; allowed: ratio, or rank from 1 to {both - 1}"
            )
        stored = self._stored(x.to(keys.dtype), keys)
        k, v = self._projections[slot]
        return Recomputed(stored, k, keys.dtype, width), Recomputed(stored, v, values.dtype, width)

    def _ranks(self, keys: SlotTensors, values: SlotTensors, groups: list[list[int]], sizes: list[int]) -> list[int]:
        tokens = keys.data[0].shape[1]
        if self.ratio is None:
            assert self.rank is not None
            if self.rank > max(sizes):
                raise UserError(
                    f"{self.name}: rank={self.rank}: a group has {max(sizes)} numbers of keys and values a token; "
                    f"allowed: 1 to {max(sizes)}"
                )
            return [min(self.rank, size, tokens) for size in sizes]
        budget = elements_for_ratio(self.name, self.ratio, keys, values)
        shapes = [(len(group), size // len(group)) for group, size in zip(groups, sizes, strict=True)]
        ranks = ranks_for_budget(budget, tokens, shapes, [], keys_to_values=1.0)
        if ranks is None:
            raise UserError(
                f"{self.name}: ratio={self.ratio:g}: at {keys.tokens} tokens the bases exceed it, even at rank 1; "
                "allowed: a lower ratio, smaller groups, or more tokens"
            )
        return ranks[0]

    def _code_groups(
        self, groups: list[list[int]], rank: int, keys: SlotTensors, values: SlotTensors, codes: tuple[Codes, Codes]
    ) -> None:
        """Write the codes of the slots of `groups`, which have one shape and one rank."""
        joined, scales = zip(*(self._joined(group, rank, keys, values) for group in groups), strict=True)
        every = self.leading_vectors(torch.cat(joined), rank, keys.dtype)
        for group, rows, scale, vectors in zip(groups, joined, scales, every.split(len(joined[0])), strict=True):
            a = self._stored((rows @ vectors), keys)
            tensors = [(part, i) for i in group for part in (keys, values)]
            maps = self._maps(group, vectors, scale, keys, values)
            for (part, i), b, side in zip(tensors, maps, (0, 1) * len(group), strict=True):
                width = tuple(part.data[i].shape[2:])
                codes[side][i] = LowRank(a, b.to(part.dtype, copy=True).contiguous(), width)

    def _joined(
        self, group: list[int], rank: int, keys: SlotTensors, values: SlotTensors
    ) -> tuple[Tensor, list[Tensor]]:
        """The tensors of a group to approximate, side by side (B, n, C), and their scales.

        They are its inputs, without scales; or with `fit=kv` its keys and values, each times its scale (B, 1, 1).
        """
        if self.fit == "kv":
            rows = [part.flat(i) for i in group for part in (keys, values)]
            scales = [1 / x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-30) for x in rows]
            return torch.cat([x * scale for x, scale in zip(rows, scales, strict=True)], dim=-1), scales
        inputs = [self._inputs.of(keys.slots[i], keys, self.name).float() for i in group]
        joined = keys.without_padding(torch.cat(inputs, dim=-1), "zero")
        if rank > joined.shape[2]:
            raise UserError(f"{self.name}: rank={rank}: the inputs have {joined.shape[2]} numbers; allowed: up to that")
        return joined, []

    def _maps(
        self, group: list[int], vectors: Tensor, scales: list[Tensor], keys: SlotTensors, values: SlotTensors
    ) -> list[Tensor]:
        """The factor B of keys and of values of each slot of a group, whose `_joined` has the basis `vectors`."""
        if self.fit == "kv":
            widths = [math.prod(part.data[i].shape[2:]) for i in group for part in (keys, values)]
            return [part / scale for part, scale in zip(vectors.split(widths, dim=1), scales, strict=True)]
        maps: list[Tensor] = []
        for i, part in zip(group, vectors.chunk(len(group), dim=1), strict=True):
            for projection in self._projections[keys.slots[i]]:
                if projection.bias is not None:
                    raise UserError(f"{self.name}: fit=input: the projections have a bias; allowed: fit=kv")
                maps.append(projection.weight.float() @ part)
        return maps

    def _stored(self, rows: Tensor, keys: SlotTensors) -> Code:
        if self._coder is None:
            return Exact(rows.to(keys.dtype, copy=True))
        return self._coder.code(keys.without_padding(rows.float(), "repeat"), "k", keys.dtype, (rows.shape[2],))
