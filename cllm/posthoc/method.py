"""The base class of all methods, and the models that a method may run, without their caches.

Shapes: B batch, T tokens, n compressed tokens, width the shape of one token in one tensor of a slot.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.eviction import Kept
from cllm.posthoc.grown import Joiner, join_all
from cllm.posthoc.key_norm import KeyNorm
from cllm.posthoc.landmarks import Landmarks
from cllm.posthoc.later_queries import LaterQueries
from cllm.posthoc.readers import SlotReader
from cllm.posthoc.slots import CompressibleSlots, SlotTensors
from cllm.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@contextlib.contextmanager
def naming(method: str) -> Iterator[None]:
    """Begin the text of a `UserError` that is raised inside with the name of a method, unless it has it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{method}: ") else f"{method}: {text}") from None


class Engine(ABC):
    """A model and its kind of cache. `engine_of` (engine.py) returns the one for a model."""

    head: nn.Module
    """From hidden states to logits."""
    _slots: list[int] | None = None

    @abstractmethod
    def new_cache(self, shares: dict[int, int] | None = None) -> Any:
        """An empty cache. In `shares` (as in `Compressor.shares`), slots that store nothing and read another's."""

    @abstractmethod
    def hidden(self, ids: Tensor, cache: Any) -> Tensor:
        """Final hidden states (B, T, d_model) of `ids` (B, T), which are added to `cache`."""

    def all_tokens(self) -> AbstractContextManager[None]:
        """A context in which all layers compute all tokens of a prompt, for those who record what layers compute.

        Without it, a decoder's prefill computes only the last tokens in the upper layers of some plans.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def compressible(self, cache: Any) -> CompressibleSlots:
        """The slots of `cache` that can be compressed."""

    @abstractmethod
    def compress(self, cache: Any, method: Compressor, *, measure: bool = True) -> Any:
        """`cache` compressed; see `compress_cache` and `compress_dynamic`."""

    @abstractmethod
    def nbytes(self, cache: Any) -> int:
        """Bytes that `cache` stores, without `host_tensors`."""

    def host_tensors(self, cache: Any) -> list[Tensor]:
        """Tensors of `cache` that are in host memory when the others are on a device; by default none."""
        return []

    @abstractmethod
    def fp32_numbers(self, cache: Any) -> int:
        """Numbers of those bytes that are fp32, except recurrent states and scores of tokens (`Kept`), which are fp32
        in every model."""

    @abstractmethod
    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        """Bytes of the cache of the same model with full attention and a KV head for every query head."""

    @abstractmethod
    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        """The key and value projections of a slot's owner. Raises `UserError` if it has none. Keys may be normalised
        after the projection: `key_norm`."""

    @abstractmethod
    def key_norm(self, slot: int) -> KeyNorm | None:
        """The norm between a slot's key projection and RoPE, if there is one. Raises `UserError` as `projections`, and
        if the norm is not an RMSNorm."""

    def layers(self) -> list[nn.Module]:
        """The layers in order. The output of each, or the first of several, is the residual stream after it (B, T,
        d_model). Raises `UserError` for a model whose layers are not known."""
        raise UserError(f"{type(self).__name__}: the layers of the model are not known")

    def layer_of(self, slot: int) -> nn.Module | None:
        """The layer that computes a slot, if other layers share its modules; None: no layer shares another's."""
        return None

    def readers(self, slot: int) -> list[SlotReader]:
        """The layers that read the keys or the values of a slot. Raises `UserError` if one is not plain attention."""
        raise UserError(f"{type(self).__name__}: slot {slot}: the layers that read it are not known")

    @torch.no_grad()
    def slots(self) -> list[int]:
        """The slots that can be compressed. The first call runs a pass of one token."""
        if self._slots is None:
            device, cache = self.head.weight.device, self.new_cache()
            assert isinstance(device, torch.device)
            self.hidden(torch.zeros(1, 1, dtype=torch.long, device=device), cache)
            self._slots = list(self.compressible(cache).slots)
        return self._slots

    def logits(self, ids: Tensor, cache: Any) -> Tensor:
        """(B, T, vocabulary)."""
        return self.head(self.hidden(ids, cache))


