"""Names of prefixes: SHA-256 over everything that a cache depends on, then over the tokens.

    h_0 = hash(format, model, kind of cache, salt)        h_n = hash(h_0, first n tokens)

Two prefixes have the same name only if the model, the kind of cache, the salt and all tokens are equal. The hashes of a
prompt at every length that a store knows are computed in one pass over its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cllm.errors import UserError


def salt_digest(salt: str) -> str:
    """SHA-256 of a salt, which is written into files instead of it.

    Raises:
        UserError: for a salt that is not text, or has half of a surrogate pair in it.
    """
    if not isinstance(salt, str):
        raise UserError(f"salt is a {type(salt).__name__}; allowed: text, '' for prefixes that all may share")
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise UserError(f"salt is {salt[:80]!r}, which cannot be written as UTF-8; allowed: other text") from None
    return hashlib.sha256(f"cllm.prefix salt\n{salt}".encode()).hexdigest()


def seed(*, model: str, kind: str, salt: str) -> bytes:
    """h_0: 32 bytes.

    Args:
        model: the model's fingerprint.
        kind: of the cache: dtype, storage, and method of compression.
        salt: of the user or group whose prefixes are shared among themselves.
    """
    text = json.dumps(["cllm.prefix", model, kind, salt_digest(salt)])
    return hashlib.sha256(text.encode()).digest()


def chain(start: bytes, tokens: Tensor, lengths: Iterable[int]) -> dict[int, str]:
    """h_n, 64 hexadecimal digits, of `tokens` (T,) int64 for every n in `lengths` from 1 to T."""
    content = tokens.to(torch.int64).cpu().contiguous().numpy().data
    digest, done, found = hashlib.sha256(start), 0, {}
    for length in sorted({n for n in lengths if 1 <= n <= len(tokens)}):
        digest.update(content[done:length])
        done = length
        found[length] = digest.hexdigest()
    return found


def boundaries(length: int, block: int) -> list[int]:
    """The lengths at which a prefix of `length` tokens may be found: multiples of `block`, and `length` itself."""
    return [*range(block, length, block), length]


def token_row(tokens: Sequence[int] | Tensor, vocab_size: int, name: str = "tokens") -> Tensor:
    """`tokens` (T,) or (1, T) as int64 (T,) on the CPU.

    Raises:
        UserError: for tokens that are not whole numbers, not one sequence, none, or not in the vocabulary.
    """
    try:
        row = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} is a {type(tokens).__name__}; allowed: token ids, (T,) or (1, T)") from None
    shape = tuple(row.shape)
    if not row.numel():
        raise UserError(f"{name} is empty; allowed: one or more token ids")
    if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool or row.ndim not in (1, 2):
        raise UserError(
            f"{name} is {shape} {str(row.dtype).removeprefix('torch.')}; allowed: token ids, (T,) or (1, T)"
        )
    if row.ndim == 2 and shape[0] != 1:
        raise UserError(f"{name} is {shape}; allowed: one sequence of one or more tokens, (T,) or (1, T)")
    row = row.flatten().to("cpu", torch.int64)
    if not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
        wrong = int(row.min()) if int(row.min()) < 0 else int(row.max())
        raise UserError(f"{name} has {wrong}; allowed: token ids from 0 to {vocab_size - 1}")
    return row
