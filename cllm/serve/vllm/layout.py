"""The cache entries of a KV plan in vLLM, which layer reads which of them, and the plans that vLLM cannot serve.

vLLM caches keys and values of attention layers. An entry of its cache has keys and values side by side, and one head
size. A plan becomes entries in three ways:

- *both*: an owner's keys and values are one entry. A layer may read the keys of one entry and the values of another.
- *wide*: owners whose keys are fused lie side by side in one entry, with heads of m D channels. The fused scores are
  those of one attention with queries [a_1 ⊙ q, ..., a_m ⊙ q] over keys [k_1, ..., k_m], and the fused values are
  Σ_j b_j ⊙ out_j over the m parts of its output. No fused key is ever made.
- *apart*: in a plan in which some owner has only keys or only values, keys and values are entries of their own.

Values that are fused without keys need no wide entry: attention is linear in them, so each source is read on its own.

This module knows nothing of vLLM and torch, and says everything about a plan before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.forms import OwnHalf, OwnMixed, OwnTied
from cllm.plan.fuse import Fuse
from cllm.plan.joins import Whole
from cllm.plan.kinds import Half, Own, Share
from cllm.plan.plan import KVPlan

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's CPU backend."""

Content = Literal["both", "keys", "values"]
_HALVES: tuple[Half, Half] = ("keys", "values")


@dataclass(frozen=True, slots=True)
class Entry:
    """A cache entry: tensors of one layer of vLLM's cache, paged together."""

    owners: tuple[int, ...]
    """The owners whose tensors lie side by side in it, ascending."""
    content: Content
    n_kv_heads: int
    """KV heads, of all tensor parallel ranks together."""
    head_dim: int
    """Channels of one owner's head."""
    window: int | None
    """Tokens that vLLM keeps; None: all."""

    @property
    def layer(self) -> int:
        """The layer that has the entry: its lowest owner."""
        return self.owners[0]

    @property
    def head_size(self) -> int:
        """Channels of a head as the attention kernel sees it."""
        return len(self.owners) * self.head_dim

    @property
    def elements(self) -> int:
        """Numbers that one token adds."""
        return self.n_kv_heads * self.head_size * (2 if self.content == "both" else 1)


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call: over the keys of one entry and the values of another, or of the same."""

    keys: Entry
    values: Entry
    value_sources: tuple[int, ...]
    """Indices in the layer's `values` read of the sources whose part of the output this call yields."""


Attending = Literal["entry", "own", "borrowed"]


@dataclass(frozen=True, slots=True)
class LayerRead:
    """How a layer attends."""

    layer: int
    calls: tuple[Call, ...]
    attending: Attending
    """`entry`: with the attention layer of the keys' entry, whose window the layer has. `own`: with a layer of vLLM
    that names that entry as its `kv_sharing_target_layer_name`. `borrowed`: with a kernel of its own window and the
    metadata of the entry's layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The cache of a plan in vLLM."""

    entries: tuple[Entry, ...]
    """In the order in which vLLM has to know them, see `order`."""
    reads: tuple[LayerRead, ...]
    """By layer."""
    partners: Mapping[Entry, Entry]
    """For an entry of keys alone: one of values, and the reverse. A kernel writes keys and values at once, into entries
    of one shape and block table. An owner of both has its other half."""
    exit_at: int | None
    """The lowest layer whose attention needs only the tokens whose logits are wanted (vLLM's fast prefill); None: all
    layers need all tokens."""

    @property
    def elements(self) -> int:
        """Numbers that a token adds to the cache, entries with windows included."""
        return sum(entry.elements for entry in self.entries)

    @property
    def owners_of_both(self) -> frozenset[int]:
        """The owners whose keys and whose values are both in the cache."""
        keys, values = ({j for e in self.entries if e.content in ("both", half) for j in e.owners} for half in _HALVES)
        return frozenset(keys & values)

    def of(self, owner: int, half: Half) -> Entry:
        """The entry in which the keys or the values of an owner are."""
        return next(e for e in self.entries if owner in e.owners and e.content in ("both", half))

    def order(self) -> list[Entry | LayerRead]:
        """Entries and reads with an attention layer of vLLM, in the order in which it has to know them.

        vLLM takes the layers at the end that share the cache of others for those of fast prefill. So entries come
        before reads from `exit_at` on, and elsewhere in the order of layers.
        """
        exit_at = len(self.reads) if self.exit_at is None else self.exit_at
        reads = [read for read in self.reads if read.attending == "own"]
        lower: list[Entry | LayerRead] = [*(e for e in self.entries if e.layer < exit_at)]
        lower += [read for read in reads if read.layer < exit_at]
        lower.sort(key=lambda x: (x.layer, isinstance(x, LayerRead)))
        return [*lower, *(e for e in self.entries if e.layer >= exit_at), *(r for r in reads if r.layer >= exit_at)]


