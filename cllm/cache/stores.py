"""Stores, one for each owner of a cache: a slot that grows, a slot of fixed size, a recurrent state.

In a forward pass `extend` takes the slot of the new tokens and returns the slot that readers attend to. The new tokens
are stored when the pass ends (`commit`); until then a cyclic plan may extend again with better values. A windowed slot
keeps the last `window` tokens. Stored tensors carry no gradient: a pass has gradients for its own tokens only.

Shapes: B batch, T new tokens, S tokens that readers see, G KV heads, D channels of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE = torch.bfloat16
"""Dtype of the factor for each token and head of a fp8 slot."""


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., D) in e4m3, with one bf16 factor for each vector of D: amax / 448.

    The relative error is at most 1/16 for numbers larger than 2^-14 of their vector's amax.
    """
    scale = (x.abs().amax(dim=-1).float() / FP8_MAX).clamp(min=1e-30).to(SCALE)
    return (x.float() / scale.float()[..., None]).to(FP8), scale


def from_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`: (..., D) in `dtype`."""
    return (x.float() * scale.float()[..., None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over a cache."""

    length: int
    """New tokens, T."""
    past: int
    """Tokens already stored; 0 when unknown on the host, then use `column`."""
    column: Tensor
    """(1,) int64: the number of tokens already stored, on the device."""


class Store(ABC):
    """The cached tensors of one owner."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name, batch first."""

    @abstractmethod
    def commit(self, step: Step) -> None:
        """End a pass: store the tokens last given to `extend`."""

    @abstractmethod
    def can_crop(self, length: int, past: int) -> None:
        """Raise `UserError` if the tokens after the first `length` of `past` cannot be dropped."""

    @abstractmethod
    def crop(self, length: int, past: int) -> None:
        """Keep the first `length` of `past` tokens. Raises `UserError` as `can_crop` does."""

    @abstractmethod
    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `change(tensor)`."""

    @abstractmethod
    def reset(self) -> None:
        """Drop all tokens; a slot may keep its memory, whose content is then never read."""

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class SlotStore(Store):
    """A slot: two tensors (B, n, ...), and for fp8 their factors (B, n, ...)."""

    pending: Slot | None = None
    """The new tokens of the current pass."""

    def __init__(
        self,
        widths: tuple[tuple[int, ...], tuple[int, ...]],
        batch: int,
        size: int,
        *,
        window: int | None,
        dtype: torch.dtype,
        fp8: bool,
        device: torch.device,
    ):
        self.window, self.dtype, self.fp8 = window, dtype, fp8

        def empty(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.zeros((batch, size, *shape), dtype=kind, device=device)

        k, v = (empty(width, FP8 if fp8 else dtype) for width in widths)
        scales = (empty(width[:-1], SCALE) for width in widths) if fp8 else (None, None)
        self.slot = Slot(k, v, *scales)

    @abstractmethod
    def extend(self, new: Slot, step: Step) -> Slot:
        """The slot that readers of this pass attend to: stored tokens, then the `new` ones (B, T, ...).

        For T > 1 tokens are in order and the new ones are not rounded. For T = 1 all are in the stored format, and a
        `FixedSlot` returns its entire ring.
        """

    @abstractmethod
    def last(self, n: int, past: int) -> Slot:
        """The last `n` of `past` stored tokens, in order."""

    @property
    def size(self) -> int:
        """Number of tokens that the tensors have room for."""
        return self.slot.k.shape[1]

    def kept(self, past: int) -> int:
        """The number of `past` tokens that are still stored."""
        return min(past, self.size)

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in zip(Slot._fields, self.slot, strict=True) if t is not None}

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.slot = self.slot.map(change)

    def pack(self, new: Slot) -> Slot:
        """`new` in the stored format."""
        if not self.fp8:
            return Slot(new.k.to(self.dtype), new.v.to(self.dtype))
        (k, k_scale), (v, v_scale) = to_fp8(new.k), to_fp8(new.v)
        return Slot(k, v, k_scale, v_scale)

    def unpack(self, stored: Slot) -> Slot:
        """`stored` in the model's dtype, for attention with several queries."""
        if stored.k_scale is None or stored.v_scale is None:
            return stored
        return Slot(
            from_fp8(stored.k, stored.k_scale, self.dtype),
            from_fp8(stored.v, stored.v_scale, self.dtype),
        )

    def reset(self) -> None:
        self.pending = None

    def can_crop(self, length: int, past: int) -> None:
        """Raises `UserError` if a token that the next query sees has left the window."""
        needed = length if self.window is None else min(length, self.window - 1)
        if needed > self.kept(past) - (past - length):
            raise UserError(
                f"cache: cannot go back from {past} to {length} tokens: a slot with a window of {self.window} has "
                "forgotten tokens that the next one sees; crop once and by one token, or before the window is full"
            )


class GrowingSlot(SlotStore):
    """Tensors as long as the tokens; every pass copies them into larger ones."""

    def extend(self, new: Slot, step: Step) -> Slot:
        packed = self.pack(new)
        self.pending = self.slot.join(packed)
        if step.length == 1 or not self.fp8:
            return self.pending
        return self.unpack(self.slot).join(new) if step.past else new

    def last(self, n: int, past: int) -> Slot:
        return self.slot.map(lambda t: t[:, t.shape[1] - n :])

    def commit(self, step: Step) -> None:
        if self.pending is None:
            return
        slot, self.pending = self.pending.map(Tensor.detach), None
        surplus = 0 if self.window is None else slot.k.shape[1] - self.window
        self.slot = slot.map(lambda t: t[:, surplus:].clone()) if surplus > 0 else slot

    def crop(self, length: int, past: int) -> None:
        self.can_crop(length, past)
        keep = self.kept(past) - (past - length)
        self.slot = self.slot.map(lambda t: t[:, :keep].clone())


class FixedSlot(SlotStore):
    """Tensors of a fixed size; with a window they are a ring: token c is at index c mod size.

    A pass of one token writes at an index that only the device knows, so that a CUDA graph of it can be replayed.
    """

    most = 0
    """Highest count reached before a crop. Ring positions after it were overwritten and hold no older tokens."""

    def kept(self, past: int) -> int:
        return past - max(max(self.most, past) - self.size, 0)

    def reset(self) -> None:
        super().reset()
        self.most = 0

    def extend(self, new: Slot, step: Step) -> Slot:
        if step.length == 1:
            place = step.column % self.size
            for stored, tensor in zip(self.slot, self.pack(new), strict=True):
                if stored is not None:
                    assert tensor is not None
                    rows(stored).index_copy_(1, place, rows(tensor.detach()))
            return self.slot
        self.pending = self.pack(new)
        if step.past == 0:
            return new
        if step.past + step.length > self.size:  # the ring wraps, but some queries still see the overwritten tokens
            return self.unpack(self.last(self.kept(step.past), step.past)).join(new)
        if self.fp8 or new.k.requires_grad:
            return self.unpack(self.slot.map(lambda t: t[:, : step.past])).join(new)
        self.commit(step)
        return self.slot.map(lambda t: t[:, : step.past + step.length])

    def last(self, n: int, past: int) -> Slot:
        if past <= self.size:
            return self.slot.map(lambda t: t[:, past - n : past])
        places = torch.arange(past - n, past, device=self.slot.k.device) % self.size
        return self.slot.map(lambda t: rows(t).index_select(1, places).view(t.dtype))

    def commit(self, step: Step) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        end, n = step.past + step.length, min(step.length, self.size)
        places = torch.arange(end - n, end, device=self.slot.k.device) % self.size
        for stored, tensor in zip(self.slot, pending, strict=True):
            if stored is not None:
                assert tensor is not None
                rows(stored).index_copy_(1, places, rows(tensor.detach())[:, -n:])

    def crop(self, length: int, past: int) -> None:
        self.can_crop(length, past)
        self.most = max(self.most, past)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace in place if shapes are unchanged, so that CUDA graphs keep valid addresses."""
        changed = self.slot.map(change)
        if changed.k.shape == self.slot.k.shape:
            for stored, tensor in zip(self.slot, changed, strict=True):
                if stored is not None:
                    assert tensor is not None
                    stored.copy_(tensor)
        else:
            self.slot = changed


def rows(t: Tensor) -> Tensor:
    """fp8 tensors as bytes: torch has no indexed copy for fp8."""
    return t.view(torch.uint8) if t.dtype == FP8 else t


class StateStore(Store):
    """A recurrent state (B, H, D, D), in fp32: as a sum over all tokens it would lose them in bf16."""

    def __init__(self, shape: tuple[int, int, int], batch: int, *, device: torch.device):
        self.state = torch.zeros((batch, *shape), dtype=torch.float32, device=device)
        self.pending: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"state": self.state}

    def reset(self) -> None:
        self.state.zero_()
        self.pending = None

    def put(self, state: Tensor) -> None:
        """Set the state after this pass."""
        self.pending = state

    def commit(self, step: Step) -> None:
        if self.pending is not None and self.pending.requires_grad:  # the backward still needs the old state
            self.state = self.pending.detach()
        elif self.pending is not None:
            self.state.copy_(self.pending)
        self.pending = None

    def can_crop(self, length: int, past: int) -> None:
        if length < past:
            raise UserError(f"cache: cannot go back from {past} to {length} tokens: a recurrent state forgets nothing")

    def crop(self, length: int, past: int) -> None:
        self.can_crop(length, past)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        changed = change(self.state)
        if changed.shape == self.state.shape:
            self.state.copy_(changed)
        else:
            self.state = changed
