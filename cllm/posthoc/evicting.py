"""The base of methods that evict tokens from a filled cache: their budgets, and what must be kept together.

Slots that one layer reads together, as keys and values of other layers or as parts of a fusion, keep the same tokens:
they form a *union*. A token that is evicted from a slot is evicted for all layers that read it.

Another method may encode the tokens that are left: `snapkv:ratio=2+xkv:group=4,ratio=2`. Then all KV heads of a slot,
and all slots that it encodes together, keep the same tokens. Attention is summed over them before tokens are chosen.

Shapes: B batch, n tokens of a slot, m of them kept, G KV heads.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.budget import check_all_sinks, largest
from cllm.posthoc.code import Codes
from cllm.posthoc.eviction import Kept, best_entries
from cllm.posthoc.later_queries import LaterQueries
from cllm.posthoc.method import Codable, Compressor, Engine
from cllm.posthoc.readers import RecordedQueries, SlotReader, not_recorded
from cllm.posthoc.slots import CompressibleSlots, SlotTensors
from cllm.posthoc.votes import Votes, layer_votes, total_received

Union = tuple[int, ...]
"""Slots that keep the same tokens."""
SCORE_BYTES = 4
"""Bytes of the score of a token and KV head, if it is stored."""


class Evicting(Codable):
    """A method that keeps the first tokens, the last ones, and those of the highest scores between them."""

    evicts: ClassVar[bool] = True
    joins_by_encoding: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    """Whether scores of kept tokens count at the next eviction (`CompressibleSlots.scores`), with `every`."""

    tokens: int | None = Field(None, ge=1)
    """Tokens that every KV head of a slot keeps of a prompt, sinks included; give it or `ratio`."""
    ratio: float | None = Field(None, ge=1)
    """Bytes of the uncompressed cache over bytes of the compressed one, at this length and before a quantiser after +;
    `tokens` is chosen so."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError("give one of tokens and ratio")
        return self

    _then: Compressor | None = PrivateAttr(None)

    def followed_by(self, method: Compressor) -> Self:
        """A copy whose tokens that are left are encoded by `method`. Raises `ValueError` for a method, or an option of
        it, that needs all tokens."""
        method.check_follows_eviction()
        copy = self.model_copy()
        copy._then = method
        return copy

    @property
    def after_plus(self) -> Any:
        return super().after_plus if self._then is None else self._then

    @property
    def encoder(self) -> Compressor:
        return self if self._then is None else self._then.model_copy(update={"sinks": self.sinks})

    def facts(self) -> dict[str, Any]:
        return {} if self._then is None else self._then.facts()

    @property
    def needed_facts(self) -> frozenset[str]:
        return frozenset() if self._then is None else self._then.needed_facts

    @property
    def chooses_for_batch(self) -> bool:
        return self._then is not None and self._then.chooses_for_batch

    @abstractmethod
    def recent_tokens(self, count: int) -> int:
        """How many last tokens are kept, of `count` that are kept besides the sinks; it may be more than `count`."""

    def scores(self, cached: CompressibleSlots, union: Union) -> Tensor:
        """(B, G or 1, n): the score of every token, 0 or more. By default 0, so that only the last tokens count."""
        slot = cached.slots[union[0]]
        return torch.zeros(slot.k.shape[:2], device=slot.k.device)[:, None]

    def shares_of_budget(self, cached: CompressibleSlots, unions: Sequence[Union]) -> list[float]:
        """Relative numbers of tokens that the unions keep; by default equal."""
        return [1.0] * len(unions)

    def check_all_sinks(self, tokens: int) -> None:
        check_all_sinks(self.name, self.ratio, self.sinks, tokens)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return self._coded(keys), [None] * len(keys.slots) if values is None else self._coded(values)

    def _coded(self, tensors: SlotTensors) -> Codes:
        return [None] * len(tensors.slots) if self._coder is None else self._coder.code_all(tensors)

    @property
    def _stores_scores(self) -> bool:
        return self.accumulates and self.every is not None

    def kept(self, cached: CompressibleSlots) -> Kept:
        unions = self._unions(cached)
        kept_scores: dict[int, Tensor] = {}
        evicting: dict[tuple[Any, ...], list[tuple[Union, Tensor]]] = {}
        for union, count in zip(unions, self._budgets(cached, unions), strict=True):
            one = cached.only(union[0])
            length = one.slots[union[0]].k.shape[1]
            if count >= length and not self._stores_scores:
                continue
            scores = self.scores(cached, union).float()
            if self._stores_scores:
                kept_scores |= dict.fromkeys(union, scores)
            if count < length:
                evicting.setdefault((count, one.first_column, scores.shape, scores.device), []).append((union, scores))
        kept: dict[int, Tensor] = {}
        for (count, *_), alike in evicting.items():
            entries = self._best(cached.only(alike[0][0][0]), torch.stack([scores for _, scores in alike]), count)
            for (union, _), of_union in zip(alike, entries, strict=True):
                kept |= dict.fromkeys(union, of_union)
        return Kept(kept, kept_scores)

    def _best(self, one: CompressibleSlots, scores: Tensor, count: int) -> Tensor:
        """The entries (unions, B, G or 1, count) that unions of one length keep, by their `scores`
        (unions, B, G or 1, n); `one` is a slot of that length."""
        length = scores.shape[-1]
        sinks = one.sinks(self.sinks)
        first = torch.zeros(1, 1, device=scores.device, dtype=torch.long)
        if (is_text := one.is_text(length)) is not None:
            first = length - is_text.sum(1)[:, None, None]
            scores = scores.masked_fill(~is_text[:, None], -1.0)  # only if there are too few others
        columns = torch.arange(length, device=scores.device)
        always = (columns >= first) & (columns < first + sinks.count)
        always = always | (columns >= first) & (columns >= length - self.recent_tokens(count - sinks.count))
        return best_entries(scores.masked_fill(always, torch.inf), count)

    # ---- budgets -----------------------------------------------------------------------------------------------------

    def _budgets(self, cached: CompressibleSlots, unions: Sequence[Union]) -> list[int]:
        """How many tokens each union keeps: with `every` and later tokens, as many as before; or `tokens`, if that is
        more and no token was evicted yet."""
        if self.every is not None and cached.compressed:
            first = [union[0] for union in unions]
            return [max(cached.compressed[j], 0 if j in cached.evicted else self.tokens or 0) for j in first]
        length = next(iter(cached.slots.values())).k.shape[1]
        mean = self.tokens if self.ratio is None else self._tokens_of_ratio(cached, unions)
        assert mean is not None
        least = min(self.sinks, length)
        least = max(least + self.recent_tokens(mean - least), least + 1)
        if mean < min(least, length):
            given = f"tokens={mean}" if self.ratio is None else f"ratio={self.ratio:g}: {mean} tokens are left"
            raise UserError(
                f"{self.name}: {given}: sinks={self.sinks} and the last tokens that are always kept are {least}; "
                f"allowed: {least} tokens or more"
            )
        shares = self.shares_of_budget(cached, unions)
        widths = [sum(_width(cached, slot) for slot in union) for union in unions]
        if len(set(shares)) == 1:
            return [min(mean, length)] * len(unions)

        def counts(factor: float) -> list[int]:
            return [min(max(int(factor * share), least), length) for share in shares]

        def cost(factor: float) -> float:
            return sum(count * width for count, width in zip(counts(factor), widths, strict=True))

        factor = largest(cost, mean * sum(widths), length / min(shares))
        return [min(mean, length)] * len(unions) if factor is None else counts(factor)

    def _tokens_of_ratio(self, cached: CompressibleSlots, unions: Sequence[Union]) -> int:
        """Tokens of a slot at which the entire cache has the bytes that `ratio` allows."""
        assert self.ratio is not None
        length = next(iter(cached.slots.values())).k.shape[1]
        batch = len(next(iter(cached.slots.values())).k)
        left = cached.cache_bytes / self.ratio - cached.incompressible_bytes
        width = sum(_width(cached, slot) for slot in cached.slots)
        if self._stores_scores:
            width += sum(self._choices(cached, union) * SCORE_BYTES for union in unions)
        tokens = int(left / batch / width + 1e-6)
        if tokens < 1:
            share = cached.incompressible_bytes / cached.cache_bytes
            raise UserError(
                f"{self.name}: ratio={self.ratio:g}: at {length} tokens {share:.0%} of the cache stay as they are "
                f"(windows, states), and no token is left; allowed: a lower ratio"
            )
        return tokens

    # ---- unions ------------------------------------------------------------------------------------------------------

    def _unions(self, cached: CompressibleSlots) -> list[Union]:
        """The slots of `cached` in unions.

        Raises:
            UserError: for a layer that reads slots by their columns, which eviction changes: through a window, or
                together with slots that cannot be compressed.
        """
        union_of = {slot: {slot} for slot in cached.slots}
        for read in cached.reads:
            own = [slot for slot in read.slots if slot in cached.slots]
            if own and read.window is not None:
                raise UserError(
                    f"{self.name}: layer {read.layer} reads slot {own[0]} through a window of {read.window} tokens, "
                    "and an evicted slot has no columns to count; allowed: layers without windows"
                )
            if own and len(own) < len(read.slots):
                other = next(slot for slot in read.slots if slot not in cached.slots)
                raise UserError(
                    f"{self.name}: layer {read.layer} reads slot {own[0]} together with slot {other}, which keeps "
                    "other tokens (a window or a state); allowed: layers that read slots of one kind"
                )
            _join(own, union_of)
        if self._then is not None:
            for kind in (cached.slots.keys() - cached.latent, cached.latent):
                for group in self._then.shared_rows(sorted(kind)):
                    _join(group, union_of)
        return sorted({tuple(sorted(union)) for union in union_of.values()})

    def _choices(self, cached: CompressibleSlots, union: Union) -> int:
        """How many choices of tokens a union has: one for each KV head, or one for all of them."""
        return cached.slots[union[0]].k.shape[2] if self._then is None else 1


