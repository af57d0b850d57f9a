"""Random plans, as YAML would give them: every kind of source and of read, alone and together.

About half of the plans are accepted. Kinds that plug-ins register are drawn too, with their settings at the defaults.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st

from cllm.config import ModelConfig
from cllm.plan.joins import Whole
from cllm.plan.registry import READS, SOURCES
from cllm.section import Section

VOCABULARY = 32
LATENTS = [
    {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3},
    {"kv_lora_rank": 5, "qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 4, "q_lora_rank": 7},
    {"kv_lora_rank": 9, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 7, "blocks": 3},
]
PLUGGED = {key for key, kind in {**READS, **SOURCES}.items() if not kind.__module__.startswith("cllm.")}
"""Kinds of plug-ins. With any, plans count as examples if they have one of them and are accepted; few are enough."""
WANTED = os.environ.get("CLLM_PLANS")
"""The number of examples that the user wants; None: few, and always the same."""
GIVEN = WANTED or ("8" if PLUGGED else None)
PROPERTY = settings(
    max_examples=int(GIVEN or 50),
    derandomize=WANTED is None,
    database=None,
    deadline=None,
    print_blob=True,
    phases=(*(() if PLUGGED else (Phase.explicit,)), Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


class File(Section):
    """A config file with nothing but a model."""

    model: ModelConfig


def model(layers: list[dict[str, Any]], iterations: dict[str, int] | None = None) -> dict[str, Any]:
    """A `model` section with entries of `model.kv.layers`, as YAML would give it."""
    shape = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": len(layers), "n_heads": 4, "head_dim": 4, "d_ff": 12}
    return {**shape, "max_seq_len": 16, "kv": {"layers": layers, "iterations": iterations}}


@st.composite
def reads(draw: st.DrawFn, layer: int, half: str, owners: list[int], cyclic: bool) -> dict[str, Any]:
    """`share` or `fuse` of owners, mostly of such as the layer may read."""
    near = [j for j in owners if cyclic or j <= layer] or owners
    pool = st.sampled_from(near if draw(st.integers(0, 19)) else owners)
    if draw(st.booleans()):
        return {"share": draw(pool)}
    known = {"share", *(key for key, kind in READS.items() if issubclass(kind, Whole) or key == "fuse")}
    if others := sorted(READS.keys() - known):  # of plug-ins, with their options at the defaults
        key = draw(st.sampled_from(["fuse", *4 * others]))
        if key != "fuse":
            two = st.lists(pool, min_size=2, max_size=2, unique=True) if len(set(near)) > 1 else st.just([near[0]])
            return {key: draw(two if draw(st.booleans()) else st.lists(pool, min_size=1, max_size=3, unique=True))}
    read: dict[str, Any] = {"fuse": draw(st.lists(pool, min_size=1, max_size=3, unique=True))}
    rich = "complex" if half == "keys" else "matrix"
    for key, values in (
        ("granularity", ["scalar", "channel", rich]),
        ("per_head", [False, True]),
        ("init", ["lite", "mean"]),
    ):
        if draw(st.booleans()):
            read[key] = draw(st.sampled_from(values))
    if read.get("granularity") == rich:
        read.pop("per_head", None)
    return read


def _has_plug_in(layers: list[dict[str, Any]]) -> bool:
    return any(PLUGGED & {*entry, *entry.get("keys", ()), *entry.get("values", ())} for entry in layers)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """A `model` section with a plan spelled out, as YAML would give it; about two in three are accepted."""
    n = draw(st.integers(1, 6))
    cyclic = draw(st.booleans())
    heads = draw(st.sampled_from([1, 2, 4]))
    windows: list[int | None] = draw(
        st.sampled_from([[None], [None], [3], [4], [None, 2, 3, 5], [None, None, None, 1, 2]])
    )
    kinds = draw(st.sampled_from([["own"], ["own"], ["own"], ["own", "own", "latent", "retention"], ["latent"]]))
    latent = draw(st.sampled_from(LATENTS))
    owned = [draw(st.sampled_from(kinds)) if draw(st.integers(0, 9)) < 5 else None for _ in range(n)]
    if not cyclic or not any(owned):
        owned[-1 if cyclic else 0] = draw(st.sampled_from(kinds[:3]))
    of_kind = {kind: [i for i, own in enumerate(owned) if own == kind] for kind in ("own", "latent", "retention")}
    layers: list[dict[str, Any]] = []
    plain = sorted(key for key, kind in SOURCES.items() if kind.is_plain and key != "own")
    for i, kind in enumerate(owned):
        entry: dict[str, Any] = {"layers": i}
        if kind == "own":
            odd = draw(st.integers(0, 19)) == 0
            key = draw(st.sampled_from(["own", *plain]))
            own = {"n_kv_heads": draw(st.sampled_from([1, 2, 4])) if odd else heads, "kv_norm": draw(st.booleans())}
            entry[key] = own if key == "own" else {}
        elif kind is not None:
            entry[kind] = dict(latent) if kind == "latent" else {}
        reads_slots = kind is None or (kind == "own" and draw(st.integers(0, 3)) < 1 + 2 * cyclic)
        if reads_slots and of_kind["latent"] and (not of_kind["own"] or draw(st.booleans())) and kind is None:
            whole = {"share": draw(st.sampled_from(of_kind["latent"]))}
            entry |= {"keys": whole, "values": whole}
        elif reads_slots and of_kind["own"]:
            halves = (
                ["keys", "values"]
                if kind is None or draw(st.booleans())
                else [draw(st.sampled_from(["keys", "values"]))]
            )
            entry |= {half: draw(reads(i, half, of_kind["own"], cyclic)) for half in halves}
        if (window := draw(st.sampled_from(windows))) is not None and (kind != "retention" or draw(st.booleans())):
            entry["window"] = window
        layers.append(entry)
    iterations = None
    if cyclic or draw(st.integers(0, 9)) == 0:
        iterations = {"forward": draw(st.integers(0, 3)), "backward": draw(st.sampled_from([1, 1, 2, 3]))}
    flags = ("qk_norm", "q_bias", "kv_bias", "tie_embeddings", "scale_embeddings")
    options: dict[str, Any] = {key: draw(st.booleans()) for key in flags}
    assume(not PLUGGED or _has_plug_in(layers))
    options["mlp_activation"] = draw(st.sampled_from(["silu", "gelu_tanh"]))
    if draw(st.integers(0, 2)) == 0:
        options["rope"] = {"windowed_theta": 30.0}
    return model(layers, iterations) | options


@st.composite
def formed(draw: st.DrawFn) -> dict[str, Any]:
    """A section of `models` whose owners of keys and values have random forms."""
    section = draw(models())
    layers = section["kv"]["layers"]
    whole: list[int] = []
    for i, entry in enumerate(layers):
        if "own" not in entry:
            continue
        forms = [None, "tie", *(["mix"] if whole else []), *(["only"] if whole and "values" not in entry else [])]
        form, own = draw(st.sampled_from(forms)), entry["own"]
        if i > 0 and not own["kv_norm"] and draw(st.booleans()):
            own["input"] = draw(st.integers(0, i - 1))
        if form == "only":
            own["only"], entry["values"] = "keys", {"share": draw(st.sampled_from(whole))}
        elif form == "mix":
            own["mix"] = draw(st.lists(st.sampled_from(whole), min_size=1, max_size=2, unique=True))
        elif form == "tie":
            own["tie"] = "kv"
        if form != "only":
            whole.append(i)
    return section


@st.composite
def joined(draw: st.DrawFn) -> dict[str, Any]:
    """A section of `formed` some of whose layers read several slots at once, each with a mask of its own."""
    section = draw(formed())
    layers = section["kv"]["layers"]
    heads = st.sampled_from([1, 2, 4])
    windows = st.sampled_from([None, None, 1, 2, 3, 5])

    def own(i: int, *, local: bool) -> dict[str, Any]:
        slot = {"n_kv_heads": draw(heads), "window": draw(windows)} | draw(st.sampled_from([{}, {"tie": "kv"}]))
        if i > 0 and not local and draw(st.booleans()):
            slot["input"] = draw(st.integers(0, i - 1))
        return {"own": slot}

    for i, entry in enumerate(layers):
        below = [j for j in range(i) if {"own", "read"} & layers[j].keys()]
        if draw(st.booleans()) or "retention" in entry:
            continue
        parts: list[Any] = [own(i, local=False)] if not below or draw(st.booleans()) else []
        if below and (not parts or draw(st.booleans())):
            shared = {"share": draw(st.sampled_from(below)), "window": draw(windows)}
            parts.append(shared["share"] if shared["window"] is None else shared)
        if "own" in (parts[0] if isinstance(parts[0], dict) else {}) and draw(st.booleans()):
            parts.append(own(i, local=True))
        read: dict[str, Any] = {"join": parts, "sink": len(parts) == 1 or draw(st.booleans())}
        if len(parts) == 2 and draw(st.booleans()):
            read = {"gate": parts, "gates": draw(st.sampled_from(["separate", "complementary"]))}
        layers[i] = {"layers": i, "read": read}
    return section


def owned_settings(entry: dict[str, Any], layer: int) -> list[tuple[int | str, dict[str, Any]]]:
    """The settings of the slots that an entry owns, with the layer, or `local` and the layer for a second slot."""
    if "own" in entry:
        return [(layer, entry["own"])]
    parts: list[Any] = next(iter(entry.get("read", {}).values()), [])
    own = [part["own"] for part in parts if isinstance(part, dict) and "own" in part]
    return list(zip((layer, f"local {layer}"), own, strict=False))


def read_together(entry: dict[str, Any], layer: int) -> list[int | str]:
    """The slots that a layer reads at once or mixes, which need heads of one size."""
    parts: list[Any] = next(iter(entry.get("read", {}).values()), [])
    found: list[int | str] = [
        part if isinstance(part, int) else part["share"] for part in parts if "own" not in str(part)
    ]
    reads = [entry[half] for half in ("keys", "values") if half in entry]
    found += [read["share"] for read in reads if "share" in read]
    found += [j for read in reads for owners in read.values() if isinstance(owners, list) for j in owners]
    owned = owned_settings(entry, layer)
    if len(reads) == 1 or "read" in entry:
        found += [name for name, _ in owned]
    return found + [j for _, own in owned for j in [*own.get("mix", []), layer] if "mix" in own]


@st.composite
def sized(draw: st.DrawFn) -> dict[str, Any]:
    """A section of `joined` with heads of several sizes, mostly one for all slots that are read together."""
    section = draw(joined())
    layers = section["kv"]["layers"]
    several: list[int | None] = draw(st.sampled_from([[None, 6], [2, 6], [None, 2, 6, 8]]))
    settings_of = {name: own for i, entry in enumerate(layers) for name, own in owned_settings(entry, i)}
    group = {name: {name} for name in settings_of}
    if draw(st.integers(0, 9)):
        for i, entry in enumerate(layers):
            joint = set().union(*(group[name] for name in read_together(entry, i) if name in group))
            group |= dict.fromkeys(joint, joint)
    for members in {id(members): members for members in group.values()}.values():
        size = draw(st.sampled_from(several))
        for name in members & settings_of.keys():
            settings_of[name] |= {} if size is None else {"head_dim": size}
    return section


def own_parts(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the slots of its own that a read of several slots names, windows included."""
    read = entry.get("read", {})
    parts: list[Any] = read.get("join") or read.get("gate") or []
    return [part["own"] for part in parts if isinstance(part, dict) and "own" in part]


