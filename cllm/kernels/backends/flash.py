"""The FlashAttention packages 2 and 3, by their public functions.

Both register their kernels as operators of torch, so they stay inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from cllm.kernels.backends.base import Case, FlashBackend, load


class _Package(FlashBackend):
    distributions: Sequence[str]
    modules: Sequence[str]

    def __init__(self) -> None:
        self._module: ModuleType | str | None = None

    def unavailable(self) -> str | None:
        """See `Backend`. The package must be installed, not hidden by another, and import."""
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        if self._module is None:
            wanted = ("flash_attn_func", "flash_attn_varlen_func")
            self._module = load(self.distributions, self.modules, wanted)
        return self._module if isinstance(self._module, str) else None

    def dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """See `FlashBackend`."""
        assert isinstance(self._module, ModuleType), "unavailable() imports the package"
        out = self._module.flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, window: int | None
    ) -> Tensor:
        """See `FlashBackend`."""
        assert isinstance(self._module, ModuleType), "unavailable() imports the package"
        out = self._module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_len,
            max_len,
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out


class Flash2(_Package):
    """FlashAttention-2 (arXiv 2307.08691), package flash-attn."""

    name = "flash2"
    distributions = ("flash-attn",)
    modules = ("flash_attn.flash_attn_interface",)


class Flash3(_Package):
    """FlashAttention-3 (arXiv 2407.08608), package flash-attn-3: Hopper only."""

    name = "flash3"
    distributions = ("flash-attn-3", "flashattn-hopper")
    modules = ("flash_attn_3.flash_attn_interface", "flash_attn_interface")
    min_capability = (9, 0)

    def unsupported(self, case: Case) -> str | None:
        """See `Backend`."""
        reason = super().unsupported(case)
        if reason is None and case.capability is not None and case.capability[0] != 9:
            return "runs on sm_90 only"
        return reason
