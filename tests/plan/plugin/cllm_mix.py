"""A plug-in for cllm in one file: keys and values as a low-rank mix of two owners, K = K_i + U Vᵀ K_j over KV heads.

    keys: {mix: [0, 2], rank: 2}

Heads are mixed and channels are not, so that scores still depend on relative positions only. The package's metadata
has one line, `mix = cllm_mix:Mix` under `[cllm.plans]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Own, Read
from cllm.plan.plan import KVPlan, LayerPlan
from cllm.plan.presets import Preset, register_preset
from cllm.plan.registry import read_module, register_read, register_source
from cllm.plan.shape import Shape
from cllm.section import Section


@register_read
@dataclass(frozen=True, slots=True)
class Mix(Read):
    """Read two owners' slots as one, K_i + U Vᵀ K_j, with U and V (G, rank) learned."""

    layers: tuple[int, ...]
    rank: int = 1

    key = "mix"

    class Settings(Section):
        """Read a low-rank mix of two owners' slots."""

        mix: list[int] | None = None
        """The two owners that are mixed."""
        rank: int | None = Field(None, ge=1, le=64)
        """With `mix`: rank of the mix over KV heads (default 1)."""

    def check(self, where: str) -> None:
        Read.check(self, where)
        if len(self.layers) != 2:
            raise PlanError(f"{where}: mix names {len(self.layers)} owners; allowed: two")


@read_module(Mix)
def mix_module(read: Mix, part: Literal["k", "v"], places: Sequence[int], n_kv_heads: int, head_dim: int) -> Any:
    """The module; torch is imported here, so that reading a config stays free of it."""
    import torch

    from cllm.model.sources import Reader

    class MixRead(Reader):
        def __init__(self) -> None:
            super().__init__(places, part)
            self.up = torch.nn.Parameter(torch.empty(n_kv_heads, read.rank, dtype=torch.float32))
            self.down = torch.nn.Parameter(torch.empty(n_kv_heads, read.rank, dtype=torch.float32))

        def reset_parameters(self) -> None:
            torch.nn.init.normal_(self.up, std=0.5)
            torch.nn.init.normal_(self.down, std=0.5)

        def forward(self, slots: Any) -> torch.Tensor:
            first, second = self.parts(slots)
            mixed = torch.einsum("gr,hr,bthd->btgd", self.up.float(), self.down.float(), second.float())
            return (first.float() + mixed).to(first.dtype)

    return MixRead()


@register_source
@dataclass(frozen=True, kw_only=True, slots=True)
class Single(Own):
    """A slot with one KV head: a kind of source that takes all but its settings from `Own`."""

    n_kv_heads: int = 1

    key = "single"

    class Settings(Section):
        """The layers own one KV head."""

    @classmethod
    def from_settings(cls, settings: Section, shape: Shape) -> Single:
        return cls()

    def settings(self) -> dict[str, Any]:
        return {}


@register_preset
class MixedHalf(Preset):
    """The upper half reads a mix of the first and the last layer of the lower half."""

    preset: Literal["mixed_half"] = "mixed_half"

    def expand(self, shape: Shape) -> KVPlan:
        n = shape.n_layers // 2
        mix = Mix((0, n - 1))
        lower, upper = [LayerPlan(own=self.own(shape))] * n, [LayerPlan(keys=mix, values=mix)] * (shape.n_layers - n)
        return KVPlan.of([*lower, *upper])
