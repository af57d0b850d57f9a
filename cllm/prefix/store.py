"""`PrefixStore`: prompts whose beginnings were computed before are not computed again.

    store = PrefixStore(model, "prefixes")
    cache = store.prefill(tokens, salt="alice")      # from the longest stored prefix; the rest is computed and stored
    model.generate(tokens, past_key_values=cache)    # computes the last token of the prompt

A prefix is looked up on the device, then in the host's memory, then on disk, and moves up when it is found.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cllm.cache.accounting import Storage
from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.posthoc.cache import CompressedKVCache, compress_cache
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import parse
from cllm.prefix.at_rest import method_at_rest, pack_at_rest
from cllm.prefix.disk import DiskTier
from cllm.prefix.file import DamagedError, Header, UnwritableError, design_of, open_packed
from cllm.prefix.fingerprint import decoder_of, fingerprint, version
from cllm.prefix.keys import boundaries, chain, salt_digest, seed, token_row
from cllm.prefix.memory import MemoryTier
from cllm.prefix.pack import Packed, describe_method, pack

log = logging.getLogger(__name__)
GIB = 2**30
_CHUNK = 2048
"""Tokens of a prompt that are computed at once."""


@dataclass(frozen=True)
class _Place:
    """Where a prefix is found."""

    name: str
    """Of the stored cache."""
    length: int
    """Tokens of the prefix, at most those of the stored cache."""


class PrefixStore:
    """Stored prefixes of one model, see `cllm.PrefixStore`."""

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] | None = None,
        *,
        posthoc: str | None = None,
        storage: Storage = "model",
        device_bytes: int = 0,
        host_bytes: int = GIB,
        disk_bytes: int = 16 * GIB,
        block: int = 64,
        at_rest: str | None = None,
    ) -> None:
        self.decoder = decoder_of(model)
        self.storage: Storage = storage
        device = next(self.decoder.parameters()).device
        _check_sizes(device_bytes=device_bytes, host_bytes=host_bytes, disk_bytes=disk_bytes)
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise UserError(f"PrefixStore: block is {block!r}; allowed: 1 or more tokens")
        if storage not in ("model", "fp8"):
            raise UserError(f"PrefixStore: storage is {storage!r}; allowed: model, fp8")
        if device_bytes and device.type == "cpu":
            raise UserError(f"PrefixStore: device_bytes is {device_bytes}, but the model is on the CPU; use host_bytes")
        self.method = None if posthoc is None else _method(posthoc, storage)
        self.at_rest = None if at_rest is None else method_at_rest(at_rest, "PrefixStore")
        if at_rest is not None and (posthoc is not None or storage != "model"):
            other = f"posthoc {posthoc}" if posthoc is not None else f"storage {storage}"
            raise UserError(f"PrefixStore: at_rest is {at_rest} and {other}; allowed: one of the two")
        self.block = block
        self._memory = [MemoryTier(device, device_bytes), MemoryTier(torch.device("cpu"), host_bytes)]
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise UserError(f"PrefixStore: folder is a {type(folder).__name__}; allowed: a path, or None")
        self._disk = None if folder is None or not disk_bytes else DiskTier(Path(folder), disk_bytes)
        self._chains: dict[str, dict[int, str]] = {}
        """Of the caches in memory: the names of the prefixes that each can serve."""
        self._lock = threading.RLock()
        self._version: Any = None
        self._fingerprint = ""

    # ---- public ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int] | Tensor, *, salt: str, max_len: int | None = None) -> KVCache:
        """A cache of all tokens of a prompt but the last, for `generate(tokens, past_key_values=...)`.

        Its longest stored prefix is not computed. What is computed is stored. If the folder cannot be written, as when
        the disk is full, that is a warning.

        Args:
            tokens: the prompt, (T,) or (1, T), at least two tokens.
            salt: of the user or group whose prefixes are shared among themselves; '' for everyone.
            max_len: None for a growing cache, or the tokens of a static one.

        Raises:
            UserError: for tokens or a salt that cannot be used, and a prompt beyond the model's context.
        """
        ids = self._row(tokens)
        if len(ids) < 2:
            raise UserError(
                "tokens is a prompt of one token; allowed: two or more, of which the last is left to generate"
            )
        context = self.decoder.config.max_seq_len
        if len(ids) > context:
            raise UserError(
                f"tokens is a prompt of {len(ids)}, but the model's context (model.max_seq_len) is {context}"
            )
        wanted, exact = len(ids) - 1, self.decoder.passes is None
        cache, found = self._find(ids[:wanted], salt, max_len=max_len, partly=exact)
        if cache is None:
            cache = KVCache(self.decoder.config, max_len=max_len, storage=self.storage)
        elif found == wanted:
            return cache
        device = next(self.decoder.parameters()).device
        training = self.decoder.training
        self.decoder.eval()
        try:
            rest = ids[None, found:wanted].to(device)
            self.decoder.prefill(rest, cache, chunk=_CHUNK if exact else None)
        finally:
            self.decoder.train(training)
        if found and (self.method is not None or self.at_rest is not None):
            return cache  # coding what was decoded would add errors to errors
        if self.method is not None:
            room = None if max_len is None else max_len - wanted
            cache = compress_cache(cache, self.method, measure=False, room=room)
        try:
            self.put(cache, ids[:wanted], salt=salt)
        except UnwritableError as error:
            log.warning("a prefix is not stored on disk: %s", error)
        return cache

    def find(self, tokens: Sequence[int] | Tensor, *, salt: str) -> tuple[KVCache | None, int]:
        """The cache of the longest stored prefix of `tokens`, which may be all of them, and its number of tokens.

        None and 0 if there is none. Later tokens may be added to the cache; the stored one is not changed.
        """
        return self._find(self._row(tokens), salt, max_len=None, partly=True)

    def put(self, cache: KVCache, tokens: Sequence[int] | Tensor, *, salt: str) -> None:
        """Store a cache of one sequence without padding, and its tokens.

        Raises:
            UserError: for a cache of another model, of several sequences, with padding, of another number of tokens, of
                another kind than the store's (`posthoc`, `storage`), and as `save_prefix` does.
        """
        ids = self._row(tokens)
        packed = pack(cache) if self.at_rest is None else pack_at_rest(cache, self.at_rest)
        cache.check(self.decoder.config)
        cache.check_plan(self.decoder.plan)
        if cache.batch != 1 or cache.starts is not None:
            padding = " with padding" if cache.starts is not None else ""
            raise UserError(f"the cache holds {cache.batch} sequences{padding}; allowed: one sequence without padding")
        if cache.seen != len(ids):
            raise UserError(
                f"tokens is {len(ids)} tokens, and the cache holds {cache.seen}; allowed: those of the cache"
            )
        mine, given = self._describe(self.method), self._describe(getattr(cache, "method", None))
        if mine != given or (self.method is None and cache.storage != self.storage):
            raise UserError(
                f"the cache is {_kind_text(given, cache.storage)}, and the store is for "
                f"{_kind_text(mine, self.storage)}; use a store of its kind"
            )
        if isinstance(cache, CompressedKVCache) and cache.exact_tokens:
            raise UserError(
                f"the cache has {cache.exact_tokens} tokens after its compressed ones; allowed: a cache as compressed"
            )
        with self._lock:
            start = self._seed(salt)
            lengths = boundaries(len(ids), self.block) if packed.is_croppable else [len(ids)]
            names = chain(start, ids, lengths)
            header = Header(self._fingerprint, design_of(self.decoder), salt_digest(salt), names, {}, {})
            name = names[len(ids)]
            self._keep(name, packed, names)
            if self._disk is not None:
                self._disk.put(name, packed, ids, header)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes in each tier: `device`, `host`, `disk`."""
        device, host = self._memory
        return {"device": device.nbytes, "host": host.nbytes, "disk": 0 if self._disk is None else self._disk.nbytes}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{tier} {count:,}" for tier, count in self.nbytes.items())
        return f"PrefixStore({design_of(self.decoder)}; bytes: {sizes})"

    # ---- lookup ------------------------------------------------------------------------------------------------------

    def _find(self, ids: Tensor, salt: str, *, max_len: int | None, partly: bool) -> tuple[KVCache | None, int]:
        """As `find`; without `partly`, only a prefix of all `ids`."""
        with self._lock:
            for place in self._places(ids, salt, partly):
                packed = self._get(place.name, ids[: place.length])
                if packed is None:
                    continue
                try:
                    cache = open_packed(place.name, packed, self.decoder, length=place.length, max_len=max_len)
                except DamagedError as error:
                    log.warning("a stored prefix is not used: %s", error)
                    self._forget(place.name)
                    continue
                return cache, place.length
        return None, 0

    def _forget(self, name: str) -> None:
        """Count a damaged prefix as missing, so that it is stored again."""
        self._chains.pop(name, None)
        for tier in self._memory:
            tier.drop(name)
        if self._disk is not None:
            self._disk.refuse(name)

    def _places(self, ids: Tensor, salt: str, partly: bool) -> list[_Place]:
        """The stored prefixes of `ids`, longest first."""
        start = self._seed(salt)
        chains = dict(self._chains)
        if self._disk is not None:
            mine = salt_digest(salt)
            headers = self._disk.headers().items()
            chains |= {name: h.chain for name, h in headers if h.salt == mine and h.model == self._fingerprint}
        lengths = {n for names in chains.values() for n in names} if partly else {len(ids)}
        hashes = chain(start, ids, lengths)
        found = [_Place(name, n) for name, names in chains.items() for n, key in names.items() if hashes.get(n) == key]
        return sorted(found, key=lambda place: (-place.length, place.name not in self._chains))

    def _get(self, name: str, ids: Tensor) -> Packed | None:
        """A stored cache, moved up to the highest tier. `ids` are the tokens that it has to begin with."""
        device, host = self._memory
        for tier in self._memory:
            packed = tier.get(name)
            if packed is not None:
                if tier is host and device.budget:
                    self._keep(name, packed, self._chains[name])
                return packed
        read = None if self._disk is None else self._disk.get(name)
        if read is None:
            return None
        packed, tokens = read
        if not torch.equal(tokens.flatten()[: len(ids)], ids):
            return None
        assert self._disk is not None
        header = self._disk.headers().get(name)
        if header is not None and max(device.budget, host.budget) >= packed.nbytes:
            copied = Packed(packed.layout, {key: tensor.clone() for key, tensor in packed.tensors.items()})
            self._keep(name, copied, header.chain)
            return copied
        return packed

    def _keep(self, name: str, packed: Packed, names: dict[int, str]) -> None:
        """Put a cache into the highest tier with room; what leaves a tier goes to the next."""
        device, host = self._memory
        host.drop(name)
        self._chains[name] = names
        left = device.put(name, packed)
        gone = [away for item in left for away in host.put(*item)]
        for away, _ in gone:
            self._chains.pop(away, None)

    # ---- names -------------------------------------------------------------------------------------------------------

    def _seed(self, salt: str) -> bytes:
        """h_0 of this store's caches. The model is hashed again if its weights have changed."""
        now = version(self.decoder)
        if now != self._version:
            self._fingerprint, self._version = fingerprint(self.decoder), now
        kind = [str(self.decoder._dtype()), self.storage, self._describe(self.method)]
        if self.at_rest is not None:
            kind.append(self._describe(self.at_rest))
        return seed(model=self._fingerprint, kind=repr(kind), salt=salt)

    def _describe(self, method: Compressor | None) -> str | None:
        return None if method is None else repr(describe_method(method))

    def _row(self, tokens: Sequence[int] | Tensor) -> Tensor:
        assert self.decoder.config.vocab_size is not None
        return token_row(tokens, self.decoder.config.vocab_size)


def _method(spec: str, storage: Storage) -> Compressor:
    if not isinstance(spec, str):
        raise UserError(
            f"PrefixStore: posthoc is a {type(spec).__name__}; allowed: a method such as xkv:ratio=4, or None"
        )
    method = parse(spec, "PrefixStore: posthoc")
    if method.watches or method.calibrates:
        raise UserError(
            f"PrefixStore: {spec}: calibrates on tokens, so that a prefix depends on others; use another method"
        )
    if storage != "model":
        raise UserError(f"PrefixStore: posthoc is {spec} and storage {storage}; allowed: one of the two")
    return method


def _kind_text(method: str | None, storage: Storage) -> str:
    return f"compressed by {method}" if method is not None else "exact" if storage == "model" else storage


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"PrefixStore: {name} is {value!r}; allowed: bytes, a whole number of 0 or more")
