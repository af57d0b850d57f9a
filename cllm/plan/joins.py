"""Reads of several slots at once, each with a mask of its own: one softmax over all of them, or a gated sum.

    read: {join: [11, {own: {window: 128}}], sink: true}
    read: {gate: [11, {own: {window: 128}}]}

Such a read is the keys and the values of its layer. A layer may own two of the slots that it reads: the first is the
slot that other layers may read too, the second, its *local* one, is read by the layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Half, Own, Read, Source
from cllm.plan.shape import Shape
from cllm.section import MAX_TOKENS, Section

LOCAL = -1
"""In place of the layer in a `Part`: the local slot."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the slots that are read at once."""

    layer: int
    """Its owner, which may be the reading layer itself; or `LOCAL`."""
    window: int | None = None
    """Tokens that a query sees of it, itself included; None: all. An own slot keeps as many."""

    def text(self, layer: int) -> str:
        """In a table of the plan, in the row of `layer`."""
        name = "own" if self.layer in (layer, LOCAL) else str(self.layer)
        return name if self.window is None else f"{name} last {self.window}"


def slots_text(parts: Sequence[Part]) -> str:
    """Their number, in messages."""
    return f"{len(parts)} slot" + ("" if len(parts) == 1 else "s")


class Attended(NamedTuple):
    """The slots over which one softmax, or one part of it, is computed with one mask."""

    slots: tuple[int, ...]
    """Numbers as in `KVPlan.slots`."""
    window: int | None


class OwnPart(Own.Settings):
    """A slot of the layer's own; its options are those of `own`."""

    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Tokens that the slot keeps and a query sees, its own included; null: all."""


class PartConfig(Section):
    """One slot of a read of several: `11`, `{share: 11, window: 512}` or `{own: {window: 128}}`."""

    share: int | None = None
    """The owner whose slot is read."""
    own: OwnPart | None = None
    """A slot of the layer's own."""
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """With `share`: tokens that a query sees of the slot, its own included; null: all."""


@dataclass(frozen=True, slots=True)
class Whole(Read):
    """Base of reads that are the keys and the values of a layer at once, over several slots with masks of their own."""

    parts: tuple[Part, ...]

    least_window: ClassVar[int] = 1
    """The smallest window with which queries and keys have an effect."""

    @property
    def layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(part.layer for part in self.parts if part.layer != LOCAL)

    @classmethod
    def from_settings(cls, layers: Any, options: dict[str, Any]) -> Any:
        raise PlanError(f"{cls.key} reads keys and values at once; write it under read")

    @classmethod
    def fields_at(cls, layer: int, given: Sequence[int | PartConfig], options: dict[str, Any], shape: Shape) -> Any:
        """The fields of the `LayerPlan` of `layer` that YAML describes. Raises `PlanError`, naming the layer."""
        parts: list[Part] = []
        owned: list[Source] = []
        for item in given:
            config = PartConfig(share=item) if isinstance(item, int) else item
            if (config.share is None) == (config.own is None):
                raise PlanError(f"layer {layer}: {cls.key}: each slot is a layer, or one of share and own")
            if config.own is None:
                assert config.share is not None
                if config.share < 0:  # -1 is `LOCAL`
                    raise PlanError(f"layer {layer}: {cls.key} reads layer {config.share}; layers count from 0")
                if config.share == layer:
                    raise PlanError(f"layer {layer}: {cls.key}: names the layer itself; write its slot as own: {{}}")
                parts.append(Part(config.share, config.window))
                continue
            if config.window is not None:
                raise PlanError(f"layer {layer}: {cls.key}: write the window of an own slot inside of own")
            try:
                owned.append(Own.from_settings(Own.Settings(**config.own.model_dump(exclude={"window"})), shape))
            except PlanError as error:
                raise PlanError(f"layer {layer}: {cls.key}: {error}") from None
            parts.append(Part(layer if len(owned) == 1 else LOCAL, config.own.window))
        if len(owned) > 2:
            raise PlanError(f"layer {layer}: {cls.key}: has {len(owned)} slots of its own; allowed: at most two")
        own, local = (*owned, None, None)[:2]
        read = cls(tuple(parts), **options)
        return {"own": own, "local": local, "keys": read, "values": read}

    def options(self) -> dict[str, Any]:
        """The settings in YAML besides the slots, without those at their defaults."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The numbers of the read, for messages; `settings_at` is what YAML says."""
        return {self.key: [asdict(part) for part in self.parts], **self.options()}

    def settings_at(self, layer: int, own: Source | None, local: Source | None) -> dict[str, Any]:
        """The settings in YAML under `read` of `layer`, which owns `own` and `local`; the inverse of `fields_at`."""

        def written(part: Part) -> Any:
            window = {} if part.window is None else {"window": part.window}
            source = local if part.layer == LOCAL else own if part.layer == layer else None
            if source is not None:
                return {"own": source.settings() | window}
            return {"share": part.layer, **window} if window else part.layer

        return {self.key: [written(part) for part in self.parts], **self.options()}

    def with_layers(self, layers: tuple[int, ...]) -> Any:
        left = list(layers)
        parts = tuple(part if part.layer == LOCAL else Part(left.pop(0), part.window) for part in self.parts)
        return replace(self, parts=parts)

    def text(self, layer: int) -> str:
        return f"{self.key} " + " + ".join(part.text(layer) for part in self.parts)

    def kept(self, layer: int) -> int | None:
        """The window of the slot of `layer`, the layer that reads, or of its `LOCAL` one; None: it keeps all tokens."""
        return next(part.window for part in self.parts if part.layer == layer)

    def extra_activations(self, n_heads: int, head_dim: int) -> int:
        """Numbers per token that attention keeps for its backward besides queries and one output."""
        return 0

    def check(self, where: str) -> None:
        names = [part.layer for part in self.parts]
        if len(set(names)) != len(names):
            raise PlanError(f"{where}: {self.key} names a slot twice: {[n for n in names if n != LOCAL]}")
        for part in self.parts:
            if part.window is not None and part.window < self.least_window:
                raise PlanError(
                    f"{where}: {self.key} has a window of {part.window}; allowed: {self.least_window} or more"
                )


