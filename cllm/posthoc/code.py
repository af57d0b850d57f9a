"""What stands in the place of a cached tensor, and the base of all methods.

Shapes: B batch, n compressed tokens, width what one token has in one tensor of a slot: (G, D) for G KV heads of D
channels, or (R,) for a latent.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.model.rope import apply_rope
from cllm.posthoc.held import Held
from cllm.posthoc.sinks import Sinks
from cllm.section import Section

if TYPE_CHECKING:
    from cllm.posthoc.engine import Engine
    from cllm.posthoc.landmarks import Landmarks


class Code(Held, ABC):
    """One tensor (B, n, *width) of one slot, as it is stored."""

    @abstractmethod
    def decode(self) -> Tensor:
        """(B, n, *width), in the dtype that the cache had."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (B, n, r) and B (B, width, r) of which A Bᵀ is what `decode` returns; None where there are no such."""
        return None


@dataclass(frozen=True)
class Exact(Code):
    """The tensor itself."""

    data: Tensor

    def decode(self) -> Tensor:
        return self.data


@dataclass(frozen=True)
class Rotation(Held):
    """RoPE of the compressed keys of a slot: what turns them back, and forward again on reading."""

    table: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From positions (B or 1, n) to cos and signed sin as `rope_table` gives them."""
    first: int
    """Column of the first compressed token of a sequence without padding: sinks are before it."""
    length: int
    starts: Tensor | None
    """(B,) columns of padding; positions count from the first token that is none."""

    def undo(self, k: Tensor) -> Tensor:
        """Keys (B, n, G, D) as they were before RoPE, in fp32: turned by the negative angles."""
        cos, sin = self._tables(k.device)
        square = cos.square() + sin.square()  # not 1 under YaRN, which scales cos and sin
        return apply_rope(k.float(), (cos / square, -sin / square))

    def redo(self, k: Tensor) -> Tensor:
        """Keys (B, n, G, D) after RoPE, in the dtype of `k`."""
        return apply_rope(k, self._tables(k.device))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        columns = torch.arange(self.first, self.first + self.length, device=device)[None]
        return self.table(columns if self.starts is None else (columns - self.starts[:, None]).clamp(min=0))


@dataclass(frozen=True)
class Prefix(Held):
    """The compressed tokens of one slot."""

    k: Code
    v: Code
    sinks: Sinks
    """Tokens that are not here, but before those that come after the prefix."""
    rotation: Rotation | None
    """Of `k`, where it holds keys before RoPE."""
    landmarks: Landmarks | None = None
    """Of the keys, where decoding chooses from them."""

    def read(self) -> Slot:
        """The compressed tokens as attention reads them: (B, n, *width) each, made in the precision of what is stored,
        under autocast too."""
        with torch.autocast(next(self.k.tensors()).device.type, enabled=False):
            k = self.k.decode()
            return Slot(k if self.rotation is None else self.rotation.redo(k), self.v.decode())

    def join(self, since: Slot) -> Slot:
        """All tokens in order, of `since`: the exact ones (B, s + T, *width), sinks first."""
        return self.sinks.join(self.read(), since)

    def storage(self) -> list[Tensor]:
        """The stored form of the compressed tokens. The `starts` of sinks are the cache's own."""
        beside = [] if self.landmarks is None else self.landmarks.tensors()
        return [*self.k.tensors(), *self.v.tensors(), *beside]


