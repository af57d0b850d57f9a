"""The slots of a filled cache that can be compressed, and their tensors as a method gets them.

Shapes: B batch, n tokens, width the shape of one token in one tensor of a slot: (G, D) for G KV heads of D channels, or
(R,) for a latent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Prefix, Rotation, unstack
from cllm.posthoc.later_queries import LaterQueries
from cllm.posthoc.sinks import Sinks
from cllm.posthoc.tensor_tree import total_bytes

TOGETHER = {"cpu": 2**20, "cuda": 2**25}
"""Numbers of several slots that a method computes on as one tensor at most, by the type of the device. A GPU needs much
work for each kernel, and memory bounds it; a CPU is fastest with tensors that fit its caches."""
NOTHING_TO_COMPRESS = "nothing to compress: all slots have a window or are recurrent states"


@dataclass(frozen=True)
class SlotTensors:
    """The keys (or latents), or the values, of all slots to compress."""

    kind: Literal["k", "v"]
    slots: tuple[int, ...]
    """The slots' owners, ascending."""
    data: tuple[Tensor, ...]
    """(B, n, *width) each, without sinks; keys before RoPE if the method asks for them."""
    dtype: torch.dtype
    """Of the cache, and of what `Code.decode` returns."""
    is_text: Tensor | None = None
    """(B, n) booleans, False for padding; None: no padding."""
    uncompressed_elements: float | None = None
    """Elements of `dtype` per sequence of the uncompressed cache, keys and values, that these slots replace; slots that
    cannot be compressed are shared out in proportion. None: the elements of these slots alone."""
    incompressible_elements: float = 0.0
    """How many of those no method compresses: windows, states, RoPE keys of latents, sinks."""
    sinks: Sinks | None = None
    """The tokens left out of `data` because they are stored exactly; None: none are."""
    cached: tuple[Tensor, ...] = ()
    """For keys and values of a filled cache: the cache's own (B, S, G, D), keys after RoPE, sinks included. Empty for
    other tensors."""
    rope: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None
    """As in `CompressibleSlots`, for keys of a filled cache; None for other tensors."""

    @property
    def tokens(self) -> int:
        """Tokens of the prefix, sinks included."""
        return self.data[0].shape[1] if self.sinks is None else self.sinks.length

    def rotations(self) -> dict[int, Rotation]:
        """RoPE of the tokens in `data`, by slot, for keys of a filled cache of which nothing was evicted."""
        assert self.rope is not None
        assert self.sinks is not None
        first, starts = self.sinks.count, self.sinks.starts
        tables = [functools.partial(self.rope, k.shape[-1]) for k in self.data]
        tokens = [k.shape[1] for k in self.data]
        found = zip(self.slots, tables, tokens, strict=True)
        return {j: Rotation(table, first, n, starts) for j, table, n in found}

    def before_rope(self) -> SlotTensors:
        """Keys before RoPE, in fp32, for those after it; see `rotations`."""
        k = _before_rope(dict(zip(self.slots, self.data, strict=True)), self.rotations())
        return dataclasses.replace(self, data=k)

    def groups(self, size: int) -> list[list[int]]:
        """Indices into `slots` in contiguous groups of `size`; the last may be shorter.

        Raises `UserError` for a group that mixes shapes.
        """
        indices = list(range(len(self.slots)))
        groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        for group in groups:
            shapes = {tuple(self.data[i].shape[2:]): self.slots[i] for i in reversed(group)}
            if len(shapes) > 1:
                seen = ", ".join(f"slot {slot} has {shape} a token" for shape, slot in sorted(shapes.items()))
                raise UserError(f"group={size}: a group mixes shapes: {seen}; allowed: groups of slots of one shape")
        return groups

    def stacks(self) -> Iterator[tuple[range, SlotTensors]]:
        """Neighbouring slots of one shape as one slot with the sequences of all: for methods that treat sequences and
        slots alike, and whose kernels are too small for a GPU with one slot each.

        Yields:
            The indices into `slots` of m slots, and a slot (m · B, n, *width) of at most `TOGETHER` numbers or one slot
            as it is.
        """
        begin = 0
        while begin < len(self.slots):
            first = self.data[begin]
            most, end = max(together(first.device) // max(first.numel(), 1), 1), begin + 1
            while end < min(len(self.slots), begin + most) and _are_alike(first, self.data[end]):
                end += 1
            members = range(begin, end)
            data = first if len(members) == 1 else torch.cat(self.data[begin:end])
            is_text = None if self.is_text is None else self.is_text.repeat(len(members), 1)
            yield members, dataclasses.replace(self, slots=(self.slots[begin],), data=(data,), is_text=is_text)
            begin = end

    def code_stacks(self, code: Callable[[SlotTensors], Code]) -> Codes:
        """The code of every slot, from `code` of each of `stacks`."""
        codes: Codes = []
        for members, stack in self.stacks():
            codes += unstack(code(stack), len(members))
        return codes

    def flat(
        self, index: int, *, padding: Literal["zero", "repeat"] = "zero", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, n, C) in `dtype`: tensor `index` with one row per token, padding replaced as by `without_padding`."""
        return self.without_padding(self.data[index].flatten(2).to(dtype), padding)

    def write(self, index: int, out: Tensor) -> None:
        """Write `flat(index)` into `out` (B, n, C) of any dtype."""
        out.copy_(self.data[index].flatten(2))
        if self.is_text is not None:
            out.mul_(self.is_text[..., None])

    def without_padding(self, rows: Tensor, padding: Literal["zero", "repeat"]) -> Tensor:
        """`rows` (B, n, C) with padding replaced: by 0, so that it does not count in sums, or by the first real token,
        so that it does not count in extremes."""
        if self.is_text is None:
            return rows
        if padding == "zero":
            return rows * self.is_text[..., None]
        first = self.is_text.int().argmax(dim=1)[:, None, None].expand(-1, 1, rows.shape[-1])
        return torch.where(self.is_text[..., None], rows, rows.gather(1, first))


def together(device: torch.device) -> int:
    """The most numbers of several slots in one tensor on `device`."""
    return TOGETHER.get(device.type, TOGETHER["cuda"])


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


@dataclass(frozen=True)
class JointRead:
    """Slots that one layer reads with one mask: its keys and values are made of their tokens, column by column."""

    layer: int
    slots: tuple[int, ...]
    window: int | None = None
    """Last tokens that a query sees; None: all."""
    exclude_self: bool = False
    """A query does not see its own token."""


@dataclass(frozen=True)
class CompressibleSlots:
    """The slots of a filled cache that can be compressed, as attention reads them."""

    slots: Mapping[int, Slot]
    """By owner: keys after RoPE and values (B, n, G, D); the latent (B, n, R) and the RoPE key of a latent slot."""
    latent: frozenset[int]
    """Owners whose slots are latent."""
    starts: Tensor | None
    """(B,) int64: columns of padding before each sequence; None: no padding."""
    cache_bytes: int
    """Bytes of the entire cache, with slots that cannot be compressed, and states."""
    incompressible_bytes: int
    """Bytes of the slots that cannot be compressed, and of states."""
    rope: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    """From a head dimension and positions (B or 1, n) to cos and signed sin. Compressed slots keep it, so it must hold
    no tensor of the cache."""
    reads: tuple[JointRead, ...] = ()
    """How layers read the slots."""
    evicted: Mapping[int, int] = field(default_factory=dict)
    """Tokens that a slot no longer has, by owner; absent: none. `eviction.equal_parts` separates slots that differ in
    it: `sinks`, `is_text` and `tensors` are for slots of one length."""
    compressed: Mapping[int, int] = field(default_factory=dict)
    """Stored tokens of the compressed prefix of a slot, by owner, if its method compresses it again; absent: none."""
    later: LaterQueries | None = None
    """The queries of later tokens, if the method that compresses again records them."""
    scores: Mapping[int, Tensor] = field(default_factory=dict)
    """(B, G or 1, m) fp32: the scores of the m stored tokens of a slot, by owner, if its method keeps them (`Kept`)."""
    columns: Mapping[int, Tensor] = field(default_factory=dict)
    """(B or 1, m) int64: the columns of the m stored tokens of a slot, by owner, if tokens were evicted and all its KV
    heads have the same ones; slots of the same tokens share the tensor. Those of sinks may be wrong."""
    _left: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of `rotation`, so that slots of the same tokens share the columns."""

    def sinks(self, count: int) -> Sinks:
        """The first `count` tokens of every sequence, or all if there are fewer. Raises `UserError` if there are no
        slots."""
        if not self.slots:
            raise UserError(NOTHING_TO_COMPRESS)
        length = next(iter(self.slots.values())).k.shape[1]
        return Sinks(min(count, length), length, self.starts, self.first_column)

    def only(self, slot: int) -> CompressibleSlots:
        """That slot alone, with the bytes of the entire cache."""
        evicted = {slot: self.evicted[slot]} if slot in self.evicted else {}
        return dataclasses.replace(self, slots={slot: self.slots[slot]}, latent=self.latent & {slot}, evicted=evicted)

    def squares(self, slot: int, name: Literal["k", "v"]) -> Tensor:
        """(B,) fp64: the sum of squares of a slot's tensor, without padding; all slots of one length."""
        tensor = getattr(self.slots[slot], name)
        return squares(tensor, self.is_text(tensor.shape[1]))

    def again(self, before: Mapping[int, Prefix], later: LaterQueries | None) -> CompressibleSlots:
        """The slots of a cache that its method compresses again, with the prefixes so far, and the queries of later
        tokens if it records them."""
        compressed = {j: prefix.sinks.length for j, prefix in before.items()}
        scores = {j: prefix.scores for j, prefix in before.items() if prefix.scores is not None}
        columns = {
            j: prefix.columns(self.slots[j].k.shape[1])
            for j, prefix in before.items()
            if prefix.sinks.evicted and prefix.rotation is not None
        }
        return dataclasses.replace(self, compressed=compressed, later=later, scores=scores, columns=columns)

    @property
    def first_column(self) -> int:
        """Tokens that slots of one length no longer have."""
        return self.evicted.get(next(iter(self.slots)), 0)

    def rotation(self, slot: int, sinks: Sinks | None = None) -> Rotation:
        """RoPE of the keys of `slot`, without `sinks`."""
        k, sinks = self.slots[slot].k, self.sinks(0) if sinks is None else sinks
        evicted, columns = self.evicted.get(slot, 0), None
        if evicted:
            assert slot in self.columns, "KV heads that have different tokens have no common positions"
            key = id(self.columns[slot]), sinks.count
            if key not in self._left:
                self._left[key] = self._columns_left(self.columns[slot], sinks)
            columns = self._left[key]
        table = functools.partial(self.rope, k.shape[-1])
        return Rotation(table, sinks.count + evicted, k.shape[1] - sinks.count, self.starts, columns)

    def _columns_left(self, columns: Tensor, sinks: Sinks) -> Tensor | None:
        """(B, m - s) int32: `columns` (B or 1, m) without those of the s sinks; None if they are the last ones."""
        batch = len(next(iter(self.slots.values())).k)
        rest = sinks.without(columns.expand(batch, -1))
        last = torch.arange(rest.shape[1], device=rest.device) + sinks.evicted + sinks.count
        wrong, is_text = rest != last, self.is_text(rest.shape[1])
        wrong = wrong if is_text is None else wrong & is_text
        return rest.int() if wrong.any() else None

    def is_text(self, length: int) -> Tensor | None:
        """(B, length) booleans, False for padding; None without padding. It is also right for tokens without sinks,
        because sinks come after the padding."""
        if self.starts is None:
            return None
        return torch.arange(length, device=self.starts.device) >= self.starts[:, None] - self.first_column

    def tensors(self, *, before_rope: bool, sinks: Sinks | None = None) -> list[tuple[SlotTensors, SlotTensors | None]]:
        """Keys and values of the ordinary slots, then latents (with None for values) of the latent ones; without
        `sinks`. A kind that has no slots is left out."""
        tensors: list[tuple[SlotTensors, SlotTensors | None]] = []
        elements = {j: slot.k.numel() + (0 if j in self.latent else slot.v.numel()) for j, slot in self.slots.items()}
        incompressible: float = self.incompressible_bytes + sum(self.slots[j].v.nbytes for j in self.latent)
        sinks = self.sinks(0) if sinks is None else sinks
        for j, slot in self.slots.items():
            incompressible += elements[j] // sinks.length * sinks.count * slot.k.itemsize
        rotations = {j: self.rotation(j, sinks) for j in self.slots if before_rope and j not in self.latent}
        incompressible += total_bytes(r.columns for r in rotations.values() if r.columns is not None)
        for latent in (False, True):
            slots = tuple(j for j in sorted(self.slots) if (j in self.latent) == latent)
            if not slots:
                continue
            k, v = (tuple(sinks.without(getattr(self.slots[j], name)) for j in slots) for name in ("k", "v"))
            if before_rope and not latent:
                k = _before_rope(dict(zip(slots, k, strict=True)), rotations)
            is_text, dtype = self.is_text(sinks.rest), self.slots[slots[0]].k.dtype
            share = sum(elements[j] for j in slots) / sum(elements.values()) / dtype.itemsize / len(k[0])
            counts = self.cache_bytes * share, incompressible * share
            keys = SlotTensors("k", slots, k, dtype, is_text, *counts, sinks)
            values: SlotTensors | None = None
            if not latent:
                cached_k, cached_v = (tuple(getattr(self.slots[j], name) for j in slots) for name in ("k", "v"))
                keys = dataclasses.replace(keys, cached=cached_k, rope=self.rope)
                values = SlotTensors("v", slots, v, dtype, is_text, sinks=sinks, cached=cached_v)
            tensors.append((keys, values))
        return tensors


def _before_rope(keys: Mapping[int, Tensor], rotations: Mapping[int, Rotation]) -> tuple[Tensor, ...]:
    """`keys` (B, n, G, D) by slot, before RoPE. Slots of one shape, device and choice of tokens have one rotation."""
    by_rotation: dict[tuple[torch.Size, torch.device, int], list[int]] = {}
    for j, k in keys.items():
        by_rotation.setdefault((k.shape, k.device, id(rotations[j].columns)), []).append(j)
    undone: dict[int, Tensor] = {}
    for alike in by_rotation.values():
        made = rotations[alike[0]].undo_all([keys[j] for j in alike])
        undone |= dict(zip(alike, made, strict=True))
    return tuple(undone[j] for j in keys)


def squares(x: Tensor, is_text: Tensor | None) -> Tensor:
    """(B,) fp64: the sum of squares of `x` (B, n, ...), without the tokens at which `is_text` (B, n) is False."""
    total = x.double().square().flatten(2).sum(2)
    return (total if is_text is None else total * is_text).sum(1)
