"""Kinds of sources (what a layer owns) and of reads (how it reads slots), each of which answers for itself.

A kind is one class: a frozen dataclass with the numbers of one layer, its YAML key and settings, and the answers that
everything else asks it for: widths, bytes, FLOPs, text, refusals. The modules that compute it are functions registered
for the kind (`owner_module`, `read_module`, `mixer_module`), looked up along its bases. Nothing else tests for a kind.

A package outside of cllm adds kinds in the same way, and names its module under the entry point group `cllm.plans`. As
long as it imports torch inside of its functions only, reading a config stays free of torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.shape import Shape
from cllm.section import MAX_HEADS, MAX_WIDTH, Section

Granularity = Literal["scalar", "channel"]
FusionInit = Literal["lite", "randn", "mean"]
Widths = tuple[tuple[int, ...], tuple[int, ...]]

# ---- sources: what a layer owns --------------------------------------------------------------------------------------


class Source(ABC):
    """The kind of slot that a layer owns. A subclass is a frozen dataclass, registered with `register_source`."""

    key: ClassVar[str]
    """Its key in an entry of `model.kv.layers`."""
    Settings: ClassVar[type[Section]]
    """The settings under that key; its docstring is the key's help."""
    noun: ClassVar[str] = "slot of keys and values"
    """How messages call one."""
    is_plain: ClassVar[bool] = True
    """The slot is keys after RoPE and values, (B, T, G, D) each: layers may read the two apart and fuse them, post-hoc
    methods may compress them, and other models' layers may become them. Any other slot is read as one."""
    is_shareable: ClassVar[bool] = True
    """Other layers may read the slot."""
    kv_heads: int | None = None
    """KV heads, G, of a plain slot."""
    normalises: bool = False
    """K and V are projected from an RMSNorm of their own."""

    @classmethod
    def from_settings(cls, settings: Section, shape: Shape) -> Self:
        """The source that YAML describes, for a model of this shape."""
        return cls(**settings.model_dump())

    def settings(self) -> dict[str, Any]:
        """The settings in YAML under `key`; the inverse of `from_settings`."""
        return asdict(self)  # type: ignore[call-overload]

    @property
    def text(self) -> str:
        """In a table of the plan."""
        return self.noun

    @abstractmethod
    def widths(self, head_dim: int) -> Widths:
        """Shapes of the slot's two tensors for one token; a fp8 cache scales along the last dimension."""

    def elements(self, head_dim: int) -> tuple[int, int]:
        """Numbers that one token adds to the slot's two tensors."""
        k, v = self.widths(head_dim)
        return math.prod(k), math.prod(v)

    def state_shape(self, n_heads: int, head_dim: int) -> tuple[int, int, int] | None:
        """Shape of a recurrent state, which does not grow with the context and is fp32; None for a slot."""
        return None

    @property
    def is_state(self) -> bool:
        """It is a recurrent state instead of a slot."""
        return self.state_shape(1, 1) is not None

    def rope_dim(self, head_dim: int) -> int:
        """Channels that RoPE rotates in the queries of a layer that reads the slot."""
        return head_dim

    def attention_flops(self, n_heads: int, head_dim: int, seen: float) -> float:
        """Forward FLOPs per token of attention over `seen` tokens: scores and weighted values, projections excluded."""
        return 2 * n_heads * 2 * head_dim * seen

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        """Numbers per token that attention keeps for its backward: queries, output, and the slot's tensors as often as
        the layer itself makes them (`made`), by projecting and by fusing."""
        return 2 * n_heads * head_dim + made * sum(self.elements(head_dim))