@st.composite
def varied(draw: st.DrawFn) -> dict[str, Any]:
    """A section of `sized` with latents of several shapes, options that only some reads have, and windows that mostly
    fit."""
    section = draw(sized())
    layers = section["kv"]["layers"]
    for i, entry in enumerate(layers):
        if "latent" in entry:
            entry["latent"] = dict(draw(st.sampled_from(LATENTS)))
        for half in ("keys", "values"):
            if "fuse" in entry.get(half, {}) and draw(st.integers(0, 4)) == 0:
                entry[half]["init"] = "randn"
        if "keys" in entry and entry["keys"] == entry.get("values") and draw(st.booleans()):
            entry["read"] = entry.pop("keys")
            del entry["values"]
        if (owned := own_parts(entry)) and draw(st.integers(0, 3)) == 0:
            owned[-1]["kv_norm"] = True
        below = [j for j in range(i) if "own" in layers[j]]
        if owned and below and "tie" not in owned[0] and draw(st.integers(0, 4)) == 0:
            owned[0]["mix"] = [draw(st.sampled_from(below))]
        if "own" in entry and "read" not in entry and not {"tie", "mix"} & entry["own"].keys() and draw(st.booleans()):
            half, other = draw(st.sampled_from([("keys", "values"), ("values", "keys")]))
            mine = shape_of({**entry["own"], "only": None}, other)
            if fitting := [j for j in below if shape_of(layers[j]["own"], other) == mine]:
                entry.pop(half, None)
                entry["own"]["only"], entry[other] = half, {"share": draw(st.sampled_from(fitting))}
    if draw(st.integers(0, 9)):
        fit_windows(layers)
    return section


