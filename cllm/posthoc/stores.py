"""The stores of a compressed cache: a compressed prefix with an exact tail, and the slot of another store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.copies import exact_slot
from cllm.cache.slot import Slot
from cllm.cache.stores import GrowingSlot, SlotStore, Step
from cllm.config import Rope
from cllm.errors import UserError
from cllm.kernels.selection import Table
from cllm.model.rope import rope_frequencies, rope_table
from cllm.posthoc.code import Prefix
from cllm.posthoc.deferred import Deferred
from cllm.posthoc.pages import PagedRead
from cllm.posthoc.tensor_tree import total_bytes


@dataclass(frozen=True, slots=True)
class DecodeStep(Step):
    """A pass of one token over compressed slots."""

    tables: dict[int, Table]
    """By the size of heads: RoPE of the compressed tokens without sinks, for slots without evicted tokens. Recomputed
    in each pass and not stored, since storing it would add to the cache's bytes."""


def _for_kernels(table: tuple[Tensor, Tensor], turn: float | None) -> Table:
    """cos and signed sin (S, 1, 2, D / 2) as kernels read them."""
    cos, sin = table
    return Table(cos[:, 0, 0], sin[:, 0, 1], turn)


def consecutive_table(rope: Rope, head_dim: int, positions: Tensor) -> Table:
    """RoPE of consecutive integer `positions` (S,), as kernels read it."""
    frequencies, _ = rope_frequencies(rope, head_dim)
    return _for_kernels(rope_table(rope, head_dim, positions), frequencies[head_dim // 4].item())


class CompressedSlot(SlotStore):
    """A compressed prefix, and an exact tail: the sinks, then later tokens, in a slot that grows or has fixed `room`.

    A decode step reads a prefix that is stored as factors directly, if all sequences have the same positions or no
    token was evicted. Otherwise the prefix is reconstructed in every pass.
    """

    window, fp8 = None, False

    def __init__(self, prefix: Prefix, sinks: Slot, room: int | None = None):
        self.prefix, self.dtype = prefix, sinks.k.dtype
        size = None if room is None else prefix.sinks.count + room
        self.tail = exact_slot(sinks, prefix.sinks.count, size, window=None, dtype=self.dtype, fp8=False)
        """The sinks and the later tokens; for kernels, the tokens from column S - s on (`sinks.py`)."""
        self.defers = prefix.rotation is not None and prefix.k.has_factors and prefix.v.has_factors
        """Whether a decode step reads the prefix in its stored form."""
        self.is_shared = False
        """Whether another slot returns this one's tokens."""
        self.in_pass: Slot | None = None
        """The slot returned in this pass, kept until its end if `is_shared`; otherwise it is freed after its layer."""

    @property
    def head_dim(self) -> int:
        """Channels of a head, of the keys."""
        return self.tail.slot.k.shape[-1]

    @property
    def compressed(self) -> int:
        """Tokens of the prefix, sinks and evicted tokens included."""
        return self.prefix.sinks.tokens

    def first_later(self, n: int) -> Slot:
        """The first `n` tokens after the prefix, of a growing slot."""
        sinks = self.prefix.sinks.count
        return self.tail.slot.map(lambda t: t[:, sinks : sinks + n])

    def absorb(self, prefix: Prefix) -> None:
        """Put `prefix`, which ends with the first tokens after the present one, in the place of both."""
        sinks, joined = self.prefix.sinks.count, prefix.sinks.tokens - self.compressed
        self.prefix = prefix
        self.tail.slot = self.tail.slot.map(lambda t: torch.cat((t[:, :sinks], t[:, sinks + joined :]), dim=1))

    def extend(self, new: Slot, step: Step) -> Slot:
        exact = self.tail.extend(new, self._tail_step(step))
        if isinstance(step, DecodeStep) and self.prefix.k.selects:
            slot = Slot(*(PagedRead(self.prefix, kind, exact) for kind in ("k", "v")))  # type: ignore[arg-type]
        elif isinstance(step, DecodeStep) and self.defers and (table := self._table(step)) is not None:
            k, v = (Deferred(self.prefix, kind, exact, table) for kind in ("k", "v"))
            slot = Slot(k, v)  # type: ignore[arg-type]  # attention calls `attend` of what is not a tensor
        else:
            slot = self.prefix.join(exact)
        if self.is_shared:
            self.in_pass = slot
        return slot

    def _table(self, step: DecodeStep) -> Table | None:
        """RoPE of the compressed tokens without sinks; None if evicted tokens have left other positions in each
        sequence."""
        if not self.prefix.sinks.evicted:
            return step.tables[self.head_dim]
        assert self.prefix.rotation is not None
        table = self.prefix.rotation.common_table(step.column.device)
        return None if table is None else _for_kernels(table, None)

    def commit(self, step: Step) -> None:
        self.tail.commit(self._tail_step(step))
        self.in_pass = None

    def _tail_step(self, step: Step) -> Step:
        """`step` with the tokens counted as in the tail."""
        before = self.prefix.sinks.before_tail
        return Step(step.length, max(step.past - before, 0), step.column - before)

    def last(self, n: int, past: int) -> Slot:
        exact = past - self.prefix.sinks.before_tail
        return self.prefix.join(self.tail.last(exact, exact)).map(lambda t: t[:, t.shape[1] - n :])

    @property
    def size(self) -> int:
        return self.prefix.sinks.rest + self.tail.size

    def kept(self, past: int) -> int:
        return past - self.prefix.sinks.evicted

    def can_crop(self, length: int, past: int) -> None:
        """Raises `UserError` for a length within the compressed tokens."""
        if length < self.compressed:
            raise UserError(
                f"cache: cannot go back from {past} to {length} tokens: the first {self.compressed} are compressed; "
                f"allowed: {self.compressed} or more"
            )

    def crop(self, length: int, past: int) -> None:
        self.can_crop(length, past)
        before = self.prefix.sinks.before_tail
        self.tail.crop(length - before, past - before)

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"prefix.{i}": tensor for i, tensor in enumerate(self.prefix.storage())}
        return {**stored, **self.tail.tensors()}

    def nbytes(self) -> int:
        return total_bytes(self.tensors().values()) - total_bytes(self.host_tensors())

    def host_tensors(self) -> list[Tensor]:
        """Those of `tensors` that are in host memory when the others are on a device."""
        return list(self.prefix.host_tensors())

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.prefix = self.prefix.map(change)
        self.tail.replace(change)


class SharingSlot(SlotStore):
    """Stores nothing: readers get the slot of another store, from a layer earlier in the same pass.

    In a cycle, a layer below both may read before the other store has tokens of the pass; it gets those of the past.
    """

    window, fp8 = None, False

    def __init__(self, source: CompressedSlot | GrowingSlot):
        self.source, self.dtype = source, source.dtype
        if isinstance(source, CompressedSlot):
            source.is_shared = True

    def extend(self, new: Slot, step: Step) -> Slot:
        slot = self.source.in_pass if isinstance(self.source, CompressedSlot) else self.source.pending
        return self.source.extend(new, step) if slot is None else slot

    def commit(self, step: Step) -> None:
        pass

    def last(self, n: int, past: int) -> Slot:
        return self.source.last(n, past)

    @property
    def size(self) -> int:
        return self.source.size

    def crop(self, length: int, past: int) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        pass