@dataclass(frozen=True, kw_only=True, slots=True)
class Own(Source):
    """A slot of post-RoPE keys and values, (B, T, n_kv_heads, head_dim) each, projected by the layer itself."""

    n_kv_heads: int
    kv_norm: bool = False
    """Normalise the residual stream for K and V with an RMSNorm of their own instead of the layer's (CLA, YOCO)."""

    key = "own"

    class Settings(Section):
        """The layers own keys and values; `own: {}` is enough."""

        n_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
        """KV heads; null: as many as query heads."""
        kv_norm: bool = False
        """An RMSNorm of their own for K and V."""

    @classmethod
    def from_settings(cls, settings: Section, shape: Shape) -> Self:
        return cls(**{**settings.model_dump(), "n_kv_heads": getattr(settings, "n_kv_heads", None) or shape.n_heads})

    def settings(self) -> dict[str, Any]:
        return {"n_kv_heads": self.n_kv_heads} | ({"kv_norm": True} if self.kv_norm else {})

    @property
    def kv_heads(self) -> int:  # type: ignore[override]
        return self.n_kv_heads

    @property
    def normalises(self) -> bool:  # type: ignore[override]
        return self.kv_norm

    @property
    def text(self) -> str:
        heads = f"{self.n_kv_heads} KV head{'s' if self.n_kv_heads > 1 else ''}"
        return heads + (", own norm" if self.kv_norm else "")

    def widths(self, head_dim: int) -> Widths:
        return (self.n_kv_heads, head_dim), (self.n_kv_heads, head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent(Source):
    """A slot of one low-rank latent and one RoPE key for all heads: MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The slot holds c (B, T, kv_lora_rank) and k_rope (B, T, qk_rope_head_dim). Every layer that reads the slot expands
    it with up-projections of its own, which decoding absorbs into its queries and output.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    key, noun, is_plain = "latent", "latent", False

    class Settings(Section):
        """The layers own a latent."""

        kv_lora_rank: int = Field(ge=1, le=MAX_WIDTH)
        """Width of the cached latent."""
        q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
        """Rank of the query projection; null: full rank."""
        qk_nope_head_dim: int = Field(ge=1, le=MAX_WIDTH)
        """Channels of a query head without position."""
        qk_rope_head_dim: int = Field(ge=2, le=MAX_WIDTH, multiple_of=2)
        """Channels of the decoupled RoPE key."""
        v_head_dim: int = Field(ge=1, le=MAX_WIDTH)
        """Channels of a value head."""

    @property
    def text(self) -> str:
        return f"latent {self.kv_lora_rank} + {self.qk_rope_head_dim}"

    def widths(self, head_dim: int) -> Widths:
        return (self.kv_lora_rank,), (self.qk_rope_head_dim,)

    def rope_dim(self, head_dim: int) -> int:
        return self.qk_rope_head_dim

    def attention_flops(self, n_heads: int, head_dim: int, seen: float) -> float:
        return 2 * n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim) * seen

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        # Expanded keys and values of all heads are kept too; the RoPE key is a part of them.
        key = self.qk_nope_head_dim + self.qk_rope_head_dim
        return 2 * n_heads * (key + self.v_head_dim) + made * self.kv_lora_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention(Source):
    """A recurrent state (n_heads, head_dim, head_dim) instead of a cache: gated retention (YOCO, arXiv 2405.05254)."""

    key, noun, is_plain, is_shareable = "retention", "recurrent state", False, False

    class Settings(Section):
        """The layers keep a recurrent state."""

    def widths(self, head_dim: int) -> Widths:
        return (0, 0), (0, 0)  # no slot: no vectors of no numbers

    def state_shape(self, n_heads: int, head_dim: int) -> tuple[int, int, int]:
        return n_heads, head_dim, head_dim

    def attention_flops(self, n_heads: int, head_dim: int, seen: float) -> float:
        return 4.0 * n_heads * head_dim * head_dim

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        return 6 * n_heads * head_dim


# ---- reads: how a layer gets its keys, or its values, from slots -----------------------------------------------------


class Read(ABC):
    """How a layer reads keys, or values, from slots. A subclass is a frozen dataclass, see `register_read`."""

    layers: tuple[int, ...]
    """The owners whose slots are read."""
    key: ClassVar[str]
    """Its key under `keys:` and `values:` of an entry of `model.kv.layers`, which names the owners."""
    Settings: ClassVar[type[Section]]
    """A field called `key`, for the owners, and the options that go with it."""
    is_stored: ClassVar[bool] = False
    """It reads one slot as it is stored, so that others can read the same tensors."""
    sums: ClassVar[bool] = False
    """It is a sum over owners with one weight for each channel or head, which least squares can fit."""

    @classmethod
    def from_settings(cls, layers: Any, options: dict[str, Any]) -> Self:
        """The read that YAML describes. Raises `PlanError` for options that do not go together."""
        return cls(tuple(layers), **options)  # type: ignore[call-arg]

    def settings(self) -> dict[str, Any]:
        """The settings in YAML, without options at their defaults; the inverse of `from_settings`."""
        defaults = {f.name: f.default for f in fields(self)}  # type: ignore[arg-type]
        options = {name: getattr(self, name) for name in defaults if name != "layers"}
        return {self.key: list(self.layers)} | {k: v for k, v in options.items() if v != defaults[k]}

    def with_layers(self, layers: tuple[int, ...]) -> Self:
        """The same read of other owners."""
        return replace(self, layers=layers)  # type: ignore[type-var]

    def text(self, layer: int) -> str:
        """In a table of the plan, in the row of `layer`."""
        return f"{self.key} " + " + ".join(map(str, self.layers))

    def check(self, where: str) -> None:
        """Raise `PlanError`, which begins with `where`, unless the read's own numbers go together."""
        if not self.layers:
            raise PlanError(f"{where}: {self.key} names no layer; name at least one owner")
        if len(set(self.layers)) != len(self.layers):
            raise PlanError(f"{where}: {self.key} names a layer twice: {list(self.layers)}")


@dataclass(frozen=True, slots=True)
class Share(Read):
    """Read the slot of one owner as it is."""

    layer: int

    key, is_stored = "share", True

    class Settings(Section):
        """Read one owner's slot as it is."""

        share: int | None = None
        """The owner whose slot is read as it is."""

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.layer,)

    @classmethod
    def from_settings(cls, layers: Any, options: dict[str, Any]) -> Self:
        return cls(layers)

    def settings(self) -> dict[str, Any]:
        return {"share": self.layer}

    def with_layers(self, layers: tuple[int, ...]) -> Self:
        (layer,) = layers
        return replace(self, layer=layer)

    def text(self, layer: int) -> str:
        return "own" if self.layer == layer else str(self.layer)