class Compressor(Section):
    """A method with its options. A subclass is one method, and its fields are the options of a spec string.

    `@register` (registry.py) gives a subclass its name. `encode` is all that a method must define.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    """A line for the list of methods."""
    sweep: ClassVar[tuple[str, ...]] = ()
    """Specs that experiments.sweep_posthoc measures by default; it fills in `{group}` and `{ratio}`."""

    keys_before_rope: ClassVar[bool] = False
    """Whether `encode` gets keys before RoPE."""
    no_recompress: ClassVar[str | None] = None
    """Why the method cannot compress a cache again; None: it can."""
    no_every: ClassVar[str | None] = None
    """Why later tokens cannot join the compressed ones; None: they can."""
    joins_by_encoding: ClassVar[bool] = False
    """Whether later tokens join in that the cache is encoded again, and not by `absorb`: for methods that store exactly
    what they keep."""
    evicts: ClassVar[bool] = False
    """Whether the method may drop tokens of a cache (`kept`)."""
    follows_eviction: ClassVar[bool] = False
    """Whether the method may come after an evicting one, with `+`: `encode` then gets the tokens that are left. See
    `check_follows_eviction` and `shared_rows`."""
    no_sinks: ClassVar[str | None] = None
    """Why the method keeps no sinks; None: it does."""

    recompress: int | None = Field(None, ge=1)
    """Compress the cache again, later tokens included, whenever this many have come; null: later tokens stay exact."""
    every: int | None = Field(None, ge=1)
    """Later tokens join the compressed ones, which do not change, in blocks of this many; null: they stay exact. With
    `recompress`, a multiple of it, that fits the method to all tokens again."""
    sinks: int = Field(4, ge=0)
    """First tokens of every sequence that are stored exactly and left out of every fit. A prefix of no more tokens is
    stored as it is."""

    @model_validator(mode="after")
    def _check_refused_options(self) -> Self:
        if self.sinks and self.no_sinks is not None:
            raise ValueError(f"sinks={self.sinks}: {self.no_sinks}; allowed: leave it out")
        if self.recompress is not None and self.no_recompress is not None:
            raise ValueError(f"recompress={self.recompress}: {self.no_recompress}; allowed: leave it out")
        if self.every is not None and self.no_every is not None:
            raise ValueError(f"every={self.every}: {self.no_every}; allowed: leave it out")
        if self.every is not None and self.recompress is not None and self.recompress % self.every:
            raise ValueError(
                f"recompress={self.recompress}: tokens join in blocks of every={self.every}; allowed: a multiple of it"
            )
        return self

    @abstractmethod
    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        """The codes of the keys and of the values, one per slot in order; None keeps a tensor as it is.

        Args:
            keys: of the slots, or their latents, without sinks.
            values: of the same slots; None for latents, whose RoPE keys are not compressed.

        Raises:
            UserError: for options that do not fit these tensors.
        """

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """The codes of the compressed tokens and of a block of later ones, which are behind them.

        By default a block is encoded like a prompt, by itself.

        Args:
            keys: of the block, as for `encode`, without sinks and padding.
            values: of the same slots; None for latents.
            codes: of the compressed keys and values. A compressed cache of a file has no other state, so the method may
                use nothing that `prepare` or `watch` computed.

        Returns:
            One code per slot in order. None puts the exact block behind the code.
        """
        k_blocks, v_blocks = self.encode(keys, values)
        return join_all(codes[0], k_blocks), join_all(codes[1], v_blocks)

    def later_queries(self) -> LaterQueries | None:
        """A recorder of the queries of later tokens, for a compressed cache to keep; None: the method needs none."""
        return None

    def kept(self, cached: CompressibleSlots) -> Kept:
        """The tokens that are not evicted; by default all."""
        return Kept()

    @property
    def after_plus(self) -> Any:
        """The method that follows this one after a `+`, or None."""
        return None

    @property
    def encoder(self) -> Compressor:
        """The method that encodes the tokens that are not evicted: this one, or the one that follows it."""
        return self

    def check_follows_eviction(self) -> None:
        """Raise `ValueError` for an option that needs all tokens of the prompt."""

    def shared_rows(self, slots: Sequence[int]) -> list[list[int]]:
        """`slots`, all latents or all not, in groups whose tensors are encoded together, token by token. After an
        evicting method those keep the same tokens; by default each slot by itself."""
        return [[slot] for slot in slots]

    def check_all_sinks(self, tokens: int) -> None:
        """Raise `UserError` if the method cannot store a prefix of `tokens` tokens, all of which are sinks."""

    def landmarks(self, k: Tensor, is_text: Tensor | None) -> Landmarks | None:
        """Summaries of the keys, used to select which tokens a decode step reads; None: it reads all.

        Args:
            k: exact keys (B, n, G, D) after RoPE.
            is_text: (B, n) booleans, False for padding; None: no padding.
        """
        return None

    @property
    def selects_tokens(self) -> bool:
        """Whether a decode step reads only some tokens, and longer passes all: only decode steps show the loss."""
        return False

    @property
    def chooses_for_batch(self) -> bool:
        """Whether a batch has one rank, width or budget for all its sequences, which then depend on each other."""
        return False

    @property
    def encodes_every(self) -> int | None:
        """The number of later tokens after which the entire cache is encoded again; None: it is not."""
        return self.every if self.every is not None and self.joins_by_encoding else self.recompress

    @property
    def absorbs_every(self) -> int | None:
        """The number of later tokens that join by `absorb`; None: none do."""
        return None if self.joins_by_encoding else self.every

    @property
    def pass_size(self) -> int | None:
        """The most tokens of a pass for all of which later tokens are compressed as in decoding; None: any number."""
        return 1 if self.selects_tokens else self.every or self.recompress

    def prepare(self, engine: Engine, ids: Tensor) -> None:
        """Calibrate on `ids` (B, T), tokens that are not scored."""

    @property
    def calibrates(self) -> bool:
        """Whether the method needs `prepare`."""
        return type(self).prepare is not Compressor.prepare

    def watch(self, engine: Engine) -> AbstractContextManager[None]:
        """A context for the passes that fill the cache, in which the method may record what it needs of them."""
        return contextlib.nullcontext()

    @property
    def watches(self) -> bool:
        """Whether the method needs `watch`."""
        return type(self).watch is not Compressor.watch

    def release(self) -> None:
        """Free what `watch` recorded. The watched cache cannot be compressed afterwards; compressed ones still work."""

    def released(self) -> Self:
        """A copy without what `watch` recorded, for a compressed cache to keep."""
        copy = self.model_copy()
        copy.release()
        return copy

    def facts(self) -> dict[str, Any]:
        """Results of `prepare` and choices of `encode` that a record should have, as JSON values."""
        return {}

    @property
    def needed_facts(self) -> frozenset[str]:
        """Keys of `facts` without which a record is of an earlier version, in which the method chose differently."""
        return frozenset()

    def shares(self) -> dict[int, int]:
        """Slots that are not stored: {slot: the stored slot, of a layer below, that is read instead}."""
        return {}

    def weight_bytes(self) -> int:
        """Bytes that the method stores besides the model's weights, once for all caches."""
        return 0

    def transformers_cache(self, cache: Cache, model: PreTrainedModel) -> Any | None:
        """For a method that brings a cache class for transformers models: `cache` copied into it; else None.

        The result has `nbytes()`, `outcome` and `seconds` like `CompressedDynamicCache`, and `tensors()`, those that it
        stores, if they are not the `keys` and `values` of its layers.
        """
        return None


