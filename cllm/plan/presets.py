"""Every published plan that has a name, as a function of the model's shape.

A preset is one class: its fields are what YAML may say under `model.kv`, its `expand` writes the plan. Adding a method
that only rearranges sources means adding a class here and a file in `configs/kv/`, and nothing else: no other module
knows a preset by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, create_model

from cllm.errors import PlanError
from cllm.plan.explicit import Explicit
from cllm.plan.plan import (
    MAX_LAYERS,
    Fuse,
    FusionInit,
    Granularity,
    Iterations,
    KVPlan,
    Latent,
    LayerPlan,
    Own,
    Read,
    Retention,
    Share,
)
from cllm.plan.shape import IterationsConfig, Shape
from cllm.section import MAX_HEADS, MAX_TOKENS, MAX_WIDTH, Section


class Preset(Section):
    """A plan by name."""

    preset: str
    """Name of the design."""
    n_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """KV heads of every owner; null: as many as query heads."""
    kv_norm: bool = False
    """Owners normalise the input of their K and V projections with an RMSNorm of their own."""

    def expand(self, shape: Shape) -> KVPlan:
        """The plan for a model of this shape. Raises `PlanError` when the two do not fit."""
        raise NotImplementedError

    def own(self, shape: Shape) -> Own:
        return Own(n_kv_heads=self.n_kv_heads or shape.n_heads, kv_norm=self.kv_norm)


_REGISTRY: dict[str, type[Preset]] = {}


def _register(cls: type[Preset]) -> type[Preset]:
    field = cls.model_fields["preset"]
    field.description = Preset.model_fields["preset"].description  # a Literal of its own loses it
    _REGISTRY[field.default] = cls
    return cls


def preset_names() -> list[str]:
    """Every name that `model.kv.preset` takes."""
    return sorted(_REGISTRY)


def _from_targets(targets: Sequence[int], own: Own, iterations: Iterations | None = None) -> KVPlan:
    """The plan in which layer i reads the slot of `targets[i]`, LCKV's notation."""
    layers = [LayerPlan(own=own if t == i else None, keys=Share(t), values=Share(t)) for i, t in enumerate(targets)]
    return KVPlan.of(layers, iterations if any(t > i for i, t in enumerate(targets)) else None)


def _half(shape: Shape, given: int | None, key: str) -> int:
    """`given`, or half of the layers; refused unless at least one layer is left on either side."""
    if shape.n_layers < 2:
        raise PlanError(
            f"model.n_layers is {shape.n_layers}; allowed with this plan, which splits the layers: 2 or more"
        )
    count = shape.n_layers // 2 if given is None else given
    if not 1 <= count < shape.n_layers:
        raise PlanError(f"model.kv.{key} is {count}; allowed: 1 to {shape.n_layers - 1} for {shape.n_layers} layers")
    return count


# ---- every layer owns ------------------------------------------------------------------------------------------------


@_register
class MHA(Preset):
    """Multi-head attention: every layer owns, as many KV heads as query heads."""

    preset: Literal["mha"] = "mha"
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window in tokens, the query's own included (Mistral); null: full causal attention."""
    full_every: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """With a window: every n-th layer keeps full attention (Gemma: 6)."""

    def windows(self, n_layers: int) -> list[int | None]:
        full = self.full_every
        if full and self.window is None:
            raise PlanError(
                f"model.kv.full_every is {full}, but without a window every layer has full attention; set window"
            )
        return [None if full and (i + 1) % full == 0 else self.window for i in range(n_layers)]

    def expand(self, shape: Shape) -> KVPlan:
        return KVPlan.of(LayerPlan(own=self.own(shape), window=w) for w in self.windows(shape.n_layers))