@dataclass(frozen=True, slots=True)
class Fuse(Read):
    """Read a sum over owners with learned weights, K = Σ_j a_j ⊙ K_j (FusedKV, arXiv 2512.03870, eq. 3)."""

    layers: tuple[int, ...]
    granularity: Granularity = "channel"
    """`channel`: a weight for every channel (for keys: for every rotated pair); `scalar`: one for the whole head."""
    per_head: bool = False
    """Separate weights for every KV head, instead of one set for all of them."""
    init: FusionInit = "lite"
    """`lite`: FusedKV-Lite, all keys from the last source and all values from the first; `mean`; `randn`: N(0, 1)."""

    key, sums = "fuse", True

    class Settings(Section):
        """Read a sum of several owners' slots with learned weights."""

        fuse: list[int] | None = None
        """The owners whose slots are summed with learned weights."""
        granularity: Granularity | None = None
        """With `fuse`: `channel` (default) or `scalar`."""
        per_head: bool | None = None
        """With `fuse`: separate weights for every KV head (default false)."""
        init: FusionInit | None = None
        """With `fuse`: `lite` (default), `mean` or `randn`."""


# ---- registries ------------------------------------------------------------------------------------------------------

SOURCES: dict[str, type[Source]] = {}
"""Every kind of source by its YAML key."""
READS: dict[str, type[Read]] = {}
"""Every kind of read by its YAML key."""
_S = TypeVar("_S", bound=type[Source])
_R = TypeVar("_R", bound=type[Read])
_closed = False


def register_source(kind: _S) -> _S:
    """Make a kind of source known to YAML. Raises `PlanError` for a key that is taken."""
    _add(SOURCES, kind.key, kind)
    return kind


def register_read(kind: _R) -> _R:
    """Make a kind of read known to YAML. Raises `PlanError` for a key that is taken, by a kind or by an option."""
    _add(READS, kind.key, kind)
    return kind


def close_registries() -> None:
    """The schema of `model.kv` is made now: kinds that come later would be unknown to it."""
    global _closed
    _closed = True


def _add(registry: dict[str, Any], key: str, kind: type) -> None:
    if _closed:
        raise PlanError(
            f"{kind.__name__}: comes too late; import its module before cllm.config, or name it under the entry point "
            "group cllm.plans"
        )
    if registry.get(key, kind) is not kind:
        raise PlanError(f"{kind.__name__}: its key {key!r} is that of {registry[key].__name__}; choose another")
    registry[key] = kind


for _source in (Own, Latent, Retention):
    register_source(_source)
for _read in (Share, Fuse):
    register_read(_read)

_Build = TypeVar("_Build", bound=Callable[..., Any])


class Builders:
    """Functions that build a kind's modules, each registered for a class and found for its subclasses too."""

    def __init__(self, what: str):
        self.what = what
        self._by_kind: dict[type, Callable[..., Any]] = {}

    def __call__(self, kind: type) -> Callable[[_Build], _Build]:
        """A decorator: `@owner_module(Own)`."""

        def register(build: _Build) -> _Build:
            self._by_kind[kind] = build
            return build

        return register

    def of(self, kind: Source | Read) -> Callable[..., Any]:
        """The function for an object's kind. Raises `PlanError` if neither it nor a base has one."""
        found = next((self._by_kind[c] for c in type(kind).__mro__ if c in self._by_kind), None)
        if found is None:
            raise PlanError(f"{type(kind).__name__}: has no {self.what}; register one with cllm.plan.kinds")
        return found


owner_module = Builders("owner module")
"""`(config: ModelConfig, source) -> nn.Module | None`: writes a layer's slot, see `cllm/model/sources.py`."""
read_module = Builders("read module")
"""`(read, part, places, n_kv_heads, head_dim) -> Reader`: reads keys (`k`) or values (`v`), see `make_read` there."""
mixer_module = Builders("mixer")
"""`(config, plan, layer) -> nn.Module`: a block's attention, see `cllm/model/attention.py`. Kinds with plain slots have
softmax attention unless they register another."""