def shape_of(own: dict[str, Any], half: str) -> tuple[Any, ...]:
    """Heads, their size, and whether the slot has a half."""
    return own["n_kv_heads"], own.get("head_dim"), own.get("only") in (None, half)


def fit_windows(layers: list[dict[str, Any]]) -> None:
    """Narrow the windows of layers that read from below to those of the slots, and leave kv_norm out beside input."""
    kept: dict[int, int | None] = {}

    def narrowed(window: int | None, least: int | None) -> int | None:
        return min((w for w in (window, least) if w is not None), default=None)

    for i, entry in enumerate(layers):
        owned = own_parts(entry)
        kept[i] = owned[0].get("window") if owned else entry.get("window")
        for name in ("join", "gate"):
            for n, part in enumerate(entry.get("read", {}).get(name, [])):
                shared = {"share": part} if isinstance(part, int) else part
                options = shared.get("own", shared)
                window = narrowed(options.get("window"), kept.get(shared.get("share", -1)))
                if window is not None:
                    options["window"] = max(window, 2) if name == "gate" else window
                if "share" in shared and window is not None:
                    entry["read"][name][n] = shared
        kept[i] = owned[0].get("window") if owned else kept[i]
        for read in [entry[half] for half in ("keys", "values", "read") if half in entry]:
            sources = [read["share"]] if "share" in read else read.get("fuse", [])
            for j in sources:
                if (window := narrowed(entry.get("window"), kept.get(j))) is not None:
                    entry["window"] = max(window, 2)
        if "read" not in entry or "share" in entry["read"]:
            kept[i] = entry.get("window")
        for own in [*owned, *([entry["own"]] if "own" in entry else [])]:
            if any(other.get("input") is not None for other in (own, *owned)):
                own["kv_norm"] = False