@_register
class GQA(MHA):
    """Grouped-query attention (arXiv 2305.13245): `n_kv_heads` defaults to half of the query heads."""

    preset: Literal["gqa"] = "gqa"  # type: ignore[assignment]

    def own(self, shape: Shape) -> Own:
        return Own(n_kv_heads=self.n_kv_heads or max(1, shape.n_heads // 2), kv_norm=self.kv_norm)


@_register
class MQA(MHA):
    """Multi-query attention (arXiv 1911.02150): one KV head."""

    preset: Literal["mqa"] = "mqa"  # type: ignore[assignment]
    n_kv_heads: Literal[1] = 1
    """Always 1."""


@_register
class MLA(Preset):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), optionally with one latent for several layers."""

    preset: Literal["mla"] = "mla"
    n_kv_heads: None = None
    """Not used: a latent has no heads."""
    kv_norm: Literal[False] = False
    """Not used: the latent has a norm of its own."""
    kv_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the cached latent; null: 4 head_dim (DeepSeek-V2: 512 at head_dim 128)."""
    q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Rank of the query projection; null: full rank (DeepSeek-V2-Lite)."""
    qk_nope_head_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Channels of a query head without position; null: head_dim."""
    qk_rope_head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH)
    """Channels of the decoupled RoPE key that all heads share; null: half of head_dim."""
    v_head_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Channels of a value head; null: head_dim."""
    factor: int = Field(1, ge=1, le=MAX_LAYERS)
    """Layers that read one latent; 1: every layer owns its own."""

    def expand(self, shape: Shape) -> KVPlan:
        d = shape.head_dim
        latent = Latent(
            kv_lora_rank=self.kv_lora_rank or 4 * d,
            q_lora_rank=self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim or d,
            qk_rope_head_dim=self.qk_rope_head_dim or max(2, d // 4 * 2),
            v_head_dim=self.v_head_dim or d,
        )
        if latent.qk_rope_head_dim % 2:
            raise PlanError(
                f"model.kv.qk_rope_head_dim is {latent.qk_rope_head_dim}; RoPE rotates pairs: an even number"
            )
        groups = _cla_groups(range(shape.n_layers), self.factor)
        return KVPlan.of(
            LayerPlan(own=latent) if i == group[0] else LayerPlan(keys=Share(group[0]), values=Share(group[0]))
            for group in groups
            for i in group
        )


# ---- neighbours share ------------------------------------------------------------------------------------------------


def _cla_groups(layers: Sequence[int], factor: int) -> list[list[int]]:
    """Runs of `factor` layers. Where the factor does not divide their number, the first layer stays alone and what is
    left over joins the last run: CLA-3 on 20 layers is 0 | 1-3 | ... | 13-15 | 16-19, 7 owners as in the paper."""
    layers = list(layers)
    if len(layers) % factor == 0:
        return [layers[i : i + factor] for i in range(0, len(layers), factor)]
    if len(layers) <= factor:
        return [layers]
    first, rest = layers[:1], layers[1:]
    groups = [rest[i : i + factor] for i in range(0, len(rest) - len(rest) % factor, factor)]
    groups[-1] += rest[len(rest) - len(rest) % factor :]
    return [first, *groups]


@_register
class CLA(Preset):
    """Cross-layer attention (arXiv 2405.12981): runs of `factor` layers read the lowest layer of the run.

    The paper's three variants of CLA-2 on 20 layers are `keep_ends: true`, `dense_front: 9, factor: 10, dense_back: 1`
    and `dense_front: 1, factor: 10, dense_back: 9`.
    """

    preset: Literal["cla"] = "cla"
    factor: int = Field(2, ge=2, le=MAX_LAYERS)
    """Layers that read one slot. Where it does not divide the number of layers, layer 0 stays alone."""
    kv_norm: bool = True
    """The paper gives queries and K/V separate norms (section 3.1.1)."""
    keep_ends: bool = False
    """The first and the last layer share with nobody."""
    dense_front: int = Field(0, ge=0, le=MAX_LAYERS)
    """That many layers at the bottom each own and share with nobody."""
    dense_back: int = Field(0, ge=0, le=MAX_LAYERS)
    """That many layers at the top each own and share with nobody."""

    def expand(self, shape: Shape) -> KVPlan:
        front, back = max(self.dense_front, int(self.keep_ends)), max(self.dense_back, int(self.keep_ends))
        n = shape.n_layers
        if front + back > n:
            raise PlanError(f"model.kv: dense_front {front} + dense_back {back} layers exceed the model's {n}")
        alone = [[i] for i in (*range(front), *range(n - back, n))]
        groups = alone + _cla_groups(range(front, n - back), self.factor)
        target = {i: group[0] for group in groups for i in group}
        return _from_targets([target[i] for i in range(n)], self.own(shape))


# ---- the upper layers share ------------------------------------------------------------------------------------------


@_register
class YOCO(Preset):
    """You only cache once (arXiv 2405.05254): an efficient lower half, one full slot, an upper half that reads it."""

    preset: Literal["yoco"] = "yoco"
    lower: Literal["window", "retention"] = "window"
    """The lower half: sliding-window attention or gated retention."""
    window: int = Field(1024, ge=1, le=MAX_TOKENS)
    """Sliding window of the lower half in tokens (the paper's 3B: 1024)."""
    n_lower: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Layers of the lower half; null: half of them."""
    kv_norm: bool = True
    """The one full slot has a norm of its own, as in the authors' code."""
    lower_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """KV heads of the lower half; null: as many as query heads."""

    def expand(self, shape: Shape) -> KVPlan:
        n = _half(shape, self.n_lower, "n_lower")
        windowed = self.lower == "window"
        low = Own(n_kv_heads=self.lower_kv_heads or shape.n_heads) if windowed else Retention()
        lower = [LayerPlan(own=low, window=self.window if windowed else None)] * n
        upper = [LayerPlan(keys=Share(n), values=Share(n))] * (shape.n_layers - n - 1)
        return KVPlan.of([*lower, LayerPlan(own=self.own(shape)), *upper])


class _Storage(Preset):
    """Lower layers store; the layers above them read `sources`."""

    n_storage: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Storage layers, from the bottom; null: half of the layers."""
    sources: list[int] | None = Field(None, min_length=1)
    """Layers whose slots the upper layers read; null: the first and the last storage layer."""

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        """(keys, values) of an upper layer."""
        raise NotImplementedError

    def expand(self, shape: Shape) -> KVPlan:
        n = _half(shape, self.n_storage, "n_storage")
        sources = list(dict.fromkeys([0, n - 1])) if self.sources is None else self.sources
        keys, values = self.read(sources)
        storage = [LayerPlan(own=self.own(shape))] * n
        return KVPlan.of([*storage, *[LayerPlan(keys=keys, values=values)] * (shape.n_layers - n)])


class _Fusing(_Storage):
    granularity: Granularity = "channel"
    """`channel`: a weight for every channel (keys: for every rotated pair); `scalar`: one for the whole head."""
    per_head: bool = False
    """Weights of its own for every KV head, instead of one set for all."""
    init: FusionInit = "lite"
    """Starting point: `lite` (all keys from the last source, all values from the first), `mean`, `randn`."""

    def fuse(self, *layers: int) -> Fuse:
        return Fuse(layers, granularity=self.granularity, per_head=self.per_head, init=self.init)


@_register
class FusedKV(_Fusing):
    """FusedKV (arXiv 2512.03870, eq. 4 and 5): K and V of the upper half are learned sums of two lower slots."""

    preset: Literal["fusedkv"] = "fusedkv"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return self.fuse(*sources), self.fuse(*sources)


@_register
class FusedKVLite(_Storage):
    """FusedKV-Lite (eq. 6): the upper half reads the last source's keys and the first source's values."""

    preset: Literal["fusedkv_lite"] = "fusedkv_lite"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return Share(sources[-1]), Share(sources[0])


@_register
class FusedKVLiteLearnable(_Fusing):
    """Ablation of the paper (section 3.4): FusedKV-Lite with a learned weight on the one source."""

    preset: Literal["fusedkv_lite_learnable"] = "fusedkv_lite_learnable"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return self.fuse(sources[-1]), self.fuse(sources[0])


@_register
class FusedKVLiteReversed(_Storage):
    """Ablation of the paper (section 3.4): keys from the first source, values from the last; much worse there."""

    preset: Literal["fusedkv_lite_reversed"] = "fusedkv_lite_reversed"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return Share(sources[0]), Share(sources[-1])


@_register
class Trailing(MHA):
    """The last `n_shared` layers read the last owner of their mask kind (Gemma 3n: 15 of 35 layers, every 5th full)."""

    preset: Literal["trailing"] = "trailing"  # type: ignore[assignment]
    n_shared: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Layers at the top that own nothing; null: half of them."""

    def shared(self, shape: Shape) -> int:
        return _half(shape, self.n_shared, "n_shared")

    def expand(self, shape: Shape) -> KVPlan:
        windows = self.windows(shape.n_layers)
        first = shape.n_layers - self.shared(shape)
        last_of_kind = {w: i for i, w in enumerate(windows[:first])}
        layers = [LayerPlan(own=self.own(shape), window=w) for w in windows[:first]]
        for i, window in enumerate(windows[first:], start=first):
            if window not in last_of_kind:
                kind = "full attention" if window is None else "a sliding window"
                raise PlanError(f"layer {i}: has {kind}, and none of the owners 0 to {first - 1} has; lower n_shared")
            target = Share(last_of_kind[window])
            layers.append(LayerPlan(keys=target, values=target, window=window))
        return KVPlan.of(layers)


@_register
class AFM(Trailing):
    """Apple's on-device model (arXiv 2507.13575): depth split 5:3, the upper block reads the lower one's last layer."""

    preset: Literal["afm"] = "afm"  # type: ignore[assignment]
    n_shared: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Layers at the top that own nothing; null: three eighths of them."""

    def shared(self, shape: Shape) -> int:
        return _half(shape, shape.n_layers * 3 // 8 if self.n_shared is None else self.n_shared, "n_shared")


# ---- the nine plans of "A Systematic Study of Cross-Layer KV Sharing" ------------------------------------------------


class _Study(Preset):
    """Wu and Tu (arXiv 2410.14442, section 3): a partition of the layers and the place of the target in each part.

    With l owners: *pizza*, the first l-1 layers own and the rest read one target; *sandwich*, the first ⌈(l-1)/2⌉ and
    the last ⌊(l-1)/2⌋ own and the middle reads one target; *lasagna*, l even runs with a target each. The first layer
    always owns, so a lasagna whose targets are not at the bottom keeps layer 0 apart and cuts the rest into l-1 runs.
    """

    partition: ClassVar[Literal["pizza", "sandwich", "lasagna"]]
    target: ClassVar[Literal["bottom", "middle", "top"]]
    n_owners: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Layers that own (l in the paper); null: half of them."""
    iterations: IterationsConfig = Field(default_factory=IterationsConfig)
    """Passes over the cyclic layers; not used where the target is at the bottom."""

    def owners(self, shape: Shape) -> int:
        return _half(shape, self.n_owners, "n_owners")

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
        return _from_targets(targets, self.own(shape), self.iterations.plan())


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
        _cls = create_model(_name, __base__=_Study, __doc__=_Study.__doc__, **_fields)
        _cls.partition, _cls.target = _partition, _target
        _register(_cls)


@_register
class LCKV(_Study):
    """Layer-condensed KV cache (arXiv 2405.10637): all but a few warm-up layers read the top-most layer between them.

    It is `sandwich_top` by its number of warm-up layers: `warmup: 2` on 22 layers is the authors' `0_20x20_21`, layers
    0 and 21 keep to themselves and 1 to 20 read layer 20.
    """

    partition, target = "sandwich", "top"
    preset: Literal["lckv"] = "lckv"
    warmup: int = Field(2, ge=0, le=MAX_LAYERS)
    """Layers with attention of their own, half of them below the condensed ones, half above."""
    n_owners: None = None
    """Not used: the plan has warmup + 1 owners."""

    def owners(self, shape: Shape) -> int:
        return _half(shape, self.warmup + 1, "warmup + 1")


def _variant(value: Any) -> str | None:
    """Which class a value of `model.kv` is for; a mapping that names neither preset nor layers means mha."""
    if isinstance(value, Explicit) or (isinstance(value, dict) and "layers" in value and "preset" not in value):
        return "layers"
    return value.get("preset", "mha") if isinstance(value, dict) else getattr(value, "preset", None)


_VARIANTS = [Annotated[cls, Tag(name)] for name, cls in _REGISTRY.items()] + [Annotated[Explicit, Tag("layers")]]
if TYPE_CHECKING:
    KVConfig = Preset | Explicit
else:
    KVConfig = Annotated[Union[tuple(_VARIANTS)], Discriminator(_variant)]  # noqa: UP007
"""What `model.kv` may say: a preset by name, or `layers`."""
