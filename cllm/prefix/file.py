"""One stored prefix as a safetensors file.

The tensors are the cache's, as `pack.py` names them, and `tokens`. The metadata has two keys. `cllm.prefix` is a JSON
header: the version of this format, the model's fingerprint, the salt's digest, the layout of the cache and the SHA-256
of every tensor. `sha256` is that of the header. Nothing in a file is ever unpickled or imported.

Reading maps the file into memory: tensors on the CPU are views of the map, whose pages are read when they are needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cllm.cache.cache import KVCache, check_max_len
from cllm.errors import UserError
from cllm.files import write_atomic
from cllm.prefix.at_rest import method_at_rest, pack_at_rest, unpack_at_rest
from cllm.prefix.fingerprint import decoder_of, fingerprint, sha256_of_all
from cllm.prefix.keys import salt_digest
from cllm.prefix.pack import Packed, pack, unpack
from cllm.trust import reason

VERSION = 1
"""Of the format. A reader refuses every other."""
MARK = "cllm.prefix"
"""The metadata key of the header. Only files that have it are ever deleted."""


@dataclass(frozen=True)
class Header:
    """The header of a file, before its tensors are read."""

    model: str
    """The model's fingerprint."""
    design: str
    """The KV plan in words, for messages."""
    salt: str
    """Digest of the salt."""
    chain: dict[int, str]
    """Names of the prefixes that the file can serve, by their tokens (`keys.py`); empty outside of a store."""
    layout: dict[str, Any]
    sha256: dict[str, str]
    """Of every tensor."""
    version: int = VERSION

    def check(self) -> None:
        """Raise `ValueError` if a value that is read before the tensors is of another kind."""
        texts = (self.model, self.design, self.salt, *self.chain.values(), *self.sha256.values())
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong or not isinstance(self.layout, dict) or type(self.layout.get("seen")) is not int:
            raise ValueError("its header has values of other types")


class UnwritableError(UserError):
    """A file that cannot be written, for example because the disk is full."""


class DamagedError(UserError):
    """A stored prefix whose content is not what its header says."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_prefix(path: Path, packed: Packed, tokens: Tensor, header: Header) -> int:
    """Write a file atomically. Returns its bytes. `header.sha256` is filled in.

    Raises:
        UnwritableError: naming the file, if it cannot be written; an older file is then unchanged.
    """
    tensors = _separate({**packed.tensors, "tokens": tokens.contiguous()})
    digests = dict(zip(tensors, sha256_of_all(tensors.values()), strict=True))
    content = {**vars(header), "sha256": digests, "layout": packed.layout}
    text = json.dumps(content)
    data = save(tensors, {MARK: text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    try:
        write_atomic(path, data)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise UnwritableError(f"{path}: cannot be written: {reason(error)}") from None
    return len(data)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, no two of them in one storage, as the format wants it."""
    used: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in used else tensor
        used.add(address)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------


