"""What a cache must not change: the logits; and what it must hold: the slots of owners, to the byte."""

import functools
import os

import pytest
import torch

from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore, from_fp8, to_fp8
from cllm.config import Config
from cllm.errors import UserError
from cllm.plan.presets import preset_names
from cllm.train.dryrun import dry_run

LENGTH = 12
PADDING = [0, 3, 5]
DESIGNS = [
    *preset_names(),
    "yoco with retention",
    "fusedkv, weights per head",
    "fusedkv, three sources",
    "cla, factor 3",
]
KINDS = {"growing": None, "static": LENGTH + 2}
PARTS = [[7] + [1] * 5, [4, 4, 4], [1] * LENGTH, [2, 2, 1, 4, 3], [LENGTH]]
"""Numbers of tokens of the passes."""
CHUNKS = [None, 4, 11]


def half(values, name, kind):
    """Every second value, such that each one meets every design, and both kinds of cache; all with `CLLM_PLANS`."""
    if "CLLM_PLANS" in os.environ:
        return values
    return values[(DESIGNS.index(name) + list(KINDS).index(kind)) % 2 :: 2]


@pytest.fixture(scope="session")
def exact_config(preset_config):
    """A preset with passes enough that a cyclic plan is exact over `LENGTH` tokens."""

    def build(name, **model):
        config = preset_config(name, **model)
        if config.plan().iterations is not None:
            iterations = config.kv.iterations.model_copy(update={"forward": LENGTH - 1, "backward": 1})
            config = config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": iterations})})
        return config

    return build


@pytest.fixture(scope="session")
def new_design(exact_config, random_model):
    return lambda name: random_model(exact_config(name)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def design(new_design):
    """`design("mla")`: a model, for tests that do not change it."""
    return functools.cache(new_design)


@pytest.fixture(scope="session")
def padded(design):
    """`padded("mla")`: ids, and the logits of each sequence alone with `PADDING`."""
    return functools.cache(lambda name: (ids := tokens(3), alone(design(name), ids, PADDING)))


def tokens(batch, length=LENGTH, seed=0):
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(seed))


def alone(model, ids, starts):
    """Logits of every sequence computed without padding and cache, at their columns; padding's are 0."""
    out = torch.zeros(*ids.shape, model.config.vocab_size)
    for row, start in enumerate(starts):
        out[row, start:] = model(ids[row : row + 1, start:])[0]
    return out


def assert_same(found, expected, starts, begin=0):
    """Equal at every column from `begin` on that is no padding."""
    for row, start in enumerate(starts):
        first = max(start, begin)
        wanted = expected[row, first : begin + found.shape[1]]
        torch.testing.assert_close(found[row, first - begin :], wanted, atol=1e-5, rtol=1e-5)


def run(model, cache, ids, parts, starts=None):
    """Logits of `ids` fed in `parts`."""
    return torch.cat([model(part, cache=cache, starts=starts) for part in ids.split(parts, dim=1)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DESIGNS)
def test_prefill_and_decoding_give_the_logits_of_a_full_forward(name, kind, design, padded):
    model, (ids, expected) = design(name), padded(name)
    starts = torch.tensor(PADDING)
    no_padding = model(ids)
    for parts in half(PARTS[:2], name, kind):
        cache = KVCache(model.config, max_len=KINDS[kind])
        assert_same(run(model, cache, ids, parts), no_padding, [0, 0, 0])
        assert cache.get_seq_length() == LENGTH
    for parts in half(PARTS, name, kind):
        cache = KVCache(model.config, max_len=KINDS[kind])
        assert_same(run(model, cache, ids, parts, starts), expected, PADDING)
        assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("name", DESIGNS)
def test_padding_without_a_cache(name, design, padded):
    ids, expected = padded(name)
    assert_same(design(name)(ids, starts=torch.tensor(PADDING)), expected, PADDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DESIGNS)
def test_early_exit_is_exact_and_leaves_the_same_cache(name, kind, design, padded):
    model, (ids, expected) = design(name), padded(name)
    starts = torch.tensor(PADDING)
    for chunk in half(CHUNKS, name, kind):
        cache = KVCache(model.config, max_len=KINDS[kind])
        last = model.head(model.prefill(ids[:, :10], cache, starts=starts, chunk=chunk))
        assert last.shape == (3, 1, 32)
        assert_same(last, expected, PADDING, begin=9)
        assert_same(run(model, cache, ids[:, 10:], [1, 1]), expected, PADDING, begin=10)
    last = model(ids, starts=starts, last_only=True)
    assert_same(last, expected, PADDING, begin=LENGTH - 1)


def test_early_exit_skips_the_layers_that_own_nothing(new_design):
    model, lengths = new_design("fusedkv"), {}
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda _, args, __, i=i: lengths.update({i: args[0].shape[1]}))
    model.prefill(tokens(2), KVCache(model.config))
    assert lengths == {0: LENGTH, 1: LENGTH, 2: LENGTH, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}