@dataclass(frozen=True)
class Part:
    """The keys or the values of all slots to compress."""

    kind: Literal["k", "v"]
    slots: tuple[int, ...]
    """The slots' owners, ascending."""
    data: tuple[Tensor, ...]
    """(B, n, *width) each; keys before RoPE where the method asks for them."""
    dtype: torch.dtype
    """Of the cache, and of what `Code.decode` returns."""
    text: Tensor | None = None
    """(B, n) booleans, False for padding; None: there is none."""
    whole: float | None = None
    """Numbers of `dtype` that a sequence has in the whole cache, as far as these slots answer for it, values with
    keys; None: those of the slots."""
    stays: float = 0.0
    """Those of them that no method changes: windows, states, the RoPE keys of latents, sinks."""
    sinks: Sinks | None = None
    """Tokens that are left out here because they are stored exactly; None if no token is."""

    @property
    def tokens(self) -> int:
        """Of the prefix, sinks included."""
        return self.data[0].shape[1] if self.sinks is None else self.sinks.length

    def groups(self, size: int) -> list[list[int]]:
        """Places of `slots` in contiguous groups of `size`, the last maybe shorter.

        Raises `UserError` for a group that mixes shapes.
        """
        places = list(range(len(self.slots)))
        groups = [places[i : i + size] for i in range(0, len(places), size)]
        for group in groups:
            shapes = {tuple(self.data[i].shape[2:]): self.slots[i] for i in reversed(group)}
            if len(shapes) > 1:
                told = ", ".join(f"slot {slot} has {shape} a token" for shape, slot in sorted(shapes.items()))
                raise UserError(f"group={size}: a group mixes shapes: {told}; allowed: groups of slots of one shape")
        return groups

    def flat(
        self, place: int, *, padding: Literal["zero", "repeat"] = "zero", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, n, C) in `dtype`: the tensor at `place`, a row a token, without padding."""
        return self.without_padding(self.data[place].flatten(2).to(dtype), padding)

    def without_padding(self, rows: Tensor, padding: Literal["zero", "repeat"]) -> Tensor:
        """`rows` (B, n, C), in which padding must not weigh: it becomes 0, for sums, or the first token that is none,
        for extremes."""
        if self.text is None:
            return rows
        if padding == "zero":
            return rows * self.text[..., None]
        first = self.text.int().argmax(dim=1)[:, None, None].expand(-1, 1, rows.shape[-1])
        return torch.where(self.text[..., None], rows, rows.gather(1, first))


class Compressor(Section):
    """A method with its options; a subclass is one method, its fields what a spec string may say."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    keys_before_rope: ClassVar[bool] = False
    """Whether `encode` is handed keys as they were before RoPE."""

    once: ClassVar[str | None] = None
    """Why the method cannot compress again; None: it can."""

    no_sinks: ClassVar[str | None] = None
    """Why the method keeps no sinks; None: it does."""

    recompress: int | None = Field(None, ge=1)
    """Compress again, with the tokens since, whenever so many tokens have come; null: those stay exact."""
    sinks: int = Field(4, ge=0)
    """First tokens of every sequence that are stored exactly and take no part in what is fitted to the others. A prefix
    of no more tokens is stored as it is."""

    @model_validator(mode="after")
    def _again(self) -> Self:
        if self.sinks and self.no_sinks is not None:
            raise ValueError(f"sinks={self.sinks}: {self.no_sinks}; allowed: leave it out")
        if self.recompress is not None and self.once is not None:
            raise ValueError(f"recompress={self.recompress}: {self.once}; allowed: leave it out")
        return self

    @abstractmethod
    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        """What to store of every slot, in order; None keeps a tensor as it is.

        Args:
            keys: of the slots, or their latents, without sinks.
            values: of the same slots; None for latents, whose RoPE keys stay as they are.

        Raises:
            UserError: for options that do not fit these tensors.
        """

    def check_all_sinks(self, tokens: int) -> None:
        """Raises `UserError` where the method cannot serve a prefix of `tokens` tokens, all of which are sinks."""

    def landmarks(self, k: Tensor, text: Tensor | None) -> Landmarks | None:
        """What decoding chooses tokens by, of exact keys `k` (B, n, G, D) after RoPE, padding where `text` (B, n) is
        False; None: it reads them all."""
        return None

    @property
    def chooses(self) -> bool:
        """Whether passes of one token read less of a compressed slot than longer ones do: only they show its cost."""
        return False

    def prepare(self, engine: Engine, ids: Tensor) -> None:
        """Learn what the method wants to know of a model from `ids` (B, T), tokens that are not scored."""

    def watch(self, engine: Engine) -> AbstractContextManager[None]:
        """A context in which the passes that fill the cache must run, where a method has to see them."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Free what `watch` has seen. The cache that was watched cannot be compressed after; compressed ones go on."""

    def released(self) -> Self:
        """A copy that holds nothing of what `watch` has seen, for a compressed cache to keep."""
        copy = self.model_copy()
        copy.release()
        return copy

    def facts(self) -> dict[str, Any]:
        """What `prepare` has learned or chosen, for a record: values are JSON's."""
        return {}

    def follows(self) -> dict[int, int]:
        """Slots that are dropped, each with the slot that is read instead."""
        return {}

    def weight_bytes(self) -> int:
        """Bytes of what the method holds beside the model's weights, for all caches together."""
        return 0


class Nothing(Compressor):
    """Stores every tensor as it is: what any method is measured against."""

    name: ClassVar[str] = "none"
    no_sinks: ClassVar[str | None] = "every token is stored exactly"

    sinks: int = Field(0, ge=0)
    """0."""

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        return [None] * len(keys.slots), [None] * len(keys.slots)


class TensorCoder(ABC):
    """A method that codes one tensor by itself, so that it may be put on top of what another stores."""

    of_slots: ClassVar[frozenset[str]]
    """Options that say something of slots or of time, and nothing of one tensor."""

    @abstractmethod
    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        """Store `rows` (B, n, C) fp32; decodes to (B, n, *width) in `dtype`."""

    @abstractmethod
    def coded(self, rows: int) -> int:
        """How many of so many rows are coded; the last ones may stay exact."""


class Codable(Compressor):
    """A method what it stores of which a `TensorCoder` may code: `xkv:ratio=2+kivi:bits=4`."""

    _coder: TensorCoder | None = PrivateAttr(None)

    def coded_by(self, coder: TensorCoder) -> Self:
        """The same, what it stores coded by `coder`. Raises `ValueError` where there is nothing to code."""
        changed = self.model_copy()
        changed._coder = coder
        return changed
