"""What presets and explicit plans have in common: the model's shape, and the base of every part of a config."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from cllm.kv.plan import Iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a preset may know of the model."""

    n_layers: int
    n_heads: int
    head_dim: int


class Section(BaseModel):
    """A part of a config: unknown keys are errors, types are strict, a docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class IterationsConfig(Section):
    """Passes over cyclic layers."""

    forward: int = Field(7, ge=0)
    """Passes without gradient (LCKV's m)."""
    backward: int = Field(2, ge=1)
    """Passes with gradient (LCKV's b)."""

    def plan(self) -> Iterations:
        return Iterations(forward=self.forward, backward=self.backward)