def moved(entry: dict[str, Any], place: Callable[[int], int]) -> dict[str, Any]:
    """A copy of an entry that names layer `place(j)` where it named layer j."""

    def change(found: Any, key: str) -> Any:
        if isinstance(found, dict):
            return {k: change(v, k) for k, v in found.items()}
        if key in ("join", "gate"):
            return [place(part) if isinstance(part, int) else change(part, "") for part in found]
        if key in ("fuse", "mix"):
            return list(dict.fromkeys(map(place, found)))
        return place(found) if key in ("share", "input", "layers") and found is not None else found

    return {key: change(value, key) for key, value in copy.deepcopy(entry).items()}


@st.composite
def looped(draw: st.DrawFn) -> dict[str, Any]:
    """A section of `varied` some of whose layers are computed several times.

    Later turns read their own slots or those of the first turn; a later turn may own less than the first.
    """
    section = draw(varied())
    layers = section["kv"]["layers"]
    first = draw(st.integers(0, len(layers) - 1))
    count, times = draw(st.integers(1, min(3, len(layers) - first))), draw(st.integers(2, 3))
    more = count * (times - 1)

    def place(turn: int) -> Callable[[int], int]:
        """Layers above the loop move up; those in it are of a turn."""
        return lambda j: j + more if j >= first + count else j + turn * count if first <= j else j

    turns = [moved(entry, place(0)) for entry in layers[: first + count]]
    for turn in range(1, times):
        reads_first = draw(st.booleans())
        for i in range(first, first + count):
            entry = moved(layers[i], place(0 if reads_first else turn))
            entry["layers"] = i + turn * count
            if "own" in entry:
                entry["own"] = copy.deepcopy(turns[i]["own"])  # weights are shared, so the slots are alike
                if draw(st.booleans()):
                    del entry["own"]
                    entry |= {"keys": {"share": i}, "values": {"share": i}}
            for own, same in zip(own_parts(entry), own_parts(turns[i]), strict=True):
                own |= {key: same[key] for key in ("input", "mix") if key in same}
            turns.append(entry)
    for entry in layers[first + count :]:
        turns.append(moved(entry, place(draw(st.integers(0, times - 1)))))
    loop = {"layers": list(range(first, first + count)), "times": times}
    return section | {"n_layers": len(turns), "kv": section["kv"] | {"layers": turns, "loop": loop}}