class TensorCoder(ABC):
    """A method that codes each tensor separately, so that it can also code what another method stores."""

    slot_options: ClassVar[frozenset[str]]
    """Options that concern slots or time, which have no meaning for a single tensor."""

    @abstractmethod
    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        """The code of `rows` (B, n, C) fp32; it decodes to (B, n, *width) in `dtype`."""

    def code_all(self, tensors: SlotTensors) -> Codes:
        """The code of every slot's tensor, each separate."""

        def code(stack: SlotTensors) -> Code:
            rows, width = stack.flat(0, padding="repeat"), tuple(stack.data[0].shape[2:])
            return self.code(rows, stack.kind, stack.dtype, width)

        return tensors.code_stacks(code)

    @abstractmethod
    def coded_rows(self, rows: int) -> int:
        """How many of `rows` rows are coded; the last ones may stay exact."""

    def extend(
        self, code: Code, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]
    ) -> Code:
        """`code` with the code of `rows` (B, n, C) fp32 behind it; by default they are coded by themselves."""
        return Joiner().join(code, self.code(rows, kind, dtype, width))


class Codable(Compressor):
    """A method whose stored tensors a `TensorCoder` can quantise further: `xkv:ratio=2+kivi:bits=4`."""

    _coder: TensorCoder | None = PrivateAttr(None)

    @property
    def after_plus(self) -> Any:
        return self._coder

    def coded_by(self, coder: TensorCoder) -> Self:
        """A copy whose stored tensors are coded by `coder`. Raises `ValueError` if there is nothing to code."""
        copy = self.model_copy()
        copy._coder = coder
        return copy

    def extended(self, code: Code, rows: Tensor, dtype: torch.dtype, kind: Literal["k", "v"] = "k") -> Code:
        """`code` of a tensor (B, n, C), exact or coded by the coder, with `rows` (B, m, C) fp32 behind it."""
        if self._coder is None:
            return Joiner().join(code, Exact(rows.to(dtype)))
        return self._coder.extend(code, rows, kind, dtype, (rows.shape[2],))
