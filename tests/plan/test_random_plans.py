"""Random plans: those accepted compute, cache, count, export and train alike; others are refused in one line.

The suite runs 50 examples, always the same. For more, and others every time:

    CLLM_PLANS=2000 python -m pytest tests/plan/test_random_plans.py

Kinds that plug-ins register are drawn too, with their settings at the defaults.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, example, given, settings
from hypothesis import strategies as st

from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.hub.model import CLLMForCausalLM
from cllm.model.decoder import Decoder
from cllm.plan.joins import Whole
from cllm.plan.plan import KVPlan
from cllm.plan.registry import READS, SOURCES
from cllm.section import Section

LENGTH, BATCH, VOCABULARY = 7, 2, 32
LATENTS = [
    {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3},
    {"kv_lora_rank": 5, "qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 4, "q_lora_rank": 7},
    {"kv_lora_rank": 9, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 7, "blocks": 3},
]
GIVEN = os.environ.get("CLLM_PLANS")
PROPERTY = settings(
    max_examples=int(GIVEN or 50),
    derandomize=GIVEN is None,
    database=None,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class File(Section):
    """A config file with nothing but a model."""

    model: ModelConfig


def model(layers: list[dict[str, Any]], iterations: dict[str, int] | None = None) -> dict[str, Any]:
    """A `model` section with entries of `model.kv.layers`, as YAML would give it."""
    shape = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": len(layers), "n_heads": 4, "head_dim": 4, "d_ff": 12}
    return {**shape, "max_seq_len": 16, "kv": {"layers": layers, "iterations": iterations}}


def cycle(backward: int, **layer: Any) -> dict[str, Any]:
    """Layers 1 and 2 read values that only layers below their owner read."""
    share = {"keys": {"share": 0}, "values": {"share": 3}, **layer}
    layers = [{"own": {}}, share, share, {"own": {}, "values": {"share": 0}}]
    return model([{"layers": i, **entry} for i, entry in enumerate(layers)], {"forward": 1, "backward": backward})


# ---- plans that may be wrong ----------------------------------------------------------------------------------------


@st.composite
def reads(draw: st.DrawFn, layer: int, half: str, owners: list[int], cyclic: bool) -> dict[str, Any]:
    """`share` or `fuse` of owners, mostly of such as the layer may read."""
    near = [j for j in owners if cyclic or j <= layer] or owners
    pool = st.sampled_from(near if draw(st.integers(0, 19)) else owners)
    if draw(st.booleans()):
        return {"share": draw(pool)}
    known = {"share", *(key for key, kind in READS.items() if issubclass(kind, Whole) or key == "fuse")}
    if others := sorted(READS.keys() - known):  # of plug-ins, with their options at the defaults
        key = draw(st.sampled_from(["fuse", *others]))
        if key != "fuse":
            return {key: draw(st.lists(pool, min_size=1, max_size=3, unique=True))}
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
        if kind != "retention" and (window := draw(st.sampled_from(windows))) is not None:
            entry["window"] = window
        layers.append(entry)
    iterations = None
    if cyclic or draw(st.integers(0, 9)) == 0:
        iterations = {"forward": draw(st.integers(0, 3)), "backward": draw(st.sampled_from([1, 1, 2, 3]))}
    options = {key: draw(st.booleans()) for key in ("qk_norm", "q_bias", "kv_bias", "tie_embeddings")}
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


# ---- what holds for each --------------------------------------------------------------------------------------------


def gradients(model: Decoder) -> dict[str, torch.Tensor | None]:
    """Of every parameter, for the next-token loss on tokens that include the whole vocabulary, in fp64."""
    ids = torch.randperm(BATCH * 16, generator=torch.Generator().manual_seed(1)).view(BATCH, 16)
    model.double().zero_grad()
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def without_gradient(found: dict[str, torch.Tensor | None]) -> list[str]:
    """The parameters whose gradient is missing, not finite, or in one row (an output channel, a fused source) zero but
    for rounding. Not every row of the embedding is an input."""

    def least(name: str, gradient: torch.Tensor | None) -> float:
        if gradient is None or not gradient.isfinite().all():
            return 0.0
        rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        most = rows.abs().amax(dim=1)
        return float(most.max() if name == "embed.weight" else most.min())

    return [name for name, gradient in found.items() if least(name, gradient) < 1e-12]


def exact(config: ModelConfig) -> ModelConfig:
    """The same plan with passes enough to be exact over `LENGTH` tokens, if it is cyclic."""
    if not config.plan().cyclic_spans():
        return config
    enough = config.kv.iterations.model_copy(update={"forward": LENGTH})
    return config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": enough})})


def check_cache(
    model: Decoder, ids: torch.Tensor, full: torch.Tensor, parts: list[int], chunk: int, max_len: int | None
):
    """Chunks and single tokens through a cache give the logits of a full forward, and so does a prompt whose upper
    layers compute the last token alone; the cache has the bytes that were predicted."""
    config = model.config
    cache = KVCache(config, max_len=max_len)
    logits = torch.cat([model(part, cache=cache) for part in ids.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
    assert cache.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4)
    for size in (None, chunk):
        cache = KVCache(config, max_len=max_len)
        last = model.head(model.prefill(ids[:, :5], cache, chunk=size))
        torch.testing.assert_close(last, full[:, 4:5], atol=1e-4, rtol=1e-4)
        rest = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in (5, 6)], dim=1)
        torch.testing.assert_close(rest, full[:, 5:], atol=1e-4, rtol=1e-4)
        assert cache.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4)
    fp8 = KVCache(config, max_len=max_len, storage="fp8")
    model(ids, cache=fp8)
    assert fp8.nbytes() == cache_bytes(config, context=LENGTH, batch=BATCH, bytes_per_element=4, storage="fp8")


def check_padding(model: Decoder, ids: torch.Tensor, full: torch.Tensor) -> None:
    """A row after padding, in one pass and from a cache, and a document in a packed row have the logits of each alone.

    The second row starts at its third token. With documents, the first four tokens and the others are apart.
    """
    starts, alone = torch.tensor([0, 2]), model(ids[1:, 2:])
    cache = KVCache(model.config)
    prompt = model(ids[:, :5], cache=cache, starts=starts)
    steps = [model(ids[:, t : t + 1], cache=cache) for t in range(5, LENGTH)]
    for found in (model(ids, starts=starts), torch.cat([prompt, *steps], dim=1)):
        torch.testing.assert_close(found[0], full[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1, 2:], alone[0], atol=1e-4, rtol=1e-4)
    documents, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * BATCH), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    packed = model(ids, positions, documents)
    torch.testing.assert_close(packed[:, :4], full[:, :4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]), atol=1e-4, rtol=1e-4)
    last = model(ids, positions, documents, last_only=True)
    torch.testing.assert_close(last, packed[:, -1:], atol=1e-4, rtol=1e-4)


def check_refusal(section: dict[str, Any], error: UserError, random_model) -> None:
    """One line; and where halves are refused, a model that was built all the same has a parameter without gradient."""
    assert "\n" not in str(error)
    assert str(error).startswith("model: "), error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVPlan, "_check_halves", lambda self: None)
        try:
            config = validate(File, {"model": section}).model
        except UserError:
            event("refused for another reason")
            return
        event("refused because a parameter would have no gradient")
        assert without_gradient(gradients(random_model(config))), (
            f"refused, but every parameter has a gradient: {error}"
        )


EVEN = [1] * LENGTH


@PROPERTY
@example(section=cycle(1), sizes=EVEN, chunk=2)
@example(section=cycle(2), sizes=EVEN, chunk=2)
@example(section=cycle(2, window=2), sizes=EVEN, chunk=2)
@example(section=cycle(2, window=3), sizes=EVEN, chunk=2)
@example(section=model([{"layers": 0, "own": {}, "window": 1}, {"layers": 1, "own": {}}]), sizes=EVEN, chunk=2)
@given(section=models(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_accepted_plans_compute_cache_export_and_train_alike(section, sizes, chunk, random_model, tmp_path_factory):
    try:
        config = validate(File, {"model": section}).model
    except UserError as error:
        check_refusal(section, error, random_model)
        return
    plan = config.plan()
    event("accepted" + (", cyclic" if plan.cyclic_spans() else ""))
    for kind in sorted({type(read).__name__ for i in range(len(plan)) for read in (plan.keys(i), plan.values(i))}):
        event(f"accepted, reads by {kind}")
    for kind in sorted({type(plan.owned(j)).__name__ for j in plan.owners}):
        event(f"accepted, owns {kind}")
    assert without_gradient(gradients(random_model(config))) == []

    model = random_model(exact(config)).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    full = model(ids)
    torch.testing.assert_close(model(ids, last_only=True), full[:, -1:], atol=1e-4, rtol=1e-4)
    parts = [size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= LENGTH]
    parts += [1] * (LENGTH - sum(parts))
    check_cache(model, ids, full, parts, chunk, None)
    unequal = [i for i in range(len(plan)) for slots, _ in plan.attended(i) if len({*map(plan.kept, slots)}) > 1]
    if unequal:
        with pytest.raises(UserError, match="static"):
            KVCache(model.config, max_len=LENGTH)
    else:
        check_cache(model, ids, full, parts, chunk, LENGTH)

    check_padding(model, ids, full)
    folder = tmp_path_factory.mktemp("exported")
    as_pretrained(model).save_pretrained(folder)
    loaded = CLLMForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, full)


FORMS: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"only": "values"}, "keys": {"share": 0}, "window": 4},
    {"own": {"tie": "kv"}},
    {"own": {"mix": [2, 0], "input": 1}},
    {"own": {"only": "keys", "input": 1}, "values": {"fuse": [2, 3], "granularity": "matrix"}},
    {"own": {"tie": "kv", "input": 3}, "keys": {"fuse": [2, 4, 5], "granularity": "complex"}},
]
"""Owners of every form; all tokens of a prompt reach layer 3 and none above."""
CYCLIC_FORMS: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 3}, "values": {"share": 2}},
    {"own": {"tie": "kv", "input": 0}},
    {"own": {"mix": [2], "input": 1}, "values": {"fuse": [2, 3]}},
]


def listed(layers: list[dict[str, Any]], iterations: dict[str, int] | None = None) -> dict[str, Any]:
    """A `model` section with one entry for each layer."""
    return model([{"layers": i, **layer} for i, layer in enumerate(layers)], iterations)


LOOP: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"kv_norm": True}},
    {"keys": {"fuse": [0, 1]}, "values": {"share": 1}, "window": 4},
    {"own": {"kv_norm": True}, "keys": {"share": 1}, "values": {"fuse": [1, 3], "granularity": "matrix"}},
    {"keys": {"fuse": [1, 3]}, "values": {"share": 3}},
    {"own": {}},
]
"""Two turns of two layers, with layers around them."""
REUSE: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 0}, "values": {"share": 0}},
    {"read": {"gate": [0, {"own": {"window": 3}}], "gates": "complementary"}},
]
"""Three turns of a layer: the second reads the keys and values of the first, the third adds a window of its own."""


def looped(layers: list[dict[str, Any]], loop: dict[str, Any]) -> dict[str, Any]:
    """A section of `listed` with a loop."""
    section = listed(layers)
    return section | {"kv": section["kv"] | {"loop": loop}}


@settings(PROPERTY, max_examples=int(GIVEN or 15))
@example(section=listed(FORMS), sizes=EVEN, chunk=2)
@example(section=looped(LOOP, {"layers": "1-2", "times": 2}), sizes=EVEN, chunk=2)
@example(section=looped(REUSE, {"layers": [0], "times": 3}), sizes=EVEN, chunk=2)
@example(section=listed(CYCLIC_FORMS, {"forward": 2, "backward": 2}), sizes=EVEN, chunk=2)
@given(section=formed(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_owners_of_every_form_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)


WINDOWED, SECOND = {"own": {"n_kv_heads": 2, "window": 3}}, {"own": {"tie": "kv", "window": 4}}
JOINS: list[dict[str, Any]] = [
    {"own": {}},
    {"read": {"join": [WINDOWED], "sink": True}},
    {"read": {"join": [{"own": {"input": 0}}, SECOND, {"share": 1, "window": 2}], "sink": True}},
    {"read": {"gate": [0, WINDOWED]}},
    {"read": {"gate": [2, {"share": 0, "window": 2}], "gates": "complementary"}},
    {"read": {"join": [0, {"share": 3, "window": 3}]}},
]
"""Reads of several slots, of every form."""
IN_A_CYCLE: list[dict[str, Any]] = [
    {"own": {}},
    {"keys": {"share": 3}, "values": {"share": 0}},
    {"read": {"join": [0, SECOND, {"own": {"window": 3}}], "sink": True}},
    {"own": {}, "values": {"fuse": [2, 3]}, "window": 3},
]


@settings(PROPERTY, max_examples=int(GIVEN or 6))
@example(section=listed(JOINS), sizes=EVEN, chunk=2)
@example(section=listed(IN_A_CYCLE, {"forward": 2, "backward": 2}), sizes=EVEN, chunk=2)
@given(section=joined(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_reads_of_several_slots_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)


SIZES: list[dict[str, Any]] = [
    {"own": {}, "window": 4},
    {"own": {"head_dim": 6, "n_kv_heads": 2, "tie": "kv"}},
    {"own": {"head_dim": 6, "n_kv_heads": 2, "mix": [1]}, "keys": {"share": 0}, "values": {"share": 0}, "window": 3},
    {"keys": {"fuse": [1, 2], "granularity": "complex"}, "values": {"fuse": [2], "granularity": "matrix"}, "window": 3},
    {"read": {"gate": [{"share": 1, "window": 3}, {"own": {"head_dim": 6, "window": 2}}]}},
    {"own": {"head_dim": 2, "input": 3}},
]
"""Heads of 4, 6 and 2 channels; layer 2 owns heads of 6 and reads heads of 4."""


@settings(PROPERTY, max_examples=int(GIVEN or 10))
@example(section=listed(SIZES), sizes=EVEN, chunk=2)
@given(section=sized(), sizes=st.lists(st.integers(1, 3), min_size=LENGTH, max_size=LENGTH), chunk=st.integers(1, 4))
def test_heads_of_several_sizes_compute_cache_export_and_train_alike(
    section, sizes, chunk, random_model, tmp_path_factory
):
    check = test_accepted_plans_compute_cache_export_and_train_alike.hypothesis.inner_test  # type: ignore[attr-defined]
    check(section, sizes, chunk, random_model, tmp_path_factory)