def test_early_exit_stays_inside_the_last_document(design):
    model, ids = design("yoco"), tokens(2)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 4 + [1] * 4 + [2] * 4])
    whole = model(ids, document_ids=documents)
    torch.testing.assert_close(model(ids, document_ids=documents, last_only=True), whole[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DESIGNS)
def test_reordered_sequences_go_on_as_if_they_had_always_been_there(name, kind, design):
    model, ids = design(name), tokens(3)
    starts, order = torch.tensor(PADDING), torch.tensor([2, 0, 0])
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, ids[:, :8], [6, 1, 1], starts)
    cache.reorder_cache(order)
    followed = torch.cat((ids[order, :8], tokens(3, 4, seed=1)), dim=1)
    padding = [PADDING[i] for i in order]
    expected = alone(model, followed, padding)
    assert_same(run(model, cache, followed[:, 8:], [1, 2, 1]), expected, padding, begin=8)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_grow_and_shrink(kind, design):
    model, ids = design("fusedkv"), tokens(2)
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, ids[:, :6], [6])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    rows = ids[[1, 0, 0]]
    assert_same(run(model, cache, rows[:, 6:], [1] * 6), model(rows), [0] * 3, begin=6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DESIGNS)
def test_cropped_tokens_are_forgotten(name, kind, design):
    model, ids = design(name), tokens(2)
    forgetful = any(map(model.plan.kept, model.plan.slots)) or "retention" in name
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, ids[:, :8], [8])
    if not forgetful:
        cache.crop(6)
        cache.crop(-1)
    elif "retention" in name:
        with pytest.raises(UserError, match="cannot go back from 8 to 7 tokens: a recurrent state forgets nothing"):
            cache.crop(7)
        return
    else:
        with pytest.raises(UserError, match=r"cannot go back from 8 to 6 tokens: a slot with a window of [23]"):
            cache.crop(6)
        cache.crop(7)
    length = 7 if forgetful else 5
    assert cache.get_seq_length() == length
    followed = torch.cat((ids[:, :length], tokens(2, LENGTH - length, seed=1)), dim=1)
    parts = [1, 2, *[1] * (LENGTH - length - 3)]
    assert_same(run(model, cache, followed[:, length:], parts), model(followed), [0, 0], begin=length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_that_is_refused_changes_nothing(kind, tiny_config, random_model):
    """Though the slots before the one that refuses could have gone back."""
    layers = [{"layers": "0-3", "own": {}}, {"layers": "4-7", "own": {}, "window": 3}]
    model, ids = random_model(tiny_config(kv={"layers": layers})).requires_grad_(False), tokens(2)
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, ids[:, :8], [8])
    with pytest.raises(UserError, match="cannot go back from 8 to 5 tokens"):
        cache.crop(5)
    assert_same(run(model, cache, ids[:, 8:], [1, 3]), model(ids), [0, 0], begin=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["yoco", "trailing"])
