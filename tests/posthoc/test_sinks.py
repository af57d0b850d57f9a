"""Sinks: the first tokens of every sequence stay exact, are left out of fits, and are counted."""

from __future__ import annotations

import functools

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.cache.slot import Slot
from cllm.config import Rope
from cllm.errors import UserError
from cllm.kernels.decode import Stored, Visible
from cllm.kernels.selection import Table
from cllm.model.rope import rope_table
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.code import Rotation
from cllm.posthoc.compress import encode
from cllm.posthoc.deferred import Deferred
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import methods, parse
from cllm.posthoc.sinks import Sinks
from cllm.posthoc.slots import CompressibleSlots

PREFIX, LENGTH, SINKS = 20, 28, 4
FITTED = [
    "svd:rank_k=3,rank_v=3",
    "xkv:group=2,rank_k=3,rank_v=3,svd=power",
    "kivi:bits=2,group=8,residual=0",
    "xquant:bits=2,group=8,residual=0",
    "svd:rank_k=3,rank_v=3+kivi:bits=4,group=8,residual=0",
]
"""Specs whose codes depend on all tokens."""
LOSSY = [*FITTED, "minicache:start=0", "minicache_xkv"]


def with_sinks(spec, count):
    name, _, options = spec.partition(":")
    return f"{name}:sinks={count}{',' if options else ''}{options}"


# ---- which tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [None, [0, 0], [0, 3], [5, 7], [1, 10]])
@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_sinks_are_the_first_tokens_that_are_no_padding(starts, count):
    length, later = 10, 3
    x = torch.arange(2 * (length + later)).view(2, -1, 1)
    sinks = Sinks(count, length, None if starts is None else torch.tensor(starts))
    first, others = sinks.of(x[:, :length]), sinks.without(x[:, :length])
    for row in range(2):
        start = min(0 if starts is None else starts[row], length - count)  # a short sequence: all, and padding before
        tokens = x[row, :length].flatten().tolist()
        assert first[row].flatten().tolist() == tokens[start : start + count]
        assert others[row].flatten().tolist() == tokens[:start] + tokens[start + count :]
    exact = torch.cat((first, x[:, length:]), dim=1)
    assert torch.equal(sinks.join(Slot(others, others), Slot(exact, exact)).k, x)


# ---- a planted sink -------------------------------------------------------------------------------------------------


def planted(starts, size=20, layers=4, n=48, heads=2, dim=8):
    """Similar slots whose tokens (keys before RoPE) lie in 3 dimensions, except the first of every sequence: it is
    `size` times as long and has a different direction in every slot."""
    draw, slots = torch.Generator().manual_seed(0), {}

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    table = functools.partial(rope_table, Rope())
    rotation = Rotation(functools.partial(table, dim), 0, n, torch.tensor(starts))
    common = [normal(2, n, 3) @ normal(3, heads * dim) for _ in range(2)]
    for layer in range(layers):
        k, v = (x + 0.1 * normal(*x.shape) for x in common)
        for row, start in enumerate(starts):
            k[row, start], v[row, start] = size * normal(2, heads * dim)
        slots[layer] = Slot(rotation.redo(k.unflatten(-1, (heads, dim))), v.unflatten(-1, (heads, dim)))
    total = sum(slot.k.nbytes + slot.v.nbytes for slot in slots.values())
    return CompressibleSlots(slots, frozenset(), torch.tensor(starts) if any(starts) else None, total, 0, table)


def attention(q, slot, text):
    """Attention of queries (B, n, G, D) over all tokens of `slot` at which `text` is True."""
    scores = torch.einsum("bngd,btgd->bgnt", q, slot.k).masked_fill(~text[:, None, None], -torch.inf)
    return torch.einsum("bgnt,btgd->bngd", scores.softmax(-1), slot.v)


def change(pairs):
    """||found - wanted|| / ||wanted|| over pairs (found, wanted)."""
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


DROPPED = [(spec, 2) for spec in LOSSY if "bits=2" not in spec]
"""A sink of normal length in a separate direction, which low rank and merging lose, and quantisers do not."""


@pytest.mark.parametrize("starts", [[0, 0], [0, 9]])
@pytest.mark.parametrize(("spec", "size"), [*((spec, 20) for spec in LOSSY), *DROPPED])
def test_a_planted_sink_is_kept_and_harms_no_other_token(spec, starts, size):
    filled, place = planted(starts, size), torch.arange(48) - torch.tensor(starts)[:, None]  # B, n; 0 for the sink
    some = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    others, outputs = [], []
    for count in (0, SINKS):
        tensors, attended = [], []
        for slot, (prefix, sinks) in encode(parse(with_sinks(spec, count)), filled)[0].items():
            read, exact = prefix.join(sinks), filled.slots[slot]
            kept = (place >= 0) & (place < count)
            assert torch.equal(read.k[kept], exact.k[kept])
            assert torch.equal(read.v[kept], exact.v[kept])
            tensors += [(a[place > 0], b[place > 0]) for a, b in zip(read[:2], exact[:2], strict=True)]
            # as in trained models, the sink has a score that few other tokens reach
            sink = exact.k[place == 0]  # B, G, D
            q = 0.2 * some + 4 * sink[:, None] / sink.square().sum(-1)[:, None, :, None]
            attended.append((attention(q, read, place >= 0), attention(q, exact, place >= 0)))
        others.append(change(tensors))
        outputs.append(change(attended))
    assert outputs[1] < 0.2 * outputs[0]
    if spec in FITTED and size == 20:
        assert others[1] < 0.75 * others[0]