def _join(slots: Sequence[int], union_of: dict[int, set[int]]) -> None:
    """Make the unions of `slots` one."""
    joined = set().union(*(union_of[slot] for slot in slots))
    for slot in joined:
        union_of[slot] = joined


def _width(cached: CompressibleSlots, slot: int) -> int:
    """Bytes of one token of a slot."""
    k, v = cached.slots[slot][:2]
    return sum(t[0, :1].numel() * t.itemsize for t in (k, v))


class Voting(Evicting):
    """An evicting method whose scores are the attention of the prompt's own queries, of all layers that read a slot."""

    _queries: RecordedQueries = PrivateAttr(default_factory=RecordedQueries)
    _readers: dict[int, list[SlotReader]] = PrivateAttr(default_factory=dict)
    _votes: dict[Union, list[Votes]] = PrivateAttr(default_factory=dict)
    """Of the cache whose tokens are chosen."""

    needs_entropy: ClassVar[bool] = False
    """Whether votes are needed with their entropy."""

    @property
    @abstractmethod
    def observed(self) -> int | None:
        """How many last queries of the prompt vote; None: all."""

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Record queries while the cache is filled."""
        try:
            self._readers = {slot: engine.readers(slot) for slot in engine.slots()}
        except UserError as error:
            raise UserError(f"{self.name}: the queries that meet a slot's keys are needed: {error}") from None
        self._queries = RecordedQueries(self.observed, self.name)
        with engine.all_tokens(), self._queries.record(self._readers):
            yield

    def release(self) -> None:
        self._queries, self._readers = RecordedQueries(self.observed, self.name), {}

    def later_queries(self) -> LaterQueries | None:
        return None if self.every is None else LaterQueries(self._readers, self.observed)

    def votes(self, cached: CompressibleSlots, union: Union) -> list[Votes]:
        """Of all layers that read slots of `union`. Those of all unions are computed together."""
        if union not in self._votes:
            self._votes = self._all_votes(cached)
        return self._votes[union]

    def _all_votes(self, cached: CompressibleSlots) -> dict[Union, list[Votes]]:
        queries: RecordedQueries | LaterQueries = self._queries
        readers: Mapping[int, Sequence[SlotReader]] = self._readers
        if cached.later is not None:
            queries, readers = cached.later, cached.later.readers
        elif cached.evicted:
            raise UserError(
                f"{self.name}: tokens of the cache were evicted before, for which no query can vote; allowed: an exact "
                "cache"
            )
        layers: dict[int, CompressibleSlots] = {}
        of_union: dict[Union, list[int]] = {}
        for union in self._unions(cached):
            of_union[union] = sorted({reader.layer for slot in union for reader in readers.get(slot, ())})
            if not of_union[union]:
                raise UserError(not_recorded(self.name))
            evicted = {slot: cached.evicted[slot] for slot in union if slot in cached.evicted}
            read = dataclasses.replace(cached, slots={slot: cached.slots[slot] for slot in union}, evicted=evicted)
            layers |= dict.fromkeys(of_union[union], read)
        votes = layer_votes(layers, readers, queries, self.name, entropy=self.needs_entropy)
        return {union: [votes[layer] for layer in found] for union, found in of_union.items()}

    def kept(self, cached: CompressibleSlots) -> Kept:
        self._votes = {}  # a new one, because copies of the method have the old one
        try:
            return super().kept(cached)
        finally:
            self._votes = {}

    def received(self, cached: CompressibleSlots, union: Union) -> Tensor:
        """(B, G or 1, n) fp32: the attention that tokens get, summed over queries, layers, and the heads of a KV head;
        or of all of them, if they keep the same tokens."""
        choices = self._choices(cached, union)
        return total_received(self.votes(cached, union)).unflatten(1, (choices, -1)).sum(2)


class VotingWindow(Voting):
    """An evicting method in which the last tokens of the prompt vote, and are kept."""

    no_recompress: ClassVar[str | None] = "the queries of later tokens are not recorded, and votes are the prompt's"

    window: int = Field(32, ge=1)
    """Last tokens, which vote and are kept."""

    @property
    def observed(self) -> int | None:
        return self.window

    def recent_tokens(self, count: int) -> int:
        return self.window