class PrefixFile:
    """An open file of a prefix, for a `with` block. Header and tensors are of one file, even if another process deletes
    or replaces it meanwhile.

    Raises:
        FileNotFoundError: if it is missing.
        UserError: naming the file, if it is damaged, no prefix, or of another format version.
    """

    header: Header
    identity: tuple[int, str]
    """Inode and SHA-256 of the header, which has those of the tensors."""

    def __init__(self, path: Path):
        self.path = path
        # A named pipe would be waited for without O_NONBLOCK.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise UserError(f"{path}: is no regular file; allowed: a file of a stored prefix")
            # safetensors opens a path twice. By its descriptor, both are the same file.
            self._file = _open(path, f"/dev/fd/{self._descriptor}")
            metadata = self._file.metadata() or {}
            self.header = _parse_header(path, metadata)
            self.identity = (os.fstat(self._descriptor).st_ino, metadata["sha256"])
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> PrefixFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def touch(self) -> None:
        """Count the file as used now, unless this process may not."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def read(self, *, check: bool = True) -> tuple[Packed, Tensor]:
        """The packed cache, views of a map of the file that outlive the block, and its tokens.

        Args:
            check: compare the SHA-256 of every tensor, which reads the entire file.

        Raises:
            UserError: naming the file, if it is damaged.
        """
        try:
            tensors = {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot be read: {reason(error)}") from None
        if tensors.keys() != self.header.sha256.keys():
            raise UserError(f"{self.path}: damaged: its tensors are not those of its header")
        if check:
            for name, found in zip(tensors, sha256_of_all(tensors.values()), strict=True):
                if found != self.header.sha256[name]:
                    raise UserError(f"{self.path}: damaged: the tensor {name} has another sha256 than its header says")
        tokens = tensors.pop("tokens")
        return Packed(self.header.layout, tensors), tokens


def read_header(path: Path) -> Header:
    """The header of a file. Errors are those of `PrefixFile`."""
    with PrefixFile(path) as file:
        return file.header


def _open(path: Path, opened: str) -> Any:
    try:
        return safe_open(opened, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def _parse_header(path: Path, metadata: Mapping[str, str]) -> Header:
    if MARK not in metadata:
        raise UserError(f"{path}: is no stored prefix; allowed: a file that cllm.save_prefix or a PrefixStore wrote")
    text = metadata[MARK]
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise UserError(f"{path}: damaged: its header has another sha256 than it says")
    try:
        content = dict(json.loads(text))
        version = content.get("version")
        if version == VERSION:
            header = Header(**{**content, "chain": {int(n): name for n, name in content["chain"].items()}})
            header.check()
            return header
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {reason(error)}") from None
    raise UserError(f"{path}: has the format version {version}; allowed: {VERSION}; store it again")


# ---- single files ----------------------------------------------------------------------------------------------------


def save_prefix(
    path: str | os.PathLike[str],
    cache: KVCache,
    model: nn.Module,
    tokens: Any,
    *,
    salt: str = "",
    at_rest: str | None = None,
) -> None:
    """Write a filled cache and its tokens to a file that `load_prefix` reads; see `cllm.save_prefix`."""
    decoder = decoder_of(model)
    packed = pack(cache) if at_rest is None else pack_at_rest(cache, method_at_rest(at_rest, "save_prefix"))
    cache.check(decoder.config)
    cache.check_plan(decoder.plan)
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"tokens is a {type(tokens).__name__}; allowed: the token ids of the cache") from None
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.shape != (cache.batch, cache.seen) or ids.is_floating_point():
        raise UserError(
            f"tokens is {tuple(ids.shape)}; allowed: those of the cache, ({cache.batch}, {cache.seen}), and padding"
        )
    header = Header(fingerprint(decoder), design_of(decoder), salt_digest(salt), {}, {}, {})
    write_prefix(Path(path), packed, ids.to("cpu", torch.int64), header)


def load_prefix(
    path: str | os.PathLike[str], model: nn.Module, *, salt: str = "", max_len: int | None = None
) -> tuple[KVCache, Tensor]:
    """Read a cache and its tokens from a file; see `cllm.load_prefix`."""
    decoder, name = decoder_of(model), Path(path)
    try:
        with PrefixFile(name) as file:
            check_header(name, file.header, model=fingerprint(decoder), salt=salt, decoder=decoder)
            packed, tokens = file.read()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {reason(error)}") from None
    return open_packed(name, packed, decoder, max_len=max_len), tokens


def open_packed(
    path: Path | str, packed: Packed, decoder: Any, *, length: int | None = None, max_len: int | None = None
) -> KVCache:
    """`unpack` on the decoder's device, of the first `length` tokens only unless that is None.

    Raises:
        DamagedError: naming the path.
        UserError: as `unpack` does.
    """
    check_max_len(max_len)
    device = next(decoder.parameters()).device
    try:
        if length is not None and length != packed.seen:
            packed = packed.cropped(length)
        read = unpack_at_rest if "at_rest" in packed.layout else unpack
        return read(packed.to(device), decoder.config, max_len=max_len)
    except (UserError, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError, RuntimeError) as error:
        raise DamagedError(f"{path}: damaged: {reason(error)}") from None


def check_header(path: Path, header: Header, *, model: str, salt: str, decoder: Any) -> None:
    """Refuse the prefix of another model, or of another salt.

    Raises:
        UserError: naming the file and which of the two it is.
    """
    if header.model != model:
        plan = design_of(decoder)
        other = f"a model of {header.design}, and this one is of {plan}" if header.design != plan else "other weights"
        raise UserError(f"{path}: is the cache of another model: {other}; allowed: the model that filled it")
    if header.salt != salt_digest(salt):
        raise UserError(f"{path}: was stored with another salt; give the one that it was stored with")


def design_of(decoder: Any) -> str:
    """The model in a few words."""
    config = decoder.config
    return f"{config.design}, {config.n_layers} layers, d_model {config.d_model}"