# ---- in caches ------------------------------------------------------------------------------------------------------


def compressed(model, ids, spec, *, starts=None, prefix=PREFIX, **options):
    """A compressed and an uncompressed cache of `ids[:, :prefix]`."""
    cache = KVCache(model.config)
    model(ids[:, :prefix], cache=cache, starts=starts)
    return compress_cache(cache, parse(spec), **options), cache


def read_on(model, cache, ids, parts):
    return torch.cat([model(part, cache=cache) for part in ids.split(parts, dim=1)], dim=1)


@pytest.mark.parametrize("starts", [None, [0, 5]])
@pytest.mark.parametrize("spec", LOSSY)
def test_sinks_are_exact_to_the_bit_and_the_others_are_not(spec, starts, decoder, tokens):
    model, ids = decoder().bfloat16(), tokens(2, PREFIX)
    for room in (None, 8):
        starts = None if starts is None else torch.as_tensor(starts)
        small, cache = compressed(model, ids, spec, starts=starts, room=room)
        for slot, store in small.stores.items():
            found, exact = store.last(PREFIX, PREFIX), cache.stores[slot].slot
            for row in range(2):
                start = 0 if starts is None else int(starts[row])
                for a, b in ((found.k[row], exact.k[row]), (found.v[row], exact.v[row])):
                    assert torch.equal(a[start : start + SINKS], b[start : start + SINKS])
                    assert spec.startswith("minicache") or not torch.equal(a[start + SINKS :], b[start + SINKS :])