def check_decoder(config: ModelConfig) -> None:
    """Raise `UserError` for a decoder that `model.py` does not compute, whatever its plan is."""
    for key, value in config.beyond_llama.items():
        raise UserError(f"model.{key} is {str(value).lower()}, which cannot be served with vLLM; allowed: the default")


def make_layout(
    plan: KVPlan,
    n_heads: int,
    head_dim: int,
    *,
    head_sizes: Collection[int] | None = None,
    ranks: int = 1,
    exits: bool = False,
) -> Layout:
    """The cache of `plan` in vLLM.

    Args:
        plan: of the model.
        n_heads: query heads of a layer.
        head_dim: channels of a head.
        head_sizes: those that the attention backend has; None: any.
        ranks: tensor parallel processes, among which heads are divided.
        exits: upper layers compute only the tokens whose logits are wanted, where the plan allows it.

    Raises:
        UserError: naming the layer, for a plan that vLLM cannot serve.
    """
    _check_kinds(plan)
    _check_ranks(plan, n_heads, ranks)
    entries = _entries(plan, head_dim)
    _check_sizes(entries, head_sizes)
    calls = [_calls(plan, entries, i) for i in range(len(plan))]
    _check_windows(calls)
    shapes = {(e.n_kv_heads, e.head_size, e.content == "both") for e in entries}
    # With entries of several shapes in a group, vLLM 0.32 has no metadata for layers that name a target (KeyError).
    named = len(shapes) == 1
    exit_at = _exit_at(plan) if exits and named else None
    # vLLM takes all layers with a target at the end of its list for those of fast prefill. If no entry parts the layers
    # below `exit_at` from those, they get none.
    lower_named = named and (exit_at is None or any(entry.layer >= exit_at for entry in entries))
    reads = tuple(
        LayerRead(i, c, _attending(plan, i, c, named if exit_at is not None and i >= exit_at else lower_named, exit_at))
        for i, c in enumerate(calls)
    )
    entries = sorted(entries, key=lambda e: (e.layer, e.content))
    layout = Layout(tuple(entries), reads, _partners(calls), exit_at)
    _check_groups(layout)
    return layout


