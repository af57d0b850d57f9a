"""The KV plan: for every layer, where its keys come from, where its values come from, and which mask it uses.

A layer that projects its own K and V is an *owner*; what it projects is its *slot*, and only slots are cached. Every
layer, owner or not, *reads*: its keys are one slot's K (`Share`) or a weighted sum of several (`Fuse`), its values
likewise and independently. An owner that says nothing else reads itself.

    KVPlan.of([LayerPlan(own=Own(n_kv_heads=8)),                                # layer 0 owns and reads itself
               LayerPlan(own=Own(n_kv_heads=8)),                                # layer 1 too
               LayerPlan(keys=Share(1), values=Share(0)),                       # FusedKV-Lite
               LayerPlan(keys=Fuse((0, 1)), values=Fuse((0, 1)))])              # FusedKV

Plans hold no weights and no tensors. Layers count from 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from cllm.errors import PlanError
from cllm.plan.fuse import Fuse
from cllm.plan.joins import LOCAL, Attended, Whole, check_whole
from cllm.plan.kinds import MAX_LAYERS, Half, Own, Read, Retention, Share, Source
from cllm.plan.latent import Latent
from cllm.plan.loops import Loop, check_loop
from cllm.plan.numbers import layer_range, ranges
from cllm.plan.shape import Iterations
from cllm.plan.slot_shapes import check_fused, check_mixed, check_pair

__all__ = [
    "MAX_LAYERS",
    "Fuse",
    "Half",
    "Iterations",
    "KVPlan",
    "Latent",
    "LayerPlan",
    "Loop",
    "Own",
    "Read",
    "Retention",
    "Share",
    "Source",
    "layer_range",
    "ranges",
]

Kind = TypeVar("Kind", bound=Source)
ReadKind = TypeVar("ReadKind", bound=Read)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One layer. `keys` and `values` left out mean: read the slot that this layer owns."""

    own: Source | None = None
    keys: Read | None = None
    values: Read | None = None
    window: int | None = None
    """Tokens that a query sees, itself included; `None` is full causal attention. Also what a slot has to keep."""
    local: Source | None = None
    """A second slot of the layer, which it alone reads, beside others (`Whole`)."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    """A checked plan. Build it with `KVPlan.of`; a plan that exists is valid."""

    layers: tuple[LayerPlan, ...]
    iterations: Iterations | None = None
    loop: Loop | None = None

    @classmethod
    def of(cls, layers: Iterable[LayerPlan], iterations: Iterations | None = None, loop: Loop | None = None) -> KVPlan:
        """Fill in what `layers` left out and check the plan.

        Raises:
            PlanError: naming the layer, for a source that owns nothing or is out of range, keys or values that no layer
                reads or that no gradient reaches, fused slots of different shapes, keys and values with different
                numbers or sizes of heads, a latent slot read in part, a windowed slot read through a wider mask, a
                window through which queries have no effect, a source above the layer without `iterations`, turns of a
                loop that need different weights.
        """
        filled = [replace(p, keys=p.keys or Share(i), values=p.values or Share(i)) for i, p in enumerate(layers)]
        plan = cls(tuple(filled), iterations, loop)
        for i in range(len(filled)):
            plan._check_layer(i)
        plan._check_iterations()
        plan._check_halves()
        check_loop(plan)
        return plan

    def __len__(self) -> int:
        return len(self.layers)

    # ---- questions --------------------------------------------------------------------------------------------------

    def weights_of(self, i: int) -> int:
        """The layer whose weights layer `i` has: itself, or in later turns of a loop a layer of the first."""
        return i if self.loop is None else self.loop.weights_of(i)

    def keys(self, i: int) -> Read:
        """Where layer `i` reads its keys."""
        read = self.layers[i].keys
        assert read is not None
        return read

    def values(self, i: int) -> Read:
        """Where layer `i` reads its values."""
        read = self.layers[i].values
        assert read is not None
        return read

    def reads(self, i: int) -> tuple[int, ...]:
        """The owners whose slots layer `i` reads, in ascending order."""
        return tuple(sorted({*self.keys(i).layers, *self.values(i).layers}))

    def reads_others(self, i: int) -> tuple[int, ...]:
        """The owners other than itself whose slots layer `i` reads, to attend to them or to write its own."""
        return tuple(sorted({*self.reads(i), *self.mixes(i)} - {i}))

    def mixes(self, i: int) -> tuple[int, ...]:
        """The owners whose new keys and values layer `i` mixes into its own."""
        own = self.layers[i].own
        return () if own is None else own.mixes

    def mixers(self, owner: int) -> tuple[int, ...]:
        """The layers that mix the new keys and values of `owner` into their own, in ascending order."""
        return tuple(i for i in self.owners if owner in self.mixes(i))

    def fuses(self, i: int) -> bool:
        """Whether the keys or the values that layer `i` reads are made from slots, and not a slot as it is stored."""
        return not (self.reads_at_once(i) or (self.keys(i).is_stored and self.values(i).is_stored))

    def reads_at_once(self, i: int) -> bool:
        """Whether the keys and values that layer `i` reads are several slots, each with a mask of its own."""
        return isinstance(self.keys(i), Whole)

    def attended(self, i: int) -> tuple[Attended, ...]:
        """The slots that layer `i` attends to, by the mask with which it does."""
        read = self.keys(i)
        if not isinstance(read, Whole):
            return (Attended(self.reads(i), self.layers[i].window),)
        numbers = (len(self) + i if part.layer == LOCAL else part.layer for part in read.parts)
        return tuple(Attended((slot,), part.window) for slot, part in zip(numbers, read.parts, strict=True))

    def key_slots(self, i: int) -> tuple[int, ...]:
        """The numbers of the slots whose keys layer `i` reads, see `slots`."""
        read = self.keys(i)
        return tuple(part.slots[0] for part in self.attended(i)) if isinstance(read, Whole) else read.layers

    def read_flops(self, i: int, head_dim: int) -> float:
        """Forward FLOPs per token of matrix products that make the keys and values of layer `i` from slots."""
        heads, size = self.source(i).kv_heads or 0, self.source(i).head_size(head_dim)
        return self.keys(i).flops("keys", heads, size) + self.values(i).flops("values", heads, size)

    def kept_activations(self, i: int, head_dim: int) -> int:
        """Numbers per token that making the keys and values of layer `i` from slots keeps besides these."""
        heads, size = self.source(i).kv_heads or 0, self.source(i).head_size(head_dim)
        return sum(read.kept_activations(heads, size) for read in (self.keys(i), self.values(i)))

    def reads_itself(self, i: int) -> bool:
        """Whether layer `i` owns keys and values of its own input and reads those, as they are, and no others."""
        own = self.layers[i].own
        stored = not (self.fuses(i) or self.reads_at_once(i))
        return own is not None and own.is_ordinary and self.reads(i) == (i,) and stored

    def source(self, i: int) -> Source:
        """The kind of slot that layer `i` reads. All slots that one layer reads are of one kind."""
        return self.owned(self.keys(i).layers[0])

    def owned(self, i: int) -> Source:
        """The kind of the slot of that number, see `slots`; there must be one."""
        layer = self.layers[i % len(self)]
        own = layer.own if i < len(self) else layer.local
        assert own is not None, f"layer {i % len(self)} owns nothing"
        return own

    def kept(self, slot: int) -> int | None:
        """The number of last tokens that a slot keeps; None: all."""
        layer, read = slot % len(self), self.keys(slot % len(self))
        return read.kept(layer if slot < len(self) else LOCAL) if isinstance(read, Whole) else self.layers[layer].window

    def reading(self, kind: type[Kind]) -> dict[int, Kind]:
        """The layers that read slots of a kind, each with what it reads."""
        return {i: source for i in range(len(self)) if isinstance(source := self.source(i), kind)}

    def reads_by(self, kind: type[ReadKind]) -> dict[tuple[int, Half], ReadKind]:
        """The reads of a kind, by layer and half (`keys` or `values`)."""
        reads: dict[tuple[int, Half], Read] = {(i, "keys"): self.keys(i) for i in range(len(self))}
        reads |= {(i, "values"): self.values(i) for i in range(len(self))}
        return {place: read for place, read in reads.items() if isinstance(read, kind)}

    @property
    def owners(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.own is not None)

    @property
    def slots(self) -> tuple[int, ...]:
        """The numbers of all slots: that of layer i is i, and its local one is n_layers + i."""
        return (*self.owners, *(len(self) + i for i, layer in enumerate(self.layers) if layer.local is not None))

    @property
    def borrowers(self) -> tuple[int, ...]:
        """The layers that own nothing and read the slots of others."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.own is None)

    @property
    def inexact(self) -> tuple[int, ...]:
        """The layers that read keys or values other than a slot of theirs as it is."""
        return tuple(i for i in range(len(self)) if {self.keys(i), self.values(i)} != {Share(i)})

    @property
    def inputs(self) -> frozenset[int]:
        """The layers whose output the owners of other layers project."""
        return frozenset(own.input for j in self.owners if (own := self.owned(j)).input is not None)

    @property
    def last_of_prompt(self) -> int:
        """The highest layer that all tokens of a prompt have to reach: an owner that projects its own input, a layer
        whose output others project, or a cyclic one. Above it only the last token is computed."""
        owners = (j % len(self) for j in self.slots if self.owned(j).reads_a_prompt)
        return max([*owners, *self.inputs, *(last for _, last in self.cyclic_spans())])

    @property
    def shared(self) -> frozenset[int]:
        """The owners whose slots other layers read."""
        return frozenset(j for i in range(len(self)) for j in self.reads_others(i))

    def readers(self, half: Half) -> dict[int, list[int]]:
        """For every owner, the layers that read its `keys` or its `values`, in ascending order."""
        found: dict[int, list[int]] = {j: [] for j in self.owners}
        for i in range(len(self)):
            for j in (self.keys(i) if half == "keys" else self.values(i)).layers:
                found[j].append(i)
        return found

    def last_readers(self) -> dict[int, int]:
        """For every owner, the highest layer that reads its slot; above it the slot is no longer needed."""
        keys, values = self.readers("keys"), self.readers("values")
        return {j: max([*keys[j], *values[j], *self.mixers(j)], default=j) for j in self.owners}

    def last_reader(self, owner: int) -> int:
        """The highest layer that reads the slot of `owner`."""
        return self.last_readers()[owner]

    def reads_above(self, i: int) -> bool:
        """Whether layer `i` reads a slot of a layer above, so that a token cannot see its own key and value."""
        return any(j > i for j in self.reads(i))

    def cyclic_spans(self) -> tuple[tuple[int, int], ...]:
        """Runs of layers [first, last] to be computed together, by iteration, because one reads from above."""
        spans: list[tuple[int, int]] = []
        for i in range(len(self)):
            above = max(self.reads(i))
            if above <= i:
                continue
            if spans and i <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(above, spans[-1][1]))
            else:
                spans.append((i, above))
        return tuple(spans)

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check_layer(self, i: int) -> None:
        layer = self.layers[i]
        if layer.window is not None and layer.window < 1:
            raise PlanError(f"layer {i}: window is {layer.window}; allowed: 1 or more, or null for full attention")
        if layer.own is not None:
            layer.own.check(i)
            check_mixed(self, i, layer.own)
        if check_whole(self, i):
            return
        self._check_read(i, "keys", self.keys(i))
        self._check_read(i, "values", self.values(i))
        if not all(self.owned(j).is_plain for j in self.reads(i)):
            self._check_opaque(i)
        for what, read in (("keys", self.keys(i)), ("values", self.values(i))):
            check_fused(self, i, what, read)
        if layer.own is not None and layer.own.is_state and layer.window is not None:
            raise PlanError(
                f"layer {i}: keeps a {layer.own.noun} and has a window of {layer.window}; allowed: no window, since a "
                "state holds all tokens"
            )
        if layer.own is not None and layer.own.is_state and self.reads(i) != (i,):
            raise PlanError(
                f"layer {i}: keeps a {layer.own.noun} and reads layer {self.reads(i)[0]}; it can do only one"
            )
        check_pair(self, i)

    def _check_read(self, i: int, what: Half, read: Read) -> None:
        read.check(f"layer {i}: {what}")
        read.check_half(f"layer {i}: {what}", what)
        for j in read.layers:
            if not 0 <= j < len(self):
                raise PlanError(f"layer {i}: {what} come from layer {j}; the model has layers 0 to {len(self) - 1}")
            if self.layers[j].own is None:
                whence = "itself" if i == j else f"layer {j}"
                raise PlanError(
                    f"layer {i}: {what} come from {whence}, which owns nothing; owners: {list(self.owners) or 'none'}"
                )
            if what not in self.owned(j).halves:
                whence = "itself" if i == j else f"layer {j}"
                owners = [n for n in self.owners if what in self.owned(n).halves]
                raise PlanError(
                    f"layer {i}: {what} come from {whence}, which owns a {self.owned(j).noun}; owners of {what}: "
                    f"{owners or 'none'}"
                )
            window, kept = self.layers[i].window, self.kept(j)
            if kept is not None and (window is None or window > kept):
                seen = "full attention" if window is None else f"a window of {window}"
                raise PlanError(
                    f"layer {i}: has {seen}, but its {what} come from layer {j}, which keeps {kept} tokens; allowed: a "
                    f"window of at most {kept}"
                )

    def _check_opaque(self, i: int) -> None:
        """Slots that are not keys and values are read as one; a recurrent state by its own layer only."""
        keys, values = self.keys(i), self.values(i)
        for j in self.reads(i):
            own = self.owned(j)
            if own.is_plain:
                continue
            if self.fuses(i):
                raise PlanError(
                    f"layer {i}: fuses the slot of layer {j}, which is a {own.noun}; only keys and values fuse"
                )
            if keys != values:
                raise PlanError(
                    f"layer {i}: keys come from layer {keys.layers[0]} and values from layer {values.layers[0]}; a "
                    f"{own.noun} is read whole, so name layer {j} for both"
                )
            if not own.is_shareable and i != j:
                raise PlanError(f"layer {i}: reads layer {j}, whose {own.noun} no other layer can share")

    def _check_iterations(self) -> None:
        cyclic = [i for i in range(len(self)) if self.reads_above(i)]
        if cyclic and self.iterations is None:
            i = cyclic[0]
            raise PlanError(
                f"layer {i}: reads layer {max(self.reads(i))} above it, a cycle that only iterative training trains; "
                "set kv.iterations: {forward: 7, backward: 2}, or read from a layer below"
            )
        if self.iterations is not None and (self.iterations.forward < 0 or self.iterations.backward < 1):
            raise PlanError(
                f"kv.iterations is forward {self.iterations.forward}, backward {self.iterations.backward}; "
                "allowed: forward 0 or more, backward 1 or more"
            )
        for first, last in self.cyclic_spans():
            for i in range(first, last + 1):
                if (own := self.layers[i].own) is not None and own.is_state:
                    raise PlanError(
                        f"layer {i}: a {own.noun} inside the cyclic layers {first} to {last}; allowed: below or above "
                        "them, since they are computed several times"
                    )

    def _check_halves(self) -> None:
        """Every projection of every layer must have a gradient.

        A slot's keys and values are projected apart, so each needs a reader. In a cycle, a layer below the owner reads
        what the pass before has computed, so that with a single gradient pass it gives the owner none. In the first of
        all passes it reads zeros. Softmax over one key is 1 whatever the query.
        """
        iterations = self.iterations or Iterations()
        for i, layer in enumerate(self.layers):
            above = self.reads_above(i)
            if above and iterations.forward + iterations.backward < 2:
                raise PlanError(
                    f"layer {i}: reads layer {max(self.reads(i))} above it, of which a single pass knows nothing: "
                    f"kv.iterations is forward {iterations.forward}, backward {iterations.backward}; allowed: 2 or "
                    "more in sum"
                )
            if layer.window is not None and layer.window < 2 + above:
                seen = "a query sees one token at most" + (" beside itself" if above else "")
                raise PlanError(
                    f"layer {i}: window is {layer.window}, with which {seen}, so that its queries and keys have no "
                    f"effect; allowed: {2 + above} or more, or null for full attention"
                )
        keys, values = self.readers("keys"), self.readers("values")
        for j in self.owners:
            if not keys[j] and not values[j] and not self.mixers(j):
                raise PlanError(
                    f"layer {j}: owns a slot that no layer reads; let a layer read it, or let it own nothing"
                )
            for half in (own := self.owned(j)).halves:
                both = (*keys[j], *values[j]) if own.tensor_of("keys") == own.tensor_of("values") else ()
                readers = sorted({*(both or (keys[j] if half == "keys" else values[j])), *self.mixers(j)})
                if not readers:
                    raise PlanError(
                        f"layer {j}: its {half} are read by no layer; leave `{half}` out of layer {j}, which then "
                        "reads its own, or let another layer read them"
                    )
                if iterations.backward == 1 and readers[-1] < j:
                    raise PlanError(
                        f"layer {j}: its {half} are read only by layers below it ({ranges(readers)}), and with "
                        "kv.iterations.backward 1 these pass no gradient back; set kv.iterations.backward to 2 or "
                        f"more, or let layer {j} or one above it read them"
                    )
