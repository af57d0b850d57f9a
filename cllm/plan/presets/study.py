"""The nine plans of "A Systematic Study of Cross-Layer KV Sharing" (arXiv 2410.14442), and LCKV."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from cllm.plan.plan import MAX_LAYERS, KVPlan
from cllm.plan.presets.base import LayerCount, Preset, count_or_half, from_targets, register_preset
from cllm.plan.shape import IterationsConfig, Shape
from cllm.section import create_section


class _Study(Preset):
    """Wu and Tu (arXiv 2410.14442, section 3): a partition of the layers and the place of the target in each part.

    With l owners: *pizza*, the first l-1 layers own and the rest read one target; *sandwich*, the first ⌈(l-1)/2⌉ and
    the last ⌊(l-1)/2⌋ own and the middle reads one target; *lasagna*, l even runs with a target each. The first layer
    always owns, so a lasagna whose targets are not at the bottom keeps layer 0 apart and cuts the rest into l-1 runs.
    """

    partition: ClassVar[Literal["pizza", "sandwich", "lasagna"]]
    target: ClassVar[Literal["bottom", "middle", "top"]]
    n_owners: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of layers that own K/V (l in the paper); null: half of all layers."""
    iterations: IterationsConfig = Field(default_factory=IterationsConfig)
    """Passes over the cyclic layers; not used if the target is at the bottom."""

    def owners(self, shape: Shape) -> int:
        return count_or_half(shape, self.n_owners, "n_owners")

    def runs(self, n: int, owners: int) -> list[list[int]]:
        layers = list(range(n))
        if self.partition == "lasagna":
            apart = 0 if self.target == "bottom" or owners == 1 else 1
            return [[i] for i in layers[:apart]] + _even_runs(layers[apart:], owners - apart)
        front = owners - 1 if self.partition == "pizza" else owners // 2
        back = owners - 1 - front
        return [[i] for i in layers[:front]] + [layers[front : n - back]] + [[i] for i in layers[n - back :]]

    def expand(self, shape: Shape) -> KVPlan:
        targets: list[int] = []
        for run in self.runs(shape.n_layers, self.owners(shape)):
            place = {"bottom": 0, "middle": (len(run) - 1) // 2, "top": len(run) - 1}[self.target]
            targets += [run[place]] * len(run)
        return from_targets(targets, self.own(shape), self.iterations.plan())


def _even_runs(layers: list[int], count: int) -> list[list[int]]:
    """`layers` cut into `count` runs whose lengths differ by at most one, longer ones first."""
    short, longer = divmod(len(layers), count)
    runs, start = [], 0
    for i in range(count):
        stop = start + short + (i < longer)
        runs.append(layers[start:stop])
        start = stop
    return runs


for _partition in ("pizza", "sandwich", "lasagna"):
    for _target in ("bottom", "middle", "top"):
        _name = f"{_partition}_{_target}"
        _fields: dict[str, Any] = {"preset": (Literal[_name], _name)}
        _cls = create_section(_name, _Study, _fields, _Study.__doc__)
        _cls.partition, _cls.target = _partition, _target
        register_preset(_cls)


@register_preset
class LCKV(_Study):
    """Layer-condensed KV cache (arXiv 2405.10637): all but a few warm-up layers read the top-most layer between them.

    It is `sandwich_top` by its number of warm-up layers: `warmup: 2` on 22 layers is the authors' `0_20x20_21`, layers
    0 and 21 keep to themselves and 1 to 20 read layer 20.
    """

    partition, target = "sandwich", "top"
    preset: Literal["lckv"] = "lckv"
    warmup: int = Field(2, ge=0, le=MAX_LAYERS)
    """Number of layers that read only their own K/V; half of them are at the bottom, half at the top."""
    n_owners: None = None
    """Not used: the plan has warmup + 1 owners."""

    def owners(self, shape: Shape) -> int:
        return count_or_half(shape, self.warmup + 1, "warmup + 1")
