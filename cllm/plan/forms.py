"""Forms of `own`: owners of keys and values that store something else than two projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cllm.errors import PlanError
from cllm.plan.kinds import Half, Own, Widths, own_form


class _Rewritten(Own):
    """A slot that holds something else than the layer's keys and values, so neither other families nor post-hoc methods
    know it."""

    __slots__ = ()

    @property
    def is_ordinary(self) -> bool:
        return False

    @property
    def is_compressible(self) -> bool:  # type: ignore[override]
        return False


@own_form("only")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnHalf(_Rewritten):
    """A slot of keys alone, or of values alone; the other half of what the layer reads comes from another owner.

    SVFormer (arXiv 2410.17897, section 3.3) stores keys alone in all layers but the first, whose values all read. The
    slot's other tensor has 0 heads.
    """

    only: Half

    @property
    def halves(self) -> tuple[Half, ...]:  # type: ignore[override]
        return (self.only,)

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
        return (k, self.head_size(head_dim)), (v, self.head_size(head_dim))


@own_form("tie")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnTied(_Rewritten):
    """A slot of one projection that is both: K = RoPE(n), V = n with n = norm(W x) (Q-K=V, arXiv 2606.04032).

    The slot stores n (B, T, n_kv_heads, head_dim) as its second tensor; its first one has 0 heads. Keys are rotated in
    every pass, once for all layers that read the slot. norm is that of keys, with `qk_norm`.
    """

    tie: Literal["kv"]

    @property
    def rotates_at_read(self) -> bool:  # type: ignore[override]
        return True

    def settings(self) -> dict[str, Any]:
        return Own.settings(self) | {"tie": self.tie}

    @property
    def text(self) -> str:
        return Own.text.fget(self) + ", K = V"  # type: ignore[attr-defined]

    def widths(self, head_dim: int) -> Widths:
        return (0, self.head_size(head_dim)), (self.n_kv_heads, self.head_size(head_dim))

    def tensor_of(self, half: Half) -> int:
        return 1

    def read_elements(self, head_dim: int) -> int:
        return 2 * self.n_kv_heads * self.head_size(head_dim)


@own_form("mix")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnMixed(_Rewritten):
    """A slot into which those of lower owners are mixed: K = s (Σ_j w_j K_j + w K_own), the same for V (YOCO++).

    arXiv 2604.13556: w_j start at 0 and w at 1 / s, so that the slot starts as the layer's own; s = 35. Keys are mixed
    after RoPE. K_j and V_j are the slot of layer j as readers see it. Keys and values have separate weights, in fp32.
    The sum is stored.
    """

    mix: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", tuple(self.mix))

    @property
    def mixes(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.mix

    def check(self, layer: int) -> None:
        Own.check(self, layer)
        if not self.mix or len(set(self.mix)) < len(self.mix):
            raise PlanError(f"layer {layer}: mix is {list(self.mix)}; allowed: one or more different layers")
        for j in self.mix:
            if not 0 <= j < layer:
                allowed = f"layers 0 to {layer - 1}" if layer else "no mix in layer 0"
                raise PlanError(f"layer {layer}: mixes the keys and values of layer {j}; allowed: {allowed}")

    def settings(self) -> dict[str, Any]:
        return Own.settings(self) | {"mix": list(self.mix)}

    @property
    def text(self) -> str:
        return Own.text.fget(self) + f", mix {', '.join(map(str, self.mix))}"  # type: ignore[attr-defined]

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        return Own.read_activations(self, n_heads, head_dim, 2 * made)  # before and after the sum
