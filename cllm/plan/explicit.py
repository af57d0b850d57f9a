"""The plan spelled out in YAML, a few entries that together name every layer once.

model:
  n_layers: 24
  kv:
    layers:
      - {layers: 0-11,  own: {}}
      - {layers: 12-23, keys: {fuse: [0, 11]}, values: {fuse: [0, 11]}}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.joins import Whole
from cllm.plan.kinds import Read, Share
from cllm.plan.loops import LoopConfig
from cllm.plan.numbers import layer_range, ranges
from cllm.plan.plan import KVPlan, LayerPlan
from cllm.plan.registry import READS, SOURCES
from cllm.plan.shape import IterationsConfig, Shape
from cllm.section import MAX_TOKENS, Section, create_section

_KINDS: dict[str, Any] = {
    kind.key: (kind.Settings | None, Field(None, description=kind.Settings.__doc__)) for kind in SOURCES.values()
}
_OPTIONS: dict[str, Any] = {
    name: (field.annotation, field) for kind in READS.values() for name, field in kind.Settings.model_fields.items()
}


class _Layers(Section):
    layers: int | str | list[int]
    """The layers that this entry describes: 3, "0-11" or [0, 2, 4]."""


if TYPE_CHECKING:

    class _Reads(Section):
        """A field for every option of a kind of read."""

    class _Owning(_Layers):
        """A field for every kind of source."""
else:
    _Reads = create_section("_Reads", Section, _OPTIONS)
    _Owning = create_section("_Owning", _Layers, _KINDS)


class ReadConfig(_Reads):
    """Where keys or values come from: `{share: 11}` or `{fuse: [0, 11]}`."""

    def read(self, where: str) -> Read:
        """The read of keys, or of values."""
        kind, layers, given = self.chosen(where, [key for key, kind in READS.items() if not issubclass(kind, Whole)])
        if issubclass(kind, Whole):
            raise PlanError(f"{where}: {kind.key} reads keys and values at once; write read: {{{kind.key}: ...}}")
        try:
            return kind.from_settings(layers, given)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None

    def chosen(self, where: str, allowed: Iterable[str] = READS) -> tuple[type[Read], Any, dict[str, Any]]:
        """The kind of read, the value under its key, and its options; `allowed` are the kinds that messages name."""
        given = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        kinds = [kind for kind in READS.values() if kind.key in given]
        if len(kinds) != 1:
            raise PlanError(f"{where}: needs exactly one of {', '.join(allowed)}")
        (kind,) = kinds
        layers = given.pop(kind.key)
        for other in READS.values():
            wrong = [n for n in given if n in other.Settings.model_fields and n not in kind.Settings.model_fields]
            if wrong:
                verb = "goes" if len(wrong) == 1 else "go"
                raise PlanError(f"{where}: {', '.join(wrong)} {verb} with {other.key}, not with {kind.key}")
        return kind, layers, given


class LayerConfig(_Owning):
    """One entry of `model.kv.layers`."""

    keys: ReadConfig | None = None
    """Where the keys come from; an owner may leave it out."""
    values: ReadConfig | None = None
    """Where the values come from; an owner may leave it out."""
    read: ReadConfig | None = None
    """Where keys and values come from at once: `{share: 11}`, or `{join: [11, {own: {window: 128}}]}`."""
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window in tokens; null: full attention."""

    def plan(self, index: int, shape: Shape) -> LayerPlan:
        if self.read is not None:
            kind, value, options = self.read.chosen(f"layer {index}: read")
            besides = ("keys", "values", *((*SOURCES, "window") if issubclass(kind, Whole) else ()))
            if others := [key for key in besides if getattr(self, key) is not None]:
                allowed = f"{kind.key} with its slots and windows" if issubclass(kind, Whole) else "read"
                raise PlanError(f"layer {index}: has read.{kind.key} and {', '.join(others)}; allowed: {allowed} alone")
            if issubclass(kind, Whole):
                return LayerPlan(**kind.fields_at(index, value, options, shape))
            return self.model_copy(update={"keys": self.read, "values": self.read, "read": None}).plan(index, shape)
        owned = {key: settings for key in SOURCES if (settings := getattr(self, key)) is not None}
        if len(owned) > 1:
            raise PlanError(f"layer {index}: names more than one of {', '.join(SOURCES)}")
        try:
            own = next((SOURCES[key].from_settings(settings, shape) for key, settings in owned.items()), None)
        except PlanError as error:
            raise PlanError(f"layer {index}: {error}") from None
        keys = self.keys.read(f"layer {index}: keys") if self.keys else None
        values = self.values.read(f"layer {index}: values") if self.values else None
        if own is None and (keys is None or values is None):
            missing = " and ".join(name for name, read in (("keys", keys), ("values", values)) if read is None)
            raise PlanError(f"layer {index}: owns nothing and does not say where its {missing} come from")
        return LayerPlan(own=own, keys=keys, values=values, window=self.window)


class Explicit(Section):
    """The plan spelled out, layer by layer."""

    layers: list[LayerConfig] = Field(min_length=1)
    """Entries that together name every layer of the model once."""
    iterations: IterationsConfig | None = None
    """Passes over cyclic layers; a plan that reads from a layer above needs it."""
    loop: LoopConfig | None = None
    """Layers that are computed several times in a row with the same weights; null: none. `model.n_layers` and the
    entries of `layers` count every turn."""

    def expand(self, shape: Shape) -> KVPlan:
        found: dict[int, LayerPlan] = {}
        for entry in self.layers:
            for i in layer_range(entry.layers, "model.kv.layers"):
                if i in found:
                    raise PlanError(f"layer {i}: described twice in model.kv.layers")
                if not 0 <= i < shape.n_layers:
                    raise PlanError(
                        f"layer {i}: in model.kv.layers, but the model has layers 0 to {shape.n_layers - 1}"
                    )
                found[i] = entry.plan(i, shape)
        missing = [i for i in range(shape.n_layers) if i not in found]
        if missing:
            raise PlanError(f"layer {missing[0]}: not described in model.kv.layers (missing: [{ranges(missing)}])")
        iterations = self.iterations.plan() if self.iterations else None
        return KVPlan.of([found[i] for i in range(shape.n_layers)], iterations, self.loop.plan() if self.loop else None)


def plan_entries(plan: KVPlan) -> list[dict[str, Any]]:
    """`model.kv.layers` for a plan: one entry for all layers that do the same."""
    entries: list[dict[str, Any]] = []
    for i, layer in enumerate(plan.layers):
        entry: dict[str, Any] = {} if layer.own is None else {layer.own.key: layer.own.settings()}
        if isinstance(layer.keys, Whole):
            entry = {"read": layer.keys.settings_at(i, layer.own, layer.local)}
        for half, read in (("keys", plan.keys(i)), ("values", plan.values(i))):
            if read != Share(i) and "read" not in entry:
                entry[half] = read.settings()
        if layer.window is not None:
            entry["window"] = layer.window
        same = next((e for e in entries if {k: v for k, v in e.items() if k != "layers"} == entry), None)
        if same is None:
            entries.append({"layers": [i], **entry})
        else:
            same["layers"].append(i)
    return entries