def test_a_window_goes_back_once(name, kind, design):
    """What was cropped had taken the place of an older token, which a second crop would need."""
    model, ids = design(name), tokens(2)
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, ids[:, :8], [7, 1])
    cache.crop(7)
    with pytest.raises(UserError, match="cannot go back from 7 to 6 tokens: a slot with a window of 3"):
        cache.crop(6)
    expected = model(ids)
    for parts in ([1, 1, 3], [2, 1, 2], [5]):  # a pass of several tokens reads the ring in order
        assert_same(run(model, cache, ids[:, 7:], parts), expected, [0, 0], begin=7)
        cache.reset()
        run(model, cache, ids[:, :8], [8])
        cache.crop(7)
    cache.reset()
    run(model, cache, ids[:, :3], [3])
    cache.crop(2)  # the window was not full before
    cache.crop(1)
    assert_same(run(model, cache, ids[:, 1:], [2, *[1] * 9]), expected, [0, 0], begin=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mha", "yoco", "mla", "yoco with retention"])
def test_a_reset_cache_starts_anew(name, kind, design):
    model, ids = design(name), tokens(2)
    cache = KVCache(model.config, max_len=KINDS[kind])
    run(model, cache, tokens(2, seed=5), [LENGTH], torch.tensor([2, 0]))
    cache.reset()
    assert_same(run(model, cache, ids, [5, 1, 6]), model(ids), [0, 0])
    cache.reset()  # and so may another batch
    assert_same(run(model, cache, ids[:1], [5, 1, 6]), model(ids[:1]), [0])


@pytest.mark.parametrize("name", ["fusedkv", "yoco with retention"])
def test_compiled_decoding_gives_the_same_logits(name, new_design):
    model, ids = new_design(name), tokens(2)
    expected = model(ids)
    model.compile_decoding()
    found = run(model, KVCache(model.config, max_len=LENGTH), ids, [8, 1, 1, 1, 1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mha", "fusedkv", "trailing", "mla", "lckv", "yoco with retention"])
def test_what_is_stored_has_no_gradients_and_the_pass_has_its_own(name, kind, exact_config, random_model):
    model, ids = random_model(exact_config(name)), tokens(2)
    found = {}
    for cached in (False, True):
        cache = KVCache(model.config, max_len=KINDS[kind]) if cached else None
        model.zero_grad()
        model(ids, cache=cache).sum().backward()
        found[cached] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for parameter, gradient in found[False].items():
        torch.testing.assert_close(found[True][parameter], gradient, msg=parameter, atol=1e-4, rtol=1e-4)
    assert not any(t.requires_grad for store in cache.stores.values() for t in store.tensors().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fusedkv", "trailing"])
def test_gradients_of_a_pass_go_to_its_own_tokens(name, kind, exact_config, random_model):
    """Whether those before were computed with gradients or without."""
    model, ids = random_model(exact_config(name)), tokens(2)
    found = []
    for before in (torch.no_grad(), torch.enable_grad()):
        cache = KVCache(model.config, max_len=KINDS[kind])
        with before:
            model(ids[:, :5], cache=cache)
            model(ids[:, 5:6], cache=cache)
        model.zero_grad()
        model(ids[:, 6:], cache=cache).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fusedkv", "trailing", "mla", "yoco with retention"])
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(name, kind, exact_config, random_model):
    model, ids = random_model(exact_config(name)).eval(), tokens(3)
    starts, order = torch.tensor(PADDING), torch.tensor([0, 1, 1])
    with torch.no_grad():
        expected = alone(model, ids, PADDING)
    cache = KVCache(model.config, max_len=KINDS[kind])
    with torch.inference_mode():
        run(model, cache, ids[:, :6], [5, 1], starts)
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_select_indices(order)
    with torch.no_grad():
        found = run(model, cache, ids[order, 6:9], [1, 2])
        cache.reorder_cache(torch.tensor([0, 1, 2]))
    found = torch.cat((found, run(model, cache, ids[order, 9:], [1, 2])), dim=1).detach()
    assert_same(found, expected[order], [PADDING[i] for i in order], begin=6)


# ---- bytes ----------------------------------------------------------------------------------------------------------

# Numbers (not bytes) that one sequence of 12 tokens leaves in the cache of 8 layers with heads of 8 channels: counted
# by hand from the tables of tests/reference.py. A head is 8 + 8 numbers a token.
NUMBERS = {
    "mha": 8 * 4 * 16 * 12,
    "gqa": 8 * 2 * 16 * 12,
    "mqa": 8 * 1 * 16 * 12,
    "mla": 4 * (12 + 4) * 12,
    "mlra": 4 * (12 + 4) * 12,
    "xmla": 2 * (12 + 4) * 12,
    "cla": 4 * 2 * 16 * 12,
    "yoco": 4 * 4 * 16 * 3 + 2 * 16 * 12,
    "yoco_u": 4 * 4 * 16 * 3 + 2 * 16 * 12,
    "fusedkv": 4 * 2 * 16 * 12,
    "fusedkv_lite": 4 * 2 * 16 * 12,
    "trailing": 2 * (2 * 16 * 3 + 2 * 16 * 12),
    "afm": 5 * 2 * 16 * 12,
    "lckv": 3 * 2 * 16 * 12,
    "swiftkv": 8 * 2 * 16 * 12,
    "ced": 8 * 2 * 16 * 12 + 4 * 2 * 16 * 3,
    "hysparse": 2 * 2 * 16 * 12 + 6 * 2 * 16 * 2,
    "yoco_pp": 3 * 2 * 16 * 3 + 2 * 16 * 12,
    "resformer": 8 * 2 * 16 * 12,
    "kv_tie": 8 * 2 * 8 * 12,
    "svformer": (8 + 1) * 2 * 8 * 12,
    "fusedkv_lite_learnable": 4 * 2 * 16 * 12,
    "fusedkv_lite_reversed": 4 * 2 * 16 * 12,
    "pizza_bottom": 4 * 2 * 16 * 12,  # owners 0 1 2 3
    "pizza_middle": 4 * 2 * 16 * 12,  # 0 1 2 5
    "pizza_top": 4 * 2 * 16 * 12,  # 0 1 2 7
    "sandwich_bottom": 4 * 2 * 16 * 12,  # 0 1 2 7
    "sandwich_middle": 4 * 2 * 16 * 12,  # 0 1 4 7
    "sandwich_top": 4 * 2 * 16 * 12,  # 0 1 6 7
    "lasagna_bottom": 4 * 2 * 16 * 12,  # 0 2 4 6
    "lasagna_middle": 4 * 2 * 16 * 12,  # 0 2 4 6
    "lasagna_top": 4 * 2 * 16 * 12,  # 0 3 5 7
}


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("name", preset_names())
def test_bytes_of_the_cache(name, kind, design):
    model = design(name)
    cache = KVCache(model.config, max_len=None if kind == "growing" else LENGTH)
    run(model, cache, tokens(3), [8, 1, 1, 2])
    assert cache.nbytes() == 3 * 4 * NUMBERS[name]


@pytest.mark.parametrize("storage", ["model", "fp8"])
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("name", DESIGNS)
def test_bytes_are_those_of_the_accounting(name, kind, storage, design):
    model = design(name)
    cache = KVCache(model.config, max_len=None if kind == "growing" else LENGTH, storage=storage)
    run(model, cache, tokens(3), [8, 1, 1, 2])
    predicted = cache_bytes(model.config, context=LENGTH, batch=3, bytes_per_element=4, storage=storage)
    assert cache.nbytes() == predicted


@pytest.mark.parametrize("name", ["mha", "fusedkv", "mla", "yoco with retention"])
def test_the_dry_run_predicts_the_bytes(name, exact_config, random_model):
    model = exact_config(name)
    cache = KVCache(model, max_len=model.max_seq_len)
    with torch.no_grad():
        random_model(model).bfloat16()(tokens(1), cache=cache)
    report = dry_run(Config(model=model, data={"seq_len": 32}))
    assert f"of {model.max_seq_len:,} tokens leaves {cache.nbytes():,} bytes in the cache" in report


def test_half_caches_are_half_of_mha(tiny_config):
    mha = cache_bytes(tiny_config(kv={"preset": "mha"}), context=4096)
    for name in ("fusedkv", "fusedkv_lite", "cla"):
        assert cache_bytes(tiny_config(kv={"preset": name}), context=4096) * 2 == mha


def test_a_latent_at_deepseeks_sizes_is_576_numbers_a_token_and_layer(tiny_config, random_model):
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 16, "v_head_dim": 16}
    model = random_model(tiny_config(kv={"preset": "mla", **sizes}, n_layers=2)).bfloat16()
    cache = KVCache(model.config)
    with torch.no_grad():
        model(tokens(1, 5), cache=cache)
    assert cache.nbytes() == 2 * 5 * 576 * 2


def test_a_windowed_slot_frees_what_leaves_the_window(design):
    model = design("yoco")
    cache = KVCache(model.config)
    run(model, cache, tokens(1), [LENGTH])
    store = cache.stores[0]
    assert isinstance(store, SlotStore)
    held = store.slot.k
    assert held.shape[1] == 3
    assert held.untyped_storage().nbytes() == held.nbytes


# ---- fp8 ------------------------------------------------------------------------------------------------------------


def test_fp8_is_off_by_a_sixteenth_at_most():
    x = torch.randn(64, 5, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None, None]
    stored, scale = to_fp8(x)
    assert stored.dtype == torch.float8_e4m3fn
    error = (from_fp8(stored, scale, torch.float32) - x).abs()
    large = x.abs() > x.abs().amax(-1, keepdim=True) * 2**-14
    assert (error[large] / x.abs()[large]).max() <= 1 / 16
    assert (error <= x.abs().amax(-1, keepdim=True) * 2**-14).logical_or(large).all()
    zeros = to_fp8(torch.zeros(2, 8))
    assert from_fp8(*zeros, torch.float32).eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mha", "gqa", "fusedkv", "mla", "yoco", "lckv"])
def test_decoding_from_fp8_stays_near(name, kind, design):
    """Relative error of the logits over the tokens decoded, against the model's own dtype."""
    model, ids = design(name), tokens(2)
    expected = model(ids)[:, 6:]
    cache = KVCache(model.config, max_len=KINDS[kind], storage="fp8")
    found = run(model, cache, ids, [4, 2, *[1] * 6])[:, 6:]
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.08


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_use_is_refused(design, tiny_config, random_model):
    model, other, ids = design("mha"), design("gqa"), tokens(2)
    with pytest.raises(UserError, match="made for another model"):
        other(ids, cache=KVCache(model.config))
    for key, value in (("head_dim", 16), ("d_model", 48), ("rope", {"theta": 500.0})):
        with pytest.raises(UserError, match=f"made for another model: its {key} is .*, the model's .*"):
            random_model(tiny_config(kv={"preset": "mha"}, **{key: value}))(ids, cache=KVCache(model.config))
    longer = model.config.model_copy(update={"max_seq_len": 128, "d_ff": 99})  # nothing that slots depend on
    model(ids, cache=KVCache(longer))
    with pytest.raises(UserError, match=r"8 tokens stored and 4 to come, but it was made for max_len 10"):
        run(model, KVCache(model.config, max_len=10), ids, [8, 4])
    cache = KVCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(UserError, match="holds 2 sequences and was handed 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(UserError, match="cannot be combined with a cache or with padding"):
        model(ids, document_ids=torch.zeros_like(ids), cache=KVCache(model.config))
    with pytest.raises(UserError, match="max_len of a cache is 0"):
        KVCache(model.config, max_len=0)
    with pytest.raises(UserError, match="serves cllm models only"):
        cache.update(ids, ids, 0)
    mixed = {"layers": [{"layers": "0", "own": {}, "window": 4}, {"layers": "1", "own": {}}]}
    mixed["layers"].append({"layers": "2-7", "keys": {"share": 1}, "values": {"share": 0}, "window": 4})
    with pytest.raises(UserError, match=r"layer 2 reads slots that keep different numbers of tokens \(layer 0 keeps 4"):
        KVCache(tiny_config(kv=mixed), max_len=64)


def test_slots_that_keep_different_numbers_of_tokens_in_a_growing_cache(tiny_config, random_model):
    layers = [
        {"layers": "0", "own": {}, "window": 4},
        {"layers": "1", "own": {}},
        {"layers": "2-7", "keys": {"fuse": [0, 1]}, "values": {"share": 1}, "window": 3},
    ]
    model, ids = random_model(tiny_config(kv={"layers": layers})).requires_grad_(False), tokens(3)
    starts = torch.tensor(PADDING)
    expected = alone(model, ids, PADDING)
    for parts in ([7] + [1] * 5, [4, 4, 4]):
        assert_same(run(model, KVCache(model.config), ids, parts, starts), expected, PADDING)