@pytest.mark.parametrize("parts", [[8], [1, 1, 3, 1, 2]])
@pytest.mark.parametrize("room", [None, 8])
@pytest.mark.parametrize("spec", ["xkv:group=2,rank_k=3,rank_v=4", "minicache:gamma=0.0"])
def test_a_padded_sequence_is_what_it_is_alone(spec, room, parts, decoder, tokens):
    model, ids, starts = decoder(), tokens(2, LENGTH), [0, 7]
    padded, _ = compressed(model, ids, spec, starts=torch.tensor(starts), room=room)
    found = read_on(model, padded, ids[:, PREFIX:], parts)
    for row, start in enumerate(starts):
        alone, _ = compressed(model, ids[row : row + 1, start:], spec, prefix=PREFIX - start, room=room)
        wanted = read_on(model, alone, ids[row : row + 1, PREFIX:], parts)
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [*FITTED, "minicache", "xkv:energy=0.5,select=4,chunk=4,outliers=0,local=0"])
def test_a_sequence_of_fewer_tokens_than_sinks_is_exact(spec, decoder, tokens):
    """In a batch with a longer sequence, and alone."""
    model, ids, parts = decoder(), tokens(2, LENGTH), [1, 4, 1, 2]
    wanted = model(ids[1:, PREFIX - 3 :])[:, 3:]
    batch, _ = compressed(model, ids, spec, starts=torch.tensor([0, PREFIX - 3]))
    torch.testing.assert_close(read_on(model, batch, ids[:, PREFIX:], parts)[1:], wanted, atol=1e-4, rtol=1e-4)
    for room in (None, 8):
        alone, cache = compressed(model, ids[1:, PREFIX - 3 :], spec, prefix=3, room=room)
        assert room is not None or alone.nbytes() == cache.nbytes()
        torch.testing.assert_close(read_on(model, alone, ids[1:, PREFIX:], parts), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("name", [name for name, method in methods().items() if "ratio" in method.model_fields])
def test_no_method_takes_a_ratio_that_sinks_leave_no_room_for(name, length, decoder, tokens):
    model, ids, method = decoder(), tokens(1, length), parse(f"{name}:ratio=2")
    engine, cache = engine_of(model), KVCache(model.config)
    method.prepare(engine, tokens(1, 40))
    with method.watch(engine):
        model.hidden(ids, cache=cache)
    with pytest.raises(UserError, match=f"^{name}: ratio=2: ") as error:
        compress_cache(cache, method)
    assert name != "kvtc" or "ratio=1" not in str(error.value)  # which kvtc does not have


def test_a_ratio_that_sinks_leave_no_room_for_is_refused(decoder, tokens):
    model, ids = decoder(), tokens(1, 8)
    with pytest.raises(
        UserError, match="xkv: ratio=2: at 3 tokens sinks=4 leave nothing to compress; allowed: ratio=1"
    ):
        compressed(model, ids, "xkv:ratio=2", prefix=3)
    assert compressed(model, ids, "xkv:ratio=1", prefix=3)[0].nbytes() == 8 * 2 * 32 * 3 * 4
    with pytest.raises(UserError, match=r"ratio=2: at 8 tokens 50% of the cache stay .*, sinks\) .* below 2\.00"):
        compressed(model, ids, "xkv:ratio=2", prefix=8)


@pytest.mark.parametrize("starts", [None, [0, 5]])
def test_windowed_readers_of_a_compressed_slot_see_the_right_tokens(starts, random_model, tokens, tiny_config):
    """Sinks are stored next to later tokens: a window, which counts columns, must not include them there."""
    layers = [{"layers": 0, "own": {}}, {"layers": "1-3", "keys": {"share": 0}, "values": {"share": 0}, "window": 6}]
    model = random_model(tiny_config(n_layers=4, kv={"layers": layers})).eval().requires_grad_(False)
    ids, starts = tokens(2, LENGTH), None if starts is None else torch.tensor(starts)
    for parts in ([8], [1] * 8, [3, 1, 4]):
        small, cache = compressed(model, ids, "xkv:energy=1.0", starts=starts)
        wanted = read_on(model, cache, ids[:, PREFIX:], parts)
        torch.testing.assert_close(read_on(model, small, ids[:, PREFIX:], parts), wanted, atol=1e-4, rtol=1e-4)


def test_sinks_stay_exact_when_all_is_compressed_again(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    small, cache = compressed(model, ids, "svd:rank_k=2,rank_v=2,recompress=4", starts=torch.tensor([0, 5]))
    read_on(model, small, ids[:, PREFIX:], [1] * 8)
    assert small.exact_tokens == 0
    for slot, store in small.stores.items():
        found, exact = store.last(LENGTH, LENGTH), cache.stores[slot].slot
        for row, start in enumerate([0, 5]):
            assert torch.equal(found.k[row, start : start + SINKS], exact.k[row, start : start + SINKS])
            assert torch.equal(found.v[row, start : start + SINKS], exact.v[row, start : start + SINKS])


@pytest.mark.parametrize("starts", [None, [0, 9]])
def test_sinks_are_read_in_a_step_that_chooses_a_chunk(starts):
    """If nearly all attention is on the sink, selecting one more chunk changes nothing."""
    filled, n = planted(starts or [0, 0]), 48
    method = parse("xkv:group=2,rank_k=4,rank_v=4,select=4,chunk=4,outliers=0,local=0")
    prefixes, _ = encode(method, filled)
    for slot, (prefix, sinks) in prefixes.items():
        first = torch.stack([filled.slots[slot].k[row, start] for row, start in enumerate(starts or [0, 0])])
        new = Slot(*(torch.zeros(2, 1, 2, 8) for _ in range(2)))
        cos, sin = rope_table(Rope(), 8, torch.arange(SINKS, n))
        table = Table(cos[:, 0, 0], sin[:, 0, 1])
        deferred = [Deferred(prefix, part, sinks.join(new), table) for part in ("k", "v")]
        k, v = (Stored(part) for part in deferred)
        visible = Visible(torch.tensor([n]), None if starts is None else torch.tensor(starts), None, False)
        (found,) = deferred[0].attend([first], [k], [v], visible, scale=1.0)
        wanted = torch.stack([filled.slots[slot].v[row, start] for row, start in enumerate(starts or [0, 0])])
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


# ---- bytes ----------------------------------------------------------------------------------------------------------

SIZES = [
    "none",
    "xkv:group=2,rank_k=3,rank_v=4",
    "svd:rank_k=3,rank_v=4+kivi:bits=4,group=8,residual=0",
    "minicache:gamma=0.0",
    "kivi:bits=2,group=8,residual=4",
    "xquant:bits=2,group=8,residual=4",
    "int8",
    "turboquant:bits=3,sketch=true",
    "kvquant:bits=4",
    "commonkv:group=2,recent=4,weights=equal",
]


@pytest.mark.parametrize("kind", ["cllm", "transformers"])
@pytest.mark.parametrize("spec", SIZES)
def test_bytes_are_those_of_the_other_tokens_and_of_exact_sinks(spec, kind, decoder, llama, tokens):
    """S tokens with s sinks take the bytes of S - s tokens without sinks, and of s uncompressed tokens."""
    model, ids = decoder() if kind == "cllm" else llama(), tokens(2, 32)
    engine, sizes = engine_of(model), {}
    for count, length in ((3, 32), (0, 29)):
        method, cache = parse(with_sinks(spec, count) if spec != "none" else spec), engine.new_cache()
        with method.watch(engine):
            engine.hidden(ids[:, :length], cache)
        small = engine.compress(cache, method)
        sizes[count], uncompressed = small.nbytes(), engine.nbytes(cache)
        stored = [
            t for slot in (small.stores.values() if kind == "cllm" else small.layers) for t in stored_tensors(slot)
        ]
        real = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored if t.numel()}
        assert small.nbytes() == sum(real.values())
    assert sizes[3] == sizes[0] + 3 * uncompressed // 29


def stored_tensors(slot):
    return slot.tensors().values() if hasattr(slot, "tensors") else slot.stored()
