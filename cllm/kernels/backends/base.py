"""What a backend is, and the static facts by which one is chosen.

Shapes: B batch, T queries, S keys, H query heads, G KV heads, D channels of a query and key head, E channels of a value
head.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels.backends.mask import Mask

Lengths = Literal["T = S", "T < S", "T = 1"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of call. Nothing here changes from batch to batch, so a choice made by it may be compiled in."""

    device: torch.device
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None where there is none."""
    dtype: torch.dtype
    head_dim: int
    """D."""
    value_dim: int
    """E."""
    heads_per_kv_head: int = 1
    """H / G."""
    lengths: Lengths = "T = S"
    """How many queries there are; "T = 1" where both hold."""
    window: bool = False
    exclude_self: bool = False
    blind: bool = False
    """No query sees any key: `exclude_self` with a window of 1."""
    documents: bool = False
    grad: bool = True
    """A backward pass will follow."""

    @property
    def is_plain(self) -> bool:
        """Nothing but causal."""
        return not (self.window or self.exclude_self or self.documents)

    def __str__(self) -> str:
        """For the log: mask, heads, dtype, device."""
        rules = ["causal"] + [rule for rule in ("window", "exclude_self", "documents") if getattr(self, rule)]
        rules += [self.lengths] * (self.lengths != "T = S")
        dims = f"D {self.head_dim}" if self.head_dim == self.value_dim else f"D {self.head_dim}, E {self.value_dim}"
        grouped = "" if self.heads_per_kv_head == 1 else f", {self.heads_per_kv_head} query heads a KV head"
        where = self.device.type if self.capability is None else "sm_{}{}".format(*self.capability)
        return f"{' + '.join(rules)}, {dims}{grouped}, {str(self.dtype).removeprefix('torch.')} on {where}"


def heads_per_kv_head(q: Tensor, k: Tensor) -> int:
    """H / G. Where the compiler has made a size symbolic, this makes the number a constant again."""
    return operator.index(q.shape[2] // k.shape[2])


class Backend(ABC):
    """One way to compute attention. `available` and `unsupported` answer None for yes, or the reason for no."""

    name: str

    @abstractmethod
    def available(self) -> str | None:
        """Why this backend cannot run here at all, or None. The first call may import packages."""

    @abstractmethod
    def unsupported(self, case: Case) -> str | None:
        """Why this backend does not compute `case`, or None; from facts alone, whether it is installed or not."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """softmax(scale q kᵀ + mask) v: (B, T, H, D), (B, S, G, D), (B, S, G, E) to (B, T, H, E)."""


class FlashBackend(Backend):
    """What FlashAttention-like kernels have in common: half precision, causal with a window, dense or varlen.

    They know no `exclude_self`. Query t sees keys t - w + 1 to t - 1 under a window of w: that is what query t - 1 sees
    with itself included and a window of w - 1. So queries are moved one place to the left, and outputs one place back;
    the first output of each document, which belongs to a query that sees nothing, becomes zero.
    """

    min_capability: tuple[int, int] = (8, 0)
    same_head_dims = True
    """The kernel wants E = D: values are padded with zeros."""
    max_head_dim = 256

    def unsupported(self, case: Case) -> str | None:
        """See `Backend`."""
        if case.capability is None:
            return "needs a CUDA device"
        if case.dtype not in HALF:
            return f"computes float16 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"
        if case.capability < self.min_capability:
            return "needs sm_{}{} or newer".format(*self.min_capability)
        if case.head_dim % 8 or case.value_dim % 8:
            return "needs head dims that are multiples of 8"
        if max(case.head_dim, case.value_dim) > self.max_head_dim:
            return f"has head dims up to {self.max_head_dim}"
        if self.same_head_dims and case.value_dim > case.head_dim:
            return "needs value heads no wider than key heads"
        if case.documents and case.lengths != "T = S":
            return "needs as many queries as keys with documents"
        if case.blind:
            return "no query sees a key"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """See `Backend`."""
        value_dim, documents, window = v.shape[-1], mask.boundaries(), mask.window
        if self.same_head_dims and value_dim < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - value_dim))
        move = mask.exclude_self and q.shape[1] == k.shape[1]
        if mask.exclude_self:
            window = None if window is None else window - 1
            if move:
                q = q.roll(-1, dims=1)
            else:  # T < S: without the last key, every query stands one place after the last key it may see
                k, v = k[:, :-1], v[:, :-1]
        if documents is None:
            out = self.dense(q, k, v, scale, window)
        else:
            shape, q, k, v = q.shape[:2], q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            out = self.packed(q, k, v, documents.cu_seqlens, documents.max_len, scale, window).unflatten(0, shape)
        if move:
            out = F.pad(out[:, :-1], (0, 0, 0, 0, 1, 0))
            if documents is not None:
                out = out.masked_fill(documents.starts[..., None, None], 0)
        return out[..., :value_dim]

    @abstractmethod
    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal attention, the last query at the last key: (B, T, H, D), (B, S, G, D), (B, S, G, E)."""

    @abstractmethod
    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention within documents: (B·T, H, D), (B·T, G, D), (B·T, G, E) and int32 boundaries (N + 1,)."""


def distribution(*names: str) -> importlib.metadata.Distribution | None:
    """The first of these distributions that is installed. Unlike `find_spec`, which finds a package `flash_attn` with
    any of its distributions, metadata tells flash-attn and flash-attn-4 apart."""
    for name in names:
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def load(names: Sequence[str], modules: Sequence[str], wanted: Sequence[str]) -> ModuleType | str:
    """The module of an installed distribution, or the reason why there is none.

    Args:
        names: distributions, any of which will do.
        modules: modules, the first of which that imports is taken.
        wanted: attributes that the module must have.
    """
    found = distribution(*names)
    if found is None:
        return f"{names[0]} is not installed"
    title, reason = f"{names[0]} {found.version}", ""
    for module in modules:
        if (stale := overwritten(found, module)) is not None:
            return f"{title} is damaged: {stale}"
        try:
            loaded = importlib.import_module(module)
        except Exception as error:  # a broken binary raises anything, AttributeError and RuntimeError included
            reason = reason or f"{title} does not import: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if stale := elsewhere(found, loaded):
            return f"{title} is hidden: {stale}"
        if missing := [name for name in wanted if not hasattr(loaded, name)]:
            return f"{title} has no {', '.join(missing)} in {module}"
        return loaded
    return reason


def overwritten(found: importlib.metadata.Distribution, module: str) -> str | None:
    """A reason if the file of `module` is not the one that the distribution installed, by the hash in its RECORD: old
    flash-attn wheels bring a flash_attn/cute of their own."""
    wanted = module.replace(".", "/") + ".py"
    for file in found.files or ():
        if file.as_posix() == wanted and file.hash is not None and file.hash.mode == "sha256":
            path = Path(str(found.locate_file(file)))
            if not path.is_file():
                return f"{path} is missing"
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            if digest != file.hash.value:
                return f"another package has overwritten {path}"
    return None


def elsewhere(found: importlib.metadata.Distribution, module: ModuleType) -> str | None:
    """A reason if `module` was imported from a file outside of the distribution that should bring it."""
    wanted = module.__name__.replace(".", "/") + ".py"
    for file in found.files or ():
        if file.as_posix() == wanted:
            expected = Path(str(found.locate_file(file))).resolve()
            actual = Path(module.__file__ or "").resolve()
            return None if expected == actual else f"{module.__name__} comes from {actual}"
    return None
