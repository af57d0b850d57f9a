"""The interface of attention backends, the facts by which one is chosen, and checks of installed packages.

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

from cllm.config import BackendName
from cllm.kernels.backends.mask import Mask
from cllm.signals import raise_if_stopped

Lengths = Literal["T = S", "T < S", "T = 1"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of call. These facts do not change from batch to batch, so that a compiled graph may fix the choice."""

    device: torch.device
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None on other devices."""
    dtype: torch.dtype
    head_dim: int
    """D."""
    value_dim: int
    """E."""
    heads_per_kv_head: int = 1
    """H / G."""
    lengths: Lengths = "T = S"
    """The number of queries; "T = 1" also for a single key."""
    window: bool = False
    exclude_self: bool = False
    sees_nothing: bool = False
    """No query sees any key: `exclude_self` with a window of 1."""
    documents: bool = False
    grad: bool = True
    """A backward pass will follow."""
    lse: bool = False
    """The log-sum-exp of the scores is needed too."""

    @property
    def is_plain(self) -> bool:
        """Whether the mask is only causal."""
        return not (self.window or self.exclude_self or self.documents)

    def __str__(self) -> str:
        """For the log: mask, heads, dtype, device."""
        rules = ["causal"] + [rule for rule in ("window", "exclude_self", "documents") if getattr(self, rule)]
        rules += [self.lengths] * (self.lengths != "T = S") + ["log-sum-exp"] * self.lse
        dims = f"D {self.head_dim}" if self.head_dim == self.value_dim else f"D {self.head_dim}, E {self.value_dim}"
        grouped = "" if self.heads_per_kv_head == 1 else f", {self.heads_per_kv_head} query heads a KV head"
        where = self.device.type if self.capability is None else "sm_{}{}".format(*self.capability)
        return f"{' + '.join(rules)}, {dims}{grouped}, {str(self.dtype).removeprefix('torch.')} on {where}"


def heads_per_kv_head(q: Tensor, k: Tensor) -> int:
    """H / G. If the compiler has made a size symbolic, this turns the number into a constant."""
    return operator.index(q.shape[2] // k.shape[2])


class Backend(ABC):
    """One way to compute attention. `unavailable` and `unsupported` return a reason against it, or None."""

    name: BackendName
    returns_lse: bool = False
    """It has `forward` and `backward`, by which parts of one softmax are merged (`kernels/joint.py`)."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """The reason why this backend cannot run on this machine, or None. The first call may import packages."""

    @abstractmethod
    def unsupported(self, case: Case) -> str | None:
        """The reason why this backend does not compute `case`, or None, whether or not it is installed."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """softmax(scale q kᵀ + mask) v: (B, T, H, D), (B, S, G, D), (B, S, G, E) to (B, T, H, E)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """`run` and the log-sum-exp of the scores (B, H, T) fp32, to base e; not recorded by autograd."""
        raise NotImplementedError(self.name)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for q, k and v of P v, where P = exp(scale q kᵀ + mask - lse): P need not sum to 1.

        `out` (B, T, H, E) and `lse` (B, H, T) may be those of a softmax over more keys, of which these are a part.
        """
        raise NotImplementedError(self.name)


class FlashBackend(Backend):
    """Base of FlashAttention-like kernels: half precision, causal with a window, dense or varlen.

    They have no `exclude_self`. With it and a window of w, query t sees keys t - w + 1 to t - 1; without it, query
    t - 1 sees the same keys in a window of w - 1. So queries are shifted one position to the left, and outputs are
    shifted back. The first output of each document belongs to a query that sees nothing, and becomes zero.
    """

    min_capability: tuple[int, int] = (8, 0)
    same_head_dims = True
    """The kernel needs E = D, so that values are padded with zeros."""
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
            return f"supports head dims up to {self.max_head_dim}"
        if self.same_head_dims and case.value_dim > case.head_dim:
            return "needs value heads no wider than key heads"
        if case.documents and case.lengths != "T = S":
            return "needs as many queries as keys with documents"
        if case.sees_nothing:
            return "no query sees a key"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """See `Backend`."""
        value_dim, documents, window = v.shape[-1], mask.boundaries(), mask.window
        if self.same_head_dims and value_dim < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - value_dim))
        shift = mask.exclude_self and q.shape[1] == k.shape[1]
        if mask.exclude_self:
            window = None if window is None else window - 1
            if shift:
                q = q.roll(-1, dims=1)
            else:  # T < S: without the last key, each query is aligned with the key before its own
                k, v = k[:, :-1], v[:, :-1]
        if documents is None:
            out = self.dense(q, k, v, scale, window)
        else:
            shape, q, k, v = q.shape[:2], q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            out = self.packed(q, k, v, documents.cu_seqlens, documents.max_len, scale, window).unflatten(0, shape)
        if shift:
            out = F.pad(out[:, :-1], (0, 0, 0, 0, 1, 0))
            if documents is not None:
                out = out.masked_fill(documents.starts[..., None, None], 0)
        return out[..., :value_dim]

    @abstractmethod
    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal attention of (B, T, H, D), (B, S, G, D), (B, S, G, E). The last query is at the last key."""

    @abstractmethod
    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention within documents: (B·T, H, D), (B·T, G, D), (B·T, G, E) and boundaries (N + 1,) int32."""


def distribution(*names: str) -> importlib.metadata.Distribution | None:
    """The first of these distributions that is installed, or None.

    flash-attn and flash-attn-4 both install a package `flash_attn`; only the metadata distinguishes them.
    """
    for name in names:
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def load(names: Sequence[str], modules: Sequence[str], wanted: Sequence[str]) -> ModuleType | str:
    """A module of an installed distribution, or the reason why it cannot be used.

    Args:
        names: alternative names of the distribution.
        modules: alternative modules; the first that imports is returned.
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
            raise_if_stopped(error)
            reason = reason or f"{title} does not import: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if stale := elsewhere(found, loaded):
            return f"{title} is hidden: {stale}"
        if missing := [name for name in wanted if not hasattr(loaded, name)]:
            return f"{title} has no {', '.join(missing)} in {module}"
        return loaded
    return reason


def overwritten(found: importlib.metadata.Distribution, module: str) -> str | None:
    """A reason if another package has overwritten the file of `module`, by the hash in the distribution's RECORD.

    Old flash-attn wheels contain another flash_attn/cute.
    """
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
    """A reason if `module` was imported from a file that does not belong to the distribution."""
    wanted = module.__name__.replace(".", "/") + ".py"
    for file in found.files or ():
        if file.as_posix() == wanted:
            expected = Path(str(found.locate_file(file))).resolve()
            actual = Path(module.__file__ or "").resolve()
            return None if expected == actual else f"{module.__name__} comes from {actual}"
    return None
