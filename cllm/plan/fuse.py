"""`Fuse`, the read that sums several owners' slots with learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from cllm.errors import PlanError
from cllm.plan.kinds import Half, Read
from cllm.section import Section

Granularity = Literal["scalar", "channel", "complex", "matrix"]
FusionInit = Literal["lite", "randn", "mean"]


@dataclass(frozen=True, slots=True)
class Fuse(Read):
    """Read a sum over owners with learned weights, K = Σ_j a_j ⊙ K_j (FusedKV, arXiv 2512.03870, eq. 3).

    Complex weights of keys multiply rotated pairs as complex numbers: a rotation and a scale, which commute with RoPE.
    Matrix weights of values are V = Σ_j V_j B_j. Both contain the real weights of `channel` as special cases.
    """

    layers: tuple[int, ...]
    granularity: Granularity = "channel"
    """`channel`: a weight for every channel (for keys: for every rotated pair); `scalar`: one for the whole head;
    `complex`, only for keys: a complex weight for every rotated pair; `matrix`, only for values: (D, D)."""
    per_head: bool = False
    """Separate weights for every KV head, instead of one set for all of them. True for `complex` and `matrix`."""
    init: FusionInit = "lite"
    """`lite`: FusedKV-Lite, all keys from the last source and all values from the first; `mean`; `randn`: N(0, 1)."""

    key, sums = "fuse", True

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_head", self.per_head or self.granularity in ("complex", "matrix"))

    @classmethod
    def from_settings(cls, layers: Any, options: dict[str, Any]) -> Self:
        if options.get("granularity") in ("complex", "matrix") and options.get("per_head") is False:
            raise PlanError(f"per_head is false with granularity {options['granularity']}; allowed: true")
        return cls(tuple(layers), **options)

    def text(self, layer: int) -> str:
        kind = f", {self.granularity}" if self.granularity in ("complex", "matrix") else ""
        return Read.text(self, layer) + kind

    def check_half(self, where: str, half: Half) -> None:
        allowed = ("scalar", "channel", "complex" if half == "keys" else "matrix")
        if self.granularity not in allowed:
            raise PlanError(f"{where}: granularity is {self.granularity}; allowed for {half}: {', '.join(allowed)}")

    def flops(self, half: Half, n_kv_heads: int, head_dim: int) -> float:
        return 2.0 * len(self.layers) * n_kv_heads * head_dim**2 if self.granularity == "matrix" else 0.0

    def kept_activations(self, n_kv_heads: int, head_dim: int) -> int:
        # One tensor for each source: its turned keys, or its values in the order of the batched product.
        return len(self.layers) * n_kv_heads * head_dim if self.granularity in ("complex", "matrix") else 0

    class Settings(Section):
        """Read a sum of several owners' slots with learned weights."""

        fuse: list[int] | None = None
        """The owners whose slots are summed with learned weights."""
        granularity: Granularity | None = None
        """With `fuse`: `channel` (default), `scalar`, for keys `complex`, for values `matrix`."""
        per_head: bool | None = None
        """With `fuse`: separate weights for every KV head (default false; true for `complex` and `matrix`)."""
        init: FusionInit | None = None
        """With `fuse`: `lite` (default), `mean` or `randn`."""