@dataclass(frozen=True, slots=True)
class Join(Whole):
    """One softmax over several slots: o = Σ_j exp(z_j) v_j / (Σ_j exp(z_j) + exp(s_h)), j over all keys that are seen.

    The dense form of the decoder half of DeepSeek-V4.1 (CED). s_h, the sink, is one learned number for each query head
    or, without `sink`, absent.
    """

    parts: tuple[Part, ...]
    sink: bool = False

    key = "join"

    class Settings(Section):
        """Read several slots by one softmax."""

        join: list[int | PartConfig] | None = None
        """Under `read`: the slots over which one softmax is taken, each with a mask of its own."""
        sink: bool | None = None
        """With `join`: a learned number for each query head in the softmax's denominator (default false)."""

    def options(self) -> dict[str, Any]:
        return {"sink": True} if self.sink else {}

    def text(self, layer: int) -> str:
        return Whole.text(self, layer) + (", sink" if self.sink else "")

    def check(self, where: str) -> None:
        Whole.check(self, where)
        if len(self.parts) < 2 - self.sink:
            raise PlanError(f"{where}: join has {slots_text(self.parts)}; allowed: two or more, or one with a sink")


Gates = Literal["separate", "complementary"]


@dataclass(frozen=True, slots=True)
class Gate(Whole):
    """A gated sum of two attentions, o_h = Σ_p g_ph o_ph with gates from the layer's normalised input x.

    `separate`: g_p = σ(W_p x), the dense form of HySparse (arXiv 2602.03560). `complementary`: g_1 = σ(W x) and
    g_2 = 1 - g_1 (PLT, arXiv 2510.24824). Each W has a row for each query head, and starts at zero.
    """

    parts: tuple[Part, ...]
    gates: Gates = "separate"

    key, least_window = "gate", 2  # softmax over one key is 1, whatever the query and the key are

    class Settings(Section):
        """Read two slots by an attention each, and add the outputs with learned gates."""

        gate: list[int | PartConfig] | None = None
        """Under `read`: the two slots whose attentions are added with gates, each with a mask of its own."""
        gates: Gates | None = None
        """With `gate`: `separate` (default): a gate for each attention; `complementary`: one gate g, and 1 - g."""

    @property
    def n_gates(self) -> int:
        """Learned gates of a query head."""
        return len(self.parts) if self.gates == "separate" else len(self.parts) - 1

    def options(self) -> dict[str, Any]:
        return {} if self.gates == "separate" else {"gates": self.gates}

    def text(self, layer: int) -> str:
        return Whole.text(self, layer) + ("" if self.gates == "separate" else f", {self.gates}")

    def extra_activations(self, n_heads: int, head_dim: int) -> int:
        return len(self.parts) * n_heads * head_dim  # the outputs of the attentions besides their sum

    def check(self, where: str) -> None:
        Whole.check(self, where)
        if len(self.parts) != 2:
            raise PlanError(f"{where}: gate has {slots_text(self.parts)}; allowed: two")


