"""Kinds of sources (what a layer owns) and of reads (how it reads slots), each of which answers for itself.

A kind is one class: a frozen dataclass with the numbers of one layer, its YAML key and settings, and the answers that
everything else asks it for: widths, bytes, FLOPs, text, refusals. `registry.py` makes it known to YAML, and knows the
modules that compute it. Nothing else tests for a kind.
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

Half = Literal["keys", "values"]
MAX_LAYERS = 4096
"""Layers that a model may have."""
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
    """Readers see keys after RoPE and values, (B, T, G, D) each: layers may read the two apart and fuse them. Any other
    slot is read as one."""
    halves: tuple[Half, ...] = ("keys", "values")
    """The halves of a plain slot that layers may read."""
    is_compressible: bool = True
    """Post-hoc methods may compress the slot: a plain one stores keys after RoPE and values."""
    is_copyable: bool = True
    """Keys and values of another model's layer may become those of a plain slot."""
    mixes: tuple[int, ...] = ()
    """Lower owners whose new keys and values are a part of what is written; the slots of all have one shape."""
    rotates_at_read: bool = False
    """The stored tensors become what readers see in every pass, which needs RoPE at the positions of all tokens."""
    is_shareable: ClassVar[bool] = True
    """Other layers may read the slot."""
    kv_heads: int | None = None
    """KV heads, G, of a plain slot."""
    head_dim: int | None = None
    """Channels of a head of a plain slot, and of the query heads of layers that read it; None: `model.head_dim`."""
    normalises: bool = False
    """K and V are projected from an RMSNorm of their own."""
    input: int | None = None
    """The layer whose output, normalised once for all owners that name it, is projected; None: the layer's own
    input."""

    @property
    def is_ordinary(self) -> bool:
        """The slot's keys and values are two projections of the layer's own input, as in models of other libraries."""
        return self.is_plain and self.input is None

    @property
    def reads_a_prompt(self) -> bool:
        """The slot is projected from the layer's own input, so all tokens of a prompt have to reach the layer."""
        return self.input is None

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

    def check(self, layer: int) -> None:
        """Raise `PlanError`, which begins with the layer, unless this may be the source of `layer`."""
        if self.input is not None and not 0 <= self.input < layer:
            allowed = f"layers 0 to {layer - 1}" if layer else "null, the layer's own input"
            raise PlanError(f"layer {layer}: projects the output of layer {self.input}; allowed: {allowed}")

    @abstractmethod
    def widths(self, head_dim: int) -> Widths:
        """Shapes of the slot's two stored tensors for one token; a fp8 cache scales along the last dimension."""

    def elements(self, head_dim: int) -> tuple[int, int]:
        """Numbers that one token adds to the slot's two tensors."""
        k, v = self.widths(head_dim)
        return math.prod(k), math.prod(v)

    def tensor_of(self, half: Half) -> int:
        """The stored tensor, 0 or 1, that a half of the slot is made of."""
        return 0 if half == "keys" else 1

    def read_elements(self, head_dim: int) -> int:
        """Numbers for each token in the tensors that readers see."""
        return sum(self.elements(head_dim))

    def state_shape(self, n_heads: int, head_dim: int) -> tuple[int, int, int] | None:
        """Shape of a recurrent state, which does not grow with the context and is fp32; None for a slot."""
        return None

    @property
    def is_state(self) -> bool:
        """It is a recurrent state instead of a slot."""
        return self.state_shape(1, 1) is not None

    def head_size(self, head_dim: int) -> int:
        """Channels of a head of the slot, D. Here and below, `head_dim` is the model's."""
        return self.head_dim or head_dim

    @property
    def head_size_text(self) -> str:
        """The channels of a head, in messages."""
        return "model.head_dim" if self.head_dim is None else str(self.head_dim)

    def rope_dim(self, head_dim: int) -> int:
        """Channels that RoPE rotates in the queries of a layer that reads the slot."""
        return self.head_size(head_dim)

    def attention_flops(self, n_heads: int, head_dim: int, seen: float) -> float:
        """Forward FLOPs per token of attention over `seen` tokens: scores and weighted values, projections excluded."""
        return 2 * n_heads * 2 * self.head_size(head_dim) * seen

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        """Numbers per token that attention keeps for its backward: queries, output, and the slot's tensors as often as
        the layer itself makes them (`made`), by projecting and by fusing."""
        return 2 * n_heads * self.head_size(head_dim) + made * self.read_elements(head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Own(Source):
    """A slot of post-RoPE keys and values, (B, T, n_kv_heads, head_dim) each, projected by the layer itself.

    Options of `own` that change what is stored select a subclass, see `own_form`.

    With `input` s, layer l projects the output of layer s instead of its own input: K_l = RoPE(W_K^l x),
    V_l = W_V^l x with x = norm_s(h_{s+1}), where h_{s+1} is the residual stream that leaves layer s (SwiftKV, arXiv
    2410.03960, section 3.2). norm_s belongs to layer s and is the same for all layers that project its output.
    """

    n_kv_heads: int
    kv_norm: bool = False
    """Normalise the residual stream for K and V with an RMSNorm of their own instead of the layer's (CLA, YOCO)."""
    input: int | None = None
    head_dim: int | None = None

    key = "own"

    class Settings(Section):
        """The layers own keys and values; `own: {}` is enough."""

        n_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
        """KV heads; null: as many as query heads."""
        head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH, multiple_of=2)
        """Channels of a head of the slot, and of the query heads of layers that read it; null: `model.head_dim`."""
        kv_norm: bool = False
        """An RMSNorm of their own for K and V."""
        input: int | None = Field(None, ge=0, le=MAX_LAYERS)
        """Project the output of this lower layer instead of the layers' own input; null: their own input."""
        only: Half | None = None
        """Project and store only the `keys` or only the `values`; null: both."""
        tie: Literal["kv"] | None = None
        """`kv`: one projection, stored once, is the keys (with RoPE) and the values (without); null: two."""
        mix: list[int] | None = None
        """Lower owners whose keys and values are mixed into those that are stored, with learned weights; null: none."""

    forms: ClassVar[dict[str, type[Own]]] = {}
    """Subclasses by the option of `own` that selects them."""

    @classmethod
    def from_settings(cls, settings: Section, shape: Shape) -> Self:
        given = {k: v for k, v in settings.model_dump().items() if v is not None or k not in cls.forms}
        given["n_kv_heads"] = given.get("n_kv_heads") or shape.n_heads
        given["head_dim"] = None if given.get("head_dim") == shape.head_dim else given.get("head_dim")
        chosen = [option for option in cls.forms if option in given]
        if len(chosen) > 1:
            raise PlanError(f"own: has {' and '.join(chosen)}; allowed: at most one of {', '.join(cls.forms)}")
        return (cls.forms[chosen[0]] if chosen else cls)(**given)  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        options = {"head_dim": self.head_dim, "kv_norm": self.kv_norm or None, "input": self.input}
        return {"n_kv_heads": self.n_kv_heads} | {key: value for key, value in options.items() if value is not None}

    @property
    def kv_heads(self) -> int:  # type: ignore[override]
        return self.n_kv_heads

    @property
    def normalises(self) -> bool:  # type: ignore[override]
        return self.kv_norm or self.input is not None

    @property
    def text(self) -> str:
        heads = f"{self.n_kv_heads} KV head{'s' if self.n_kv_heads > 1 else ''}"
        heads += "" if self.head_dim is None else f" of {self.head_dim}"
        source = "" if self.input is None else f", input {self.input}"
        return heads + (", own norm" if self.kv_norm else "") + source

    def check(self, layer: int) -> None:
        Source.check(self, layer)
        if self.kv_norm and self.input is not None:
            raise PlanError(
                f"layer {layer}: has kv_norm and input {self.input}; allowed: one of the two, since all layers that "
                "project the output of a layer share one norm of it"
            )

    def widths(self, head_dim: int) -> Widths:
        return (self.n_kv_heads, self.head_size(head_dim)), (self.n_kv_heads, self.head_size(head_dim))


_Form = TypeVar("_Form", bound=type[Own])


def own_form(option: str) -> Callable[[_Form], _Form]:
    """A decorator: the class is the source of entries whose `own` has `option`, a field of `Own.Settings`."""

    def add(form: _Form) -> _Form:
        Own.forms[option] = form
        return form

    return add


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

    def check_half(self, where: str, half: Half) -> None:  # noqa: B027 - most reads make both
        """Raise `PlanError`, which begins with `where`, unless the read may make this half."""

    def flops(self, half: Half, n_kv_heads: int, head_dim: int) -> float:
        """Forward FLOPs per token of matrix products that make this half from slots."""
        return 0.0

    def kept_activations(self, n_kv_heads: int, head_dim: int) -> int:
        """Numbers per token that making a half from slots keeps for its backward, besides the half itself."""
        return 0


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
