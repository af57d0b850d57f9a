"""Settings that presets and explicit plans share: the model's shape, and the passes over cyclic layers."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from cllm.section import MAX_PASSES, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The part of a model's shape that a plan may depend on."""

    n_layers: int
    n_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Iterations:
    """Training of a cyclic plan: passes over the cyclic layers without and with gradients (LCKV's m and b)."""

    forward: int = 7
    backward: int = 2


class IterationsConfig(Section):
    """Passes over cyclic layers."""

    forward: int = Field(7, ge=0, le=MAX_PASSES)
    """Passes without gradient (LCKV's m)."""
    backward: int = Field(2, ge=1, le=MAX_PASSES)
    """Passes with gradient (LCKV's b)."""

    def plan(self) -> Iterations:
        return Iterations(forward=self.forward, backward=self.backward)
