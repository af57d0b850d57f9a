"""Forms of `own`: owners of keys and values that store something else than two projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cllm.plan.kinds import Half, Own, Widths, own_form


@own_form("only")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnHalf(Own):
    """A slot of keys alone, or of values alone; the other half of what the layer reads comes from another owner.

    SVFormer (arXiv 2410.17897, section 3.3) stores keys alone in all layers but the first, whose values all read. The
    slot's other tensor has 0 heads.
    """

    only: Half

    @property
    def halves(self) -> tuple[Half, ...]:  # type: ignore[override]
        return (self.only,)

    @property
    def is_ordinary(self) -> bool:
        return False

    @property
    def is_compressible(self) -> bool:  # type: ignore[override]
        return False

    def settings(self) -> dict[str, Any]:
        return Own.settings(self) | {"only": self.only}

    @property
    def noun(self) -> str:  # type: ignore[override]
        return f"slot of {self.only}"

    @property
    def text(self) -> str:
        return Own.text.fget(self) + f", only {self.only}"  # type: ignore[attr-defined]

    def widths(self, head_dim: int) -> Widths:
        k, v = (self.n_kv_heads if half == self.only else 0 for half in ("keys", "values"))
        return (k, head_dim), (v, head_dim)


@own_form("tie")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTied(Own):
    """A slot of one projection that is both: K = RoPE(n), V = n with n = norm(W x) (Q-K=V, arXiv 2606.04032).

    The slot stores n (B, T, n_kv_heads, head_dim) as its second tensor; its first one has 0 heads. Keys are rotated in
    every pass, once for all layers that read the slot. norm is that of keys, with `qk_norm`.
    """

    tie: Literal["kv"]

    @property
    def is_ordinary(self) -> bool:
        return False

    @property
    def is_compressible(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_copyable(self) -> bool:  # type: ignore[override]
        return False

    @property
    def rotates_at_read(self) -> bool:  # type: ignore[override]
        return True

    def settings(self) -> dict[str, Any]:
        return Own.settings(self) | {"tie": self.tie}

    @property
    def text(self) -> str:
        return Own.text.fget(self) + ", K = V"  # type: ignore[attr-defined]

    def widths(self, head_dim: int) -> Widths:
        return (0, head_dim), (self.n_kv_heads, head_dim)

    def tensor_of(self, half: Half) -> int:
        return 1

    def read_elements(self, head_dim: int) -> int:
        return 2 * self.n_kv_heads * head_dim