def cache_groups(entries: Iterable[Entry]) -> dict[Entry, int]:
    """The group of each entry in vLLM 0.32; the entries of a group have one block table.

    Entries of one window are one group. Otherwise those of one shape and window are divided into groups of one size,
    the number of the rarest kind, or of the most frequent one if that is less than half as much again.

    Args:
        entries: in vLLM's order, that of `Layout.order`.
    """
    entries = list(entries)
    if len({entry.window for entry in entries}) == 1:
        return dict.fromkeys(entries, 0)
    kinds: dict[tuple[int, int, Content, int | None], list[Entry]] = {}
    for entry in entries:
        shape: Content = "both" if entry.content == "both" else "keys"
        kinds.setdefault((entry.n_kv_heads, entry.head_size, shape, entry.window), []).append(entry)
    counts = [len(kind) for kind in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups: dict[Entry, int] = {}
    first = 0
    for kind in kinds.values():
        n_groups = -(-len(kind) // size)
        groups |= {entry: first + n % n_groups for n, entry in enumerate(kind)}
        first += n_groups
    return groups


# ---- refusals --------------------------------------------------------------------------------------------------------


def _refused(reason: str) -> UserError:
    return UserError(f"vLLM cannot serve this KV plan: {reason}")


def _check_kinds(plan: KVPlan) -> None:
    for first, last in plan.cyclic_spans():
        raise _refused(
            f"layers {first} to {last} read from layers above them, by iteration, and vLLM passes through the layers "
            "once; use transformers"
        )
    if plan.loop is not None:
        raise _refused(f"{plan.loop.text}, and vLLM loads weights for every layer; use transformers")
    for j in plan.owners:
        own = plan.owned(j)
        if own.is_state:
            raise _refused(f"layer {j} keeps a {own.noun}, which is no paged cache; use transformers")
        if not own.is_plain:
            raise _refused(
                f"layer {j} owns a {own.noun}; vLLM's attention over latents (MLA) shares no cache between layers and "
                "has one size on a CPU; use transformers"
            )
        if own.head_dim is not None:
            raise _refused(
                f"layer {j} owns heads of {own.head_dim} channels, not of model.head_dim; the plug-in has one head "
                "size; use transformers"
            )
        if type(own) not in (Own, OwnHalf, OwnTied, OwnMixed):
            raise _refused(f"layer {j} owns a {type(own).__name__}, a kind of another package")
    for i in range(len(plan)):
        for read in (plan.keys(i), plan.values(i)):
            if isinstance(read, Whole):
                raise _refused(
                    f"layer {i} reads several slots at once ({read.key}), each with a mask; vLLM's attention reads one "
                    "slot with one mask; use transformers"
                )
            if type(read) not in (Share, Fuse):
                raise _refused(f"layer {i} reads by {type(read).__name__}, a kind of another package")


def _check_ranks(plan: KVPlan, n_heads: int, ranks: int) -> None:
    counts = {n_heads, *(heads for j in plan.owners if (heads := plan.owned(j).kv_heads) is not None)}
    wrong = sorted(count for count in counts if count % ranks)
    if wrong:
        raise UserError(
            f"tensor parallel size is {ranks}; allowed: sizes that divide {n_heads} query heads and the KV heads of "
            f"every owner ({', '.join(map(str, sorted(counts)))})"
        )


def _check_sizes(entries: Iterable[Entry], head_sizes: Collection[int] | None) -> None:
    for entry in entries:
        if head_sizes is None or entry.head_size in head_sizes:
            continue
        allowed = ", ".join(map(str, sorted(head_sizes)))
        if len(entry.owners) == 1:
            raise _refused(
                f"layer {entry.layer} has heads of {entry.head_size} channels; the attention backend has {allowed}"
            )
        raise _refused(
            f"keys of layers {', '.join(map(str, entry.owners))} are fused, so they lie side by side as heads of "
            f"{len(entry.owners)} x {entry.head_dim} = {entry.head_size} channels; the attention backend has {allowed}"
        )


def _check_windows(calls: Iterable[tuple[Call, ...]]) -> None:
    for i, layer in enumerate(calls):
        for call in layer:
            if call.keys.window != call.values.window:
                raise _refused(
                    f"layer {i}: reads keys of layer {call.keys.layer} and values of layer {call.values.layer}, whose "
                    f"windows differ ({_window(call.keys)} and {_window(call.values)}); vLLM puts them into different "
                    "cache groups, with block tables of their own"
                )


def _window(entry: Entry) -> str:
    return "none" if entry.window is None else str(entry.window)


def _check_groups(layout: Layout) -> None:
    """Refuse entries that one kernel reads or writes together and that have different block tables."""
    pairs = [(call.keys, call.values) for read in layout.reads for call in read.calls]
    pairs += [
        (entry, layout.of(entry.layer, "values"))
        for entry in layout.entries
        if entry.content == "keys" and entry.layer in layout.owners_of_both
    ]
    groups = cache_groups(item for item in layout.order() if isinstance(item, Entry))
    for keys, values in pairs:
        if groups[keys] != groups[values]:
            raise _refused(
                f"keys of layer {keys.layer} and values of layer {values.layer} are used together, and vLLM puts them "
                "into different cache groups, with block tables of their own, because owners have different windows; "
                "give all owners the same window"
            )


# ---- entries ---------------------------------------------------------------------------------------------------------


def _entries(plan: KVPlan, head_dim: int) -> list[Entry]:
    apart = any(len(plan.owned(j).halves) == 1 for j in plan.owners)
    entries = []
    for owners in _side_by_side(plan):
        first = plan.owned(owners[0])
        assert first.kv_heads is not None
        windows = {plan.layers[j].window for j in owners}
        if len(windows) > 1:
            raise _refused(
                f"keys of layers {', '.join(map(str, owners))} are fused, and their windows differ; vLLM keeps those "
                "of different windows in different cache groups"
            )
        contents: tuple[Content, ...] = first.halves if apart else ("both",)
        if len(owners) > 1:
            if single := next((j for j in owners if len(plan.owned(j).halves) == 1), None):
                raise _refused(
                    f"layer {single} owns {plan.owned(single).halves[0]} alone, and lies side by side with layers "
                    f"{', '.join(str(j) for j in owners if j != single)}, because keys are fused"
                )
            contents = ("both",)
        window = windows.pop()
        entries += [Entry(owners, content, first.kv_heads, head_dim, window) for content in contents]
    return entries


def _side_by_side(plan: KVPlan) -> list[tuple[int, ...]]:
    """The owners in sets that share an entry: those whose keys are fused, and all that a layer reads with one of them.

    Keys and values of one kernel have one head size, so a layer that reads one wide entry reads nothing else.
    """
    sets = [{j} for j in plan.owners]
    changed = True
    while changed:
        changed = False
        for i in range(len(plan)):
            fused = set(plan.keys(i).layers)
            found = [s for s in sets if s & set(plan.reads(i))]
            wide = len(fused) > 1 or any(len(s) > 1 for s in found)
            if wide and len(found) > 1:
                sets = [s for s in sets if s not in found] + [set().union(*found)]
                changed = True
    return sorted(tuple(sorted(s)) for s in sets)


def _calls(plan: KVPlan, entries: list[Entry], layer: int) -> tuple[Call, ...]:
    def of(owner: int, half: Half) -> Entry:
        return next(e for e in entries if owner in e.owners and e.content in ("both", half))

    keys, values = of(plan.keys(layer).layers[0], "keys"), plan.values(layer).layers
    if len(keys.owners) > 1:
        return (Call(keys, keys, tuple(range(len(values)))),)
    return tuple(Call(keys, of(j, "values"), (n,)) for n, j in enumerate(values))


def _exit_at(plan: KVPlan) -> int | None:
    """The lowest layer whose attention needs only some tokens of a prompt."""
    last = plan.last_of_prompt
    exit_at = last if last not in plan.inputs else last + 1
    return exit_at if exit_at < len(plan) else None


def _attending(plan: KVPlan, layer: int, calls: tuple[Call, ...], named: bool, exit_at: int | None) -> Attending:
    entry = calls[0].keys
    if named and exit_at is not None and layer >= exit_at:
        return "own"
    if entry.layer == layer or (not named and entry.window == plan.layers[layer].window):
        return "entry"
    return "own" if named else "borrowed"


def _partners(calls: Iterable[tuple[Call, ...]]) -> dict[Entry, Entry]:
    """Pairs of entries that a kernel reads together, those of one owner first."""
    partners: dict[Entry, Entry] = {}
    pairs = [(call.keys, call.values) for layer in calls for call in layer if call.keys.content == "keys"]
    for keys, values in sorted(pairs, key=lambda pair: pair[0].layer != pair[1].layer):
        partners.setdefault(keys, values)
        partners.setdefault(values, keys)
    return partners