HEADS: list[tuple[int, dict[int, int]]] = [
    (1, {1: 1, 2: 1, 4: 1}),
    (3, {1: 1, 2: 1, 4: 3}),
    (5, {1: 1, 2: 5, 4: 5}),
    (6, {1: 1, 2: 2, 4: 6}),
    (9, {1: 1, 2: 3, 4: 9}),
]
"""Numbers of query heads, with the KV heads that 1, 2 and 4 become."""
SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"type": "linear", "factor": 3.0},
    {"type": "llama3", "factor": 4.0, "original_max_seq_len": 16},
    {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    {"type": "yarn", "factor": 2.0, "original_max_seq_len": 8, "attention_factor": 0.7},
]


def with_heads(found: Any, heads: dict[int, int]) -> Any:
    """A copy of a section, or a part of it, with other numbers of KV heads."""
    if isinstance(found, dict):
        changed = {key: with_heads(value, heads) for key, value in found.items()}
        return changed | ({"n_kv_heads": heads[n]} if (n := found.get("n_kv_heads")) else {})
    return [with_heads(value, heads) for value in found] if isinstance(found, list) else found


@st.composite
def reshaped(draw: st.DrawFn, sections: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """One of `sections` in another shape: odd numbers of heads, widths that the heads do not divide, scaled RoPE."""
    n_heads, heads = draw(st.sampled_from(HEADS))
    section = with_heads(draw(sections), heads) | {"n_heads": n_heads}
    section["d_model"], section["d_ff"] = draw(st.sampled_from([(16, 12), (15, 7), (9, 12)]))
    section["head_dim"] = draw(st.sampled_from([4, 10]))
    rope = {"theta": draw(st.sampled_from([10000.0, 50.0])), "scaling": draw(st.sampled_from(SCALINGS))}
    return section | {"rope": {**section.get("rope", {}), **rope}}


def everything() -> st.SearchStrategy[dict[str, Any]]:
    """Sections with plans of every kind, a third of them with a loop, half of them in another shape."""
    plans = st.one_of(varied(), varied(), looped())
    return st.one_of(plans, reshaped(plans))