# ---- checks of a plan ------------------------------------------------------------------------------------------------


class _Layer(Protocol):
    @property
    def own(self) -> Source | None: ...
    @property
    def local(self) -> Source | None: ...
    @property
    def keys(self) -> Read | None: ...
    @property
    def values(self) -> Read | None: ...
    @property
    def window(self) -> int | None: ...


class _Plan(Protocol):
    @property
    def layers(self) -> Sequence[_Layer]: ...
    def kept(self, slot: int) -> int | None: ...


def check_whole(plan: _Plan, i: int) -> bool:
    """Check the read of layer `i` if it is a `Whole` one; whether it is. Raises `PlanError`, naming the layer."""
    layer = plan.layers[i]
    read = layer.keys
    if not isinstance(read, Whole):
        if isinstance(layer.values, Whole) or layer.local is not None:
            raise PlanError(f"layer {i}: only a read of several slots, for keys and values alike, reads a local slot")
        return False
    if read != layer.values or layer.window is not None:
        raise PlanError(f"layer {i}: {read.key} is the keys and the values of the layer and has windows of its own")
    read.check(f"layer {i}")
    for name, source, number in (("own", layer.own, i), ("local", layer.local, LOCAL)):
        if (source is not None) != any(part.layer == number for part in read.parts):
            raise PlanError(f"layer {i}: {read.key} does not read the {name} slot of the layer, or there is none")
    for part in read.parts:
        if part.layer != LOCAL:
            _check_part(plan, i, read, part)
    if layer.local is not None:
        _check_local(i, read, layer.own, layer.local)
    _check_head_sizes(plan, i, read)
    return True


def _check_part(plan: _Plan, i: int, read: Whole, part: Part) -> None:
    j, where = part.layer, f"layer {i}: {read.key}"
    if not 0 <= j < len(plan.layers):
        raise PlanError(f"{where} reads layer {j}; the model has layers 0 to {len(plan.layers) - 1}")
    if j > i:
        raise PlanError(f"{where} reads layer {j} above it; allowed: layers below it, and slots of its own")
    own = plan.layers[j].own
    if own is None:
        owners = [n for n, layer in enumerate(plan.layers[: i + 1]) if layer.own is not None]
        raise PlanError(f"{where} reads layer {j}, which owns nothing; owners: {owners or 'none'}")
    _check_readable(where, j, own)
    kept = plan.kept(j)
    if kept is not None and (part.window is None or part.window > kept):
        seen = "all tokens" if part.window is None else f"a window of {part.window}"
        raise PlanError(
            f"{where} sees {seen} of layer {j}, which keeps {kept} tokens; allowed: a window of at most {kept}"
        )


def _check_head_sizes(plan: _Plan, i: int, read: Whole) -> None:
    """One query attends to all slots."""
    sources = {j: plan.layers[j].own for j in read.layers}
    named = {f"slot {j}": source for j, source in sources.items()} | {"the second own slot": plan.layers[i].local}
    sizes = {name: source.head_size_text for name, source in named.items() if source is not None}
    if len(set(sizes.values())) > 1:
        raise PlanError(
            f"layer {i}: {read.key}: cannot read slots of different head sizes: "
            + ", ".join(f"{name} has {size} channels a head" for name, size in sizes.items())
            + "; one query attends to all, so they must be equal"
        )


def _check_readable(where: str, j: int, own: Source) -> None:
    both: tuple[Half, ...] = ("keys", "values")
    if not own.is_plain or set(own.halves) != set(both):
        raise PlanError(f"{where} reads layer {j}, which owns a {own.noun}; allowed: slots of keys and values")


def _check_local(i: int, read: Whole, own: Source | None, local: Source) -> None:
    local.check(i)
    _check_readable(f"layer {i}: {read.key}", i, local)
    if local.input is not None or local.mixes:
        option = "mix" if local.mixes else "input"
        raise PlanError(
            f"layer {i}: {read.key}: the second own slot has {option}; allowed: in the first own slot alone, since the "
            "second is projected from the layer's own input"
        )
    if local.normalises and own is not None and own.input is not None:
        raise PlanError(
            f"layer {i}: {read.key}: the second own slot has kv_norm and the first one input {own.input}; allowed: one "
            "of the two"
        )
