"""Bases from weights (Palu, ASVD, LoRC, EigenAttention), ShadowKV, recomputed keys and values, and folded values."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import TransformersEngine, engine_of
from cllm.posthoc.fixed_bases import progressive_shares, ranks_at
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.methods.eigenattention import EigenAttention
from cllm.posthoc.projecting import fisher_sizes, outputs_of
from cllm.posthoc.rank_search import SEARCHES, ProjectedModel
from cllm.posthoc.registry import parse
from cllm.posthoc.token_codes import hadamard
from tests.posthoc.filled import fill

PREFIX, LENGTH, SINKS = 20, 28, 4
SHARES = SEARCHES["search"].levels


def inputs_of(engine, ids):
    """Inputs (B, T, d_model) of the projections of every slot."""
    seen, slots = {}, engine.slots()
    hooks = [
        engine.projections(slot)[0].register_forward_pre_hook(lambda _, args, slot=slot: seen.update({slot: args[0]}))
        for slot in slots
    ]
    engine.hidden(ids, engine.new_cache())
    for hook in hooks:
        hook.remove()
    return seen


# ---- bases from weights ---------------------------------------------------------------------------------------------


def literal(weight, bias, x, d, rank):
    """L (R x) + b (T, w) of a truncated decomposition of `weight` (w, d_model) times `d`, as the papers write it."""
    u, s, vh = torch.linalg.svd(weight.double() @ d)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, torch.linalg.solve(d.T, (root[:, None] * vh[:rank]).T).T
    y = x.double() @ right.T @ left.T
    return (y if bias is None else y + bias.double()).float()


CASES = [
    ("palu:heads=1,allocation=uniform", 8, "whiten"),
    ("palu:heads=2,allocation=uniform", 16, "whiten"),
    ("palu:heads=null,allocation=uniform,whiten=false", 32, "none"),
    ("asvd:alpha=0.5", 32, "scale"),
    ("lorc:allocation=uniform", 32, "none"),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("spec", "channels", "kind"), CASES)
def test_projections_are_the_papers_factors(spec, channels, kind, bias, decoder, tokens):
    model, ids, text = decoder(n_layers=2, kv_bias=bias), tokens(2, PREFIX), tokens(2, 40, seed=1)
    engine, cache, method = fill(model, ids, f"{spec},keep=0.5", text)
    compressed, xs, calibration = engine.compress(cache, method), inputs_of(engine, ids), inputs_of(engine, text)
    for slot in (0, 1):
        x = calibration[slot][:, SINKS:].flatten(0, 1).double()
        d = torch.eye(x.shape[1], dtype=torch.float64)
        if kind == "whiten":
            d = torch.linalg.cholesky(x.T @ x / len(x))
        elif kind == "scale":
            d = torch.diag(x.abs().sqrt().mean(0) + 1e-6)
        prefix = compressed.stores[slot].prefix
        for code, linear in zip((prefix.k, prefix.v), engine.projections(slot), strict=True):
            for row in range(2):
                expected = [
                    literal(linear.weight[c], linear.bias[c] if bias else None, xs[slot][row, SINKS:], d, channels // 2)
                    for c in (slice(i, i + channels) for i in range(0, 32, channels))
                ]
                found = code.decode()[row].flatten(1)
                torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=2e-4, rtol=1e-3)


def test_eigenattention_is_palu_with_one_basis_for_all_heads(decoder, tokens, filled):
    model, ids, text = decoder(), tokens(2, PREFIX), tokens(2, 40, seed=1)
    codes = []
    for spec in ("eigenattention:keep=0.4,allocation=uniform", "palu:keep=0.4,heads=null,allocation=uniform"):
        engine, cache, method = fill(model, ids, spec, text)
        codes.append(engine.compress(cache, method).stores[3].prefix)
    torch.testing.assert_close(codes[0].k.decode(), codes[1].k.decode(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(codes[0].v.decode(), codes[1].v.decode(), atol=1e-4, rtol=1e-3)
    engine, cache, method = fill(model, ids, "eigenattention:keep=0.9", text)
    ((keys, _),) = engine.compressible(filled(model, text)[1]).tensors(
        before_rope=True, sinks=engine.compressible(filled(model, text)[1]).sinks(4)
    )
    engine.compress(cache, method)
    for slot in range(len(keys.slots)):
        sizes = torch.linalg.svdvals(keys.flat(slot).flatten(0, 1).double())
        share = sizes.cumsum(0) / sizes.sum()
        (rank,) = method.facts()["ranks"][f"{slot}.k"]
        assert share[rank - 1] >= 0.9 > share[rank - 2]


def test_the_prompts_basis_is_the_svd_of_its_tokens(decoder, tokens):
    model, ids = decoder(), tokens(2, PREFIX)
    engine, cache, method = fill(model, ids, "eigenattention:keep=0.25,allocation=uniform,basis=prompt", tokens(1, 30))
    found = engine.compress(cache, method)
    expected = engine.compress(cache, parse("svd:rank_k=8,rank_v=8"))
    for slot, errors in expected.outcome.errors.items():
        assert found.outcome.errors[slot] == pytest.approx(errors, rel=1e-4)
    assert found.nbytes() == expected.nbytes()
    assert method.weight_bytes() == 0


FULL = ["palu:keep=1.0,heads=3,allocation=uniform", "asvd:ratio=1", "lorc:ratio=1,least=0.2", "eigenattention:keep=1.0"]


@pytest.mark.parametrize("spec", FULL)
@pytest.mark.parametrize("name", ["mha", "gqa", "cla", "yoco", "fusedkv", "fusedkv_lite"])
def test_full_rank_in_any_basis_reproduces_the_logits(name, spec, design, tokens):
    model, ids = design(name), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], spec, tokens(1, 30, seed=2))
    compressed, expected = engine.compress(cache, method), model(ids)[:, PREFIX:]
    torch.testing.assert_close(engine.logits(ids[:, PREFIX:-2], compressed), expected[:, :-2], atol=1e-4, rtol=1e-4)
    last = [engine.logits(ids[:, i : i + 1], compressed) for i in (LENGTH - 2, LENGTH - 1)]
    torch.testing.assert_close(torch.cat(last, dim=1), expected[:, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [*FULL[:1], "palu:ratio=1,heads=1", FULL[3], "shadowkv:rank=16,select=null"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_rank_of_transformers_models(family, spec, llama, tokens):
    model, ids = llama(family), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], spec, tokens(1, 30, seed=2))
    compressed = engine.compress(cache, method)
    expected = model(ids).logits[:, PREFIX:]
    torch.testing.assert_close(engine.logits(ids[:, PREFIX:], compressed), expected, atol=1e-4, rtol=1e-4)


def test_compressing_again_loses_nothing_more(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "palu:keep=0.5,recompress=4", tokens(1, 30, seed=2))
    compressed = engine.compress(cache, method)
    first = [store.prefix.v.a.data for store in compressed.stores.values()]
    for i in range(PREFIX, PREFIX + 8):
        engine.logits(ids[:, i : i + 1], compressed)
    assert compressed.compressed == PREFIX + 8
    for before, store in zip(first, compressed.stores.values(), strict=True):
        now = store.prefix.v.a.data
        assert now.shape[1] == before.shape[1] + 8
        torch.testing.assert_close(now[:, : before.shape[1]], before, atol=1e-5, rtol=1e-5)


def test_bytes_of_bases_that_no_cache_stores(decoder, tokens):
    model, ids = decoder(), tokens(2, PREFIX)  # 8 slots of 4 heads of 8 channels, fp32
    exact = 8 * 2 * 2 * 32 * SINKS * 4
    engine, cache, method = fill(model, ids, "palu:keep=0.5,heads=2,allocation=uniform", tokens(1, 30))
    assert engine.compress(cache, method).nbytes() == exact + 8 * 2 * 2 * (PREFIX - SINKS) * 16 * 4
    assert method.weight_bytes() == 8 * 2 * 32 * 16 * 4
    for spec in ("palu:ratio=2", "asvd:ratio=2", "lorc:ratio=2", "eigenattention:ratio=2", "recompute:ratio=1.5"):
        engine, cache, method = fill(model, ids, spec, tokens(1, 30))
        ratio = engine.nbytes(cache) / engine.compress(cache, method).nbytes()
        wanted = method.ratio
        assert wanted <= ratio < 1.15 * wanted, spec
    engine, cache, method = fill(model, ids, "palu:ratio=2+kivi:bits=4,group=8,residual=0", tokens(1, 30))
    assert engine.nbytes(cache) / engine.compress(cache, method).nbytes() > 2.8


def test_ranks_follow_the_gradients(decoder, tokens):
    model, text = decoder(n_layers=2), tokens(2, 30)
    found = fisher_sizes(engine_of(model), text)
    squares: dict[str, torch.Tensor | float] = {}
    for row in text:
        grown = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}
        logits = torch.func.functional_call(model, grown, (row[None, :-1],))
        F.cross_entropy(logits[0], row[1:]).backward()
        for name, parameter in grown.items():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad.square()
    for slot in (0, 1):
        for kind in "kv":
            expected = squares[f"blocks.{slot}.attention.owner.{kind}_proj.weight"].sqrt().mean().item()
            assert found[slot, kind] == pytest.approx(expected, rel=1e-3)
    assert not any(p.requires_grad for p in model.parameters())
    engine, cache, method = fill(model, tokens(1, PREFIX), "palu:keep=1.0,heads=null", text)
    engine.compress(cache, method)
    most = max(found.values())
    ranks = {f"{slot}.{kind}": [max(int(32 * size / most + 1e-9), 1)] for (slot, kind), size in found.items()}
    assert method.facts()["ranks"] == ranks
    assert len({tuple(r) for r in ranks.values()}) > 1


def test_progressive_ranks_fall_with_depth():
    # Cumulative log condition numbers 6, 5, 3: shares 1, 1 - (1/3)(1 - 0.4), 0.4
    assert progressive_shares([1.0, 2.0, 3.0], 0.4) == pytest.approx([1.0, 0.8, 0.4])
    assert progressive_shares([2.0], 0.4) == pytest.approx([1.0])


# ---- Palu's latents -------------------------------------------------------------------------------------------------


def signs(size):
    """Hadamard's matrix by its formula, -1 to the number of common bits of row and column."""
    return (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double() / size**0.5
    )


def test_a_hadamard_matrix_changes_nothing_without_codes(decoder, tokens):
    model, ids, text = decoder({"preset": "gqa"}), tokens(2, LENGTH), tokens(2, 40, seed=1)
    for size in (1, 2, 3, 8, 22, 96):
        matrix, blocks = hadamard(size), [2**k for k in range(7, -1, -1) if size & 2**k]
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(matrix, torch.block_diag(*map(signs, blocks)))
    for more in ("", ",heads=1,allocation=uniform", ",every=4"):
        found = []
        for mixed in ("false", "true"):
            spec = f"palu:keep=0.7,hadamard={mixed}{more}"
            engine, cache, method = fill(model, ids[:, :PREFIX], spec, text)
            compressed = engine.compress(cache, method)
            parts = ids[:, PREFIX:].split(4, dim=1)
            found.append((compressed.nbytes(), torch.cat([engine.logits(part, compressed) for part in parts], dim=1)))
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=2e-4)


def token_by_token(y, u, bits, sizes):
    """Keys or values y (n, width) as they are decoded from their latents on a basis u (width, r)."""
    read = []
    for token in y:
        latents = (token @ u).split(sizes)
        parts = []
        for h in latents:
            scale = (h.max() - h.min()) / (2**bits - 1)
            parts.append(torch.tensor([round(((x - h.min()) / scale).item()) for x in h]) * scale + h.min())
        read.append(torch.cat(parts) @ u.mT)
    return torch.stack(read)


@pytest.mark.parametrize(("bits", "mixed"), [(3, True), (4, False), (8, True)])
def test_latents_are_quantised_token_by_token(bits, mixed, decoder, tokens):
    model, ids, text = decoder(n_layers=2), tokens(2, LENGTH), tokens(2, 40, seed=1)
    spec = f"palu:keep=0.4,heads=2,allocation=uniform,bits={bits},hadamard={str(mixed).lower()}"
    engine, cache, method = fill(model, ids[:, :PREFIX], spec, text)
    compressed, xs = engine.compress(cache, method), inputs_of(engine, ids[:, :PREFIX])
    for slot in (0, 1):  # 4 heads of 8 channels: two groups of 16 channels, of rank 6
        prefix = compressed.stores[slot].prefix
        for kind, linear in zip("kv", engine.projections(slot), strict=True):
            blocks = []
            for vectors in method._spectra[slot, kind].vectors:
                turn = torch.block_diag(signs(4), signs(2)) if mixed else torch.eye(6).double()
                blocks.append(vectors[:, :6] @ turn)
            u = torch.block_diag(*blocks).float()
            found = getattr(prefix, kind).decode().flatten(2)
            for row in range(2):
                expected = token_by_token(linear(xs[slot][row, SINKS:]), u, bits, [6, 6])
                torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
    n = PREFIX - SINKS
    packed = sum(-(-n * 12 * width // 8) for width in (8, 4, 2, 1) if bits & width)
    per_tensor = packed + n * 2 * 2 * 4  # a scale and a zero in fp32 for each of two groups
    assert compressed.nbytes() == 2 * 2 * 2 * (per_tensor + SINKS * 32 * 4)


def test_a_hadamard_matrix_lowers_the_error_of_codes(decoder, tokens):
    model, ids, text, errors = decoder(), tokens(2, 60), tokens(2, 60), []
    for mixed in ("false", "true"):
        engine, cache, method = fill(model, ids, f"palu:keep=1.0,allocation=uniform,bits=2,hadamard={mixed}", text)
        errors.append([e[part] for e in engine.compress(cache, method).outcome.errors.values() for part in "kv"])
    assert sum(errors[1]) < 0.9 * sum(errors[0])


def test_later_tokens_join_quantised_latents(decoder, tokens):
    model, ids, text = decoder(), tokens(2, LENGTH), tokens(2, 40, seed=1)
    spec = "palu:keep=0.5,bits=3,hadamard=true,allocation=uniform"
    engine, cache, method = fill(model, ids[:, :PREFIX], f"{spec},every=4", text)
    compressed = engine.compress(cache, method)
    slots = compressed.stores
    first = {i: slots[i].prefix.k.decode() for i in slots}
    engine.logits(ids[:, PREFIX:], compressed)
    engine.hidden(ids[:, PREFIX:], cache)
    at_once = engine.compress(cache, method)
    for i in slots:
        found = compressed.stores[i].prefix.k.decode()
        assert found.shape[1] == LENGTH - SINKS
        torch.testing.assert_close(found[:, : PREFIX - SINKS], first[i])
    # the first slot sees the same inputs in both
    torch.testing.assert_close(compressed.stores[0].prefix.k.decode(), at_once.stores[0].prefix.k.decode())
    torch.testing.assert_close(compressed.stores[0].prefix.v.decode(), at_once.stores[0].prefix.v.decode())


def test_codes_of_latents_count_in_the_ratio(decoder, tokens):
    model, ids, text = decoder(), tokens(2, 60), tokens(2, 60)
    for spec in (
        "palu:ratio=6,bits=5,heads=2",
        "palu:ratio=10,bits=3,hadamard=true",
        "palu:ratio=10,bits=3,allocation=search",
    ):
        engine, cache, method = fill(model, ids, f"{spec},sinks=1", text)
        ratio = engine.nbytes(cache) / engine.compress(cache, method).nbytes()
        assert method.ratio <= ratio < 1.3 * method.ratio, spec


# ---- searched ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "kv"), [("asvd", "cla"), ("palu:heads=1", "gqa")])
def test_ranks_are_searched_by_the_loss_of_each_projection_alone(spec, kv, decoder, tokens):
    """Against copies of the model with one truncated weight each, and a scan of all thresholds."""
    model, ids, text = decoder({"preset": kv}, n_layers=4), tokens(2, PREFIX), tokens(2, 24, seed=1)
    model.head.weight.mul_(4)  # expect something
    spec += f"{',' if ':' in spec else ':'}allocation=search,sinks=0"
    engine, cache, method = fill(model, ids, f"{spec},keep=0.4", text)
    engine.compress(cache, method)
    losses: dict[tuple[int, str], list[float]] = {}
    for (slot, kind), spectrum in method._spectra.items():
        linear = engine.projections(slot)[kind == "v"]
        for share in SHARES:
            exact, blocks = linear.weight.clone(), []
            for vectors in spectrum.vectors:
                u = vectors[:, : max(1, int(share * len(vectors) + 1e-9))].float()
                blocks.append(u @ u.T)
            linear.weight.copy_(torch.block_diag(*blocks) @ exact)
            logits = model(text[:, :-1])
            linear.weight.copy_(exact)
            loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
            losses.setdefault((slot, kind), []).append(loss)
        assert method._costs[slot, kind] == pytest.approx(losses[slot, kind], abs=1e-5)
    widths = {place: [len(v) for v in spectrum.vectors] for place, spectrum in method._spectra.items()}
    total = sum(sum(of) for of in widths.values())
    for keep in (0.2, 0.4, 0.7):
        best = None
        for threshold in sorted({loss for of in method._costs.values() for loss in of}):
            ranks = {}
            for place, of in method._costs.items():
                share = min([s for s, loss in zip(SHARES, of, strict=True) if loss <= threshold] + [1.0])
                ranks[f"{place[0]}.{place[1]}"] = [max(1, int(share * w + 1e-9)) for w in widths[place]]
            if sum(map(sum, ranks.values())) <= keep * total:
                best = ranks
                break
        method = method.model_copy(update={"keep": keep})
        engine.compress(cache, method)
        assert method.facts()["ranks"] == best
        differ = len({tuple(r) for r in best.values()}) > 1
    assert differ, "of keep=0.7"
    found = []
    for ratio in (2, 4):
        method = method.model_copy(update={"keep": None, "ratio": ratio})
        found.append(engine.compress(cache, method).nbytes())
        assert found[-1] <= engine.nbytes(cache) / ratio
        found.append(sum(map(sum, method.facts()["ranks"].values())) * 2 * PREFIX * 4)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] > 1.5 * found[2]


def errors_by_hand(model, method, text, energy):
    """‖O' - O‖ / ‖O‖ of each layer, with truncated weights of the slots that it reads, when all layers get their exact
    inputs."""
    engine, found, inputs, outputs = engine_of(model), list[float](), list[Any](), list[Any]()

    def see(_, args, out):
        inputs.append(args[0])
        outputs.append(out[0])

    hooks = [block.register_forward_hook(see) for block in model.blocks]
    model(text)
    for hook in hooks:
        hook.remove()
    for layer, block in enumerate(model.blocks):
        exact = {}
        for slot in {*model.plan.keys(layer).layers, *model.plan.values(layer).layers}:
            for kind, linear in zip("kv", engine.projections(slot), strict=True):
                exact[linear], blocks = linear.weight.clone(), []
                spectrum = method._spectra[slot, kind]
                for vectors, roots in zip(spectrum.vectors, spectrum.roots, strict=True):
                    kept = roots.cumsum(0) / roots.sum()
                    u = vectors[:, : int((kept < energy - 1e-12).sum()) + 1].float()
                    blocks.append(u @ u.T)
                linear.weight.copy_(torch.block_diag(*blocks) @ linear.weight)
        got: list[Any] = []
        hooks = [
            each.register_forward_pre_hook(lambda _, args, x=x: (x, *args[1:]))
            for each, x in zip(model.blocks, inputs, strict=True)
        ]
        hooks.append(block.register_forward_hook(lambda _, args, out, got=got: got.append(out[0])))
        model(text)
        for hook in hooks:
            hook.remove()
        for linear, weight in exact.items():
            linear.weight.copy_(weight)
        found.append(((got[0] - outputs[layer]).norm() / outputs[layer].norm()).item())
    return found


@pytest.mark.parametrize(
    ("spec", "kv"), [("eigenattention", "mha"), ("eigenattention:heads=1", "cla"), ("palu:heads=2", "fusedkv_lite")]
)
def test_ranks_are_searched_by_the_errors_of_layers(spec, kv, decoder, tokens):
    """Against EigenAttention's search: each slot's share of singular values falls in steps of 0.02 until an error of a
    layer that reads it exceeds the bound; and against a scan of all bounds."""
    model, ids, text = decoder({"preset": kv}, n_layers=4), tokens(2, 60), tokens(2, 24, seed=1)
    for i in {0, 1, 2, 3} - set(model.plan.slots):
        model.blocks[i].attention.o_proj.weight.mul_(4)  # so that other layers than the slot's own set the bound
    spec += f"{',' if ':' in spec else ':'}allocation=errors,sinks=0"
    engine, cache, method = fill(model, ids, f"{spec},keep=0.4", text)
    steps = [round(1 - 0.02 * n, 2) for n in range(1, 50)]
    errors = {energy: errors_by_hand(model, method, text, energy) for energy in steps}
    slots = engine.slots()
    readers = {
        slot: [i for i in range(4) if slot in (*model.plan.keys(i).layers, *model.plan.values(i).layers)]
        for slot in slots
    }
    assert any(len(of) > 1 for of in readers.values()) == (kv != "mha")

    for slot in slots:
        by_hand = [max(errors[energy][layer] for layer in readers[slot]) for energy in steps]
        so_far = list(itertools.accumulate(by_hand, max))[::-1]
        for kind in "kv":
            assert method._costs[slot, kind] == pytest.approx(so_far, rel=1e-4, abs=1e-6)

    def walk(slot, bound):
        """The share before the first at which an error exceeds the bound."""
        energy = 1.0
        for lower, error in zip(steps, reversed(method._costs[slot, "k"]), strict=True):
            if error > bound:
                break
            energy = lower
        return energy

    def ranks_of(place, energy):
        of = method._spectra[place].roots
        return [len(r) if energy == 1 else int((r.cumsum(0) / r.sum() < energy - 1e-12).sum()) + 1 for r in of]

    total = sum(sum(spectrum.widths) for spectrum in method._spectra.values())
    differ = set()
    for keep in (0.3, 0.5, 0.8):
        for bound in sorted(itertools.chain(*method._costs.values())):
            best = {f"{s}.{kind}": ranks_of((s, kind), walk(s, bound)) for s in slots for kind in "kv"}
            if sum(map(sum, best.values())) <= keep * total:
                break
        method = method.model_copy(update={"keep": keep})
        engine.compress(cache, method)
        assert method.facts() == {"svd": "gram", "products": "fp32", "ranks": best, "threshold": bound}
        differ.add(len({walk(slot, bound) for slot in slots}))
    assert (max(differ) > 1) == (kv != "fusedkv_lite"), "where the same layers read all slots, these have one share"
    for ratio in (1.5, 3):
        method = method.model_copy(update={"keep": None, "ratio": ratio})
        assert ratio <= engine.nbytes(cache) / engine.compress(cache, method).nbytes() < 1.3 * ratio


def test_slots_of_several_turns_of_a_loop_have_bases_of_their_own(design, tokens):
    """Though one module computes them: what is projected lies in the slot's basis, and what is not does not."""
    engine, text = engine_of(design("a loop that reads its first turn")), tokens(2, 24, seed=1)
    method = parse("eigenattention:keep=0.5,sinks=0")
    assert isinstance(method, EigenAttention)
    method.prepare(engine, text)
    modules = outputs_of(engine, method._spectra)
    assert len(set(modules.values())) < len(modules), "no two slots have one module"

    def basis(place, level):
        spectrum = method._spectra[place]
        return spectrum.basis(ranks_at(spectrum, 1.0, level), torch.float32)

    model = ProjectedModel("search", engine, text, 0, modules, basis)
    for places in (list(modules), [max(modules)], [min(modules)]):
        cache = engine.new_cache()
        with model.projected(places, 0.5, text.shape[1]):
            engine.hidden(text, cache)
        cached = engine.compressible(cache)
        (tensors,) = cached.tensors(before_rope=True, sinks=cached.sinks(0))
        for of in tensors:
            for i, slot in enumerate(of.slots):
                rows, u = of.flat(i), basis((slot, of.kind), 0.5).matrix
                lost = (rows - rows @ u @ u.T).norm() / rows.norm()
                assert (lost < 1e-5) == ((slot, of.kind) in places), (slot, of.kind)


def test_errors_of_layers_are_measured_in_transformers_models_too(llama, tokens):
    """Each layer's rise as the share of its singular values falls, and no hook stays."""
    text = tokens(2, 24, seed=1)
    engine, method = engine_of(llama()), parse("eigenattention:keep=0.5,allocation=errors")
    assert isinstance(method, EigenAttention)
    before = engine.hidden(text, engine.new_cache())
    method.prepare(engine, text)
    assert torch.equal(engine.hidden(text, engine.new_cache()), before), "no hook stays"
    for slot in engine.slots():
        costs = method._costs[slot, "k"]
        assert costs == method._costs[slot, "v"]
        assert costs == sorted(costs, reverse=True)
        assert 0 < costs[-1] < costs[0] < 1
    bare: Any = type("Bare", (), {"base_model": None, "get_output_embeddings": lambda _: 0})()
    with pytest.raises(UserError, match=r"Bare has no layers\.N; allowed: models with it"):
        TransformersEngine(bare).layers()


# ---- ShadowKV -------------------------------------------------------------------------------------------------------


def test_shadowkv_is_svd_of_keys_with_exact_values(decoder, tokens, filled):
    engine, cache = filled(decoder(), tokens(2, 40))
    found = engine.compress(cache, parse("shadowkv:rank=8,select=8,chunk=4,outliers=1,local=1"))
    svd = engine.compress(cache, parse("svd:rank_k=8,rank_v=8"))
    for slot, errors in found.outcome.errors.items():
        assert errors["v"] == 0
        assert errors["k"] == pytest.approx(svd.outcome.errors[slot]["k"], rel=1e-4)
    # A and B of 8 ranks, values, sinks; for 4 heads of 8 landmarks of 9 chunks, and the keys of 1 + 1 chunks
    rows = 8 * (36 + 32) + 36 * 32 + 2 * 4 * 32 + 4 * 8 * (9 + 2 * 4)
    assert found.nbytes() == 8 * 2 * (4 * rows + 4 * 2 * 8)


def test_shadowkv_that_selects_everything_reads_all(decoder, tokens, filled):
    model, ids = decoder(), tokens(2, 44)
    engine, cache = filled(model, ids[:, :40])
    every = engine.compress(cache, parse(f"shadowkv:rank=32,select={4 * 10**20},chunk=4,outliers=0"))
    few = engine.compress(cache, parse("shadowkv:rank=32,select=4,chunk=4,outliers=0,local=0"))
    expected, lost = model(ids)[:, 40:], 0.0
    for i in range(4):
        step = ids[:, 40 + i : 41 + i]
        torch.testing.assert_close(engine.logits(step, every)[:, 0], expected[:, i], atol=1e-4, rtol=1e-4)
        lost = max(lost, (engine.logits(step, few)[:, 0] - expected[:, i]).abs().max().item())
    assert lost > 0.01


# ---- recomputed keys and values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_recomputed_keys_and_values_are_exact_at_half_the_bytes(bias, tiny_config, random_model, tokens):
    config = tiny_config(kv={"preset": "mha"}, d_model=32, n_heads=4, head_dim=8, kv_bias=bias)
    model, ids, starts = random_model(config).eval().requires_grad_(False), tokens(2, 28), torch.tensor([0, 3])
    layers = len(model.blocks)
    for padding in ({}, {"starts": starts}):
        engine, cache, method = fill(model, ids[:, :PREFIX], "recompute", ids, **padding)
        compressed = engine.compress(cache, method)
        assert engine.nbytes(cache) == layers * 2 * 2 * PREFIX * 32 * 4
        assert compressed.nbytes() == layers * 2 * 4 * (32 * (PREFIX - SINKS) + 2 * 32 * SINKS)
        assert compressed.outcome.read_flops == layers * 2 * (PREFIX - SINKS) * 2 * 32 * 2 * 32
        assert method.weight_bytes() == 0
        method.release()
        for part in ids[:, PREFIX:].split([5, 1, 2], dim=1):
            torch.testing.assert_close(
                engine.logits(part, compressed), engine.logits(part, cache), atol=1e-5, rtol=1e-5
            )


def test_recomputed_keys_and_values_of_a_transformers_model(llama, tokens):
    small, ids = llama("qwen2"), tokens(2, LENGTH)
    config = copy.deepcopy(small.config)
    config.num_key_value_heads = config.num_attention_heads
    model = type(small)(config).eval().requires_grad_(False)
    engine, cache, method = fill(model, ids[:, :PREFIX], "recompute", ids)
    compressed = engine.compress(cache, method)
    assert compressed.nbytes() == 4 * 2 * 4 * (32 * (PREFIX - SINKS) + 2 * 32 * SINKS)
    expected = model(ids).logits[:, PREFIX:]
    torch.testing.assert_close(engine.logits(ids[:, PREFIX:], compressed), expected, atol=1e-5, rtol=1e-5)


def test_a_rank_keeps_what_keys_and_values_need(decoder, tokens):
    model, ids = decoder(), tokens(2, 60)
    engine, cache, method = fill(model, ids, "recompute:rank=9", ids)
    compressed = engine.compress(cache, method)
    ((keys, values),) = engine.compressible(cache).tensors(before_rope=True, sinks=engine.compressible(cache).sinks(4))
    for i in (0, 7):
        prefix = compressed.stores[i].prefix
        assert prefix.k.a is prefix.v.a
        both = [part.flat(i) / part.flat(i).square().mean().sqrt() for part in (keys, values)]
        errors = [
            ((code.decode().flatten(2) - part.flat(i)) / part.flat(i).square().mean().sqrt()).square().sum((1, 2))
            for code, part in ((prefix.k, keys), (prefix.v, values))
        ]
        least = torch.linalg.svdvals(torch.cat(both, dim=-1).double())[:, 9:].square().sum(1)
        torch.testing.assert_close(sum(errors).double(), least, rtol=1e-4, atol=1e-4)
    inputs = fill(model, ids, "recompute:rank=24,fit=input", ids)  # d_model: nothing is lost
    assert max(max(e.values()) for e in engine.compress(inputs[1], inputs[2]).outcome.errors.values()) < 1e-4
    few = fill(model, ids, "recompute:rank=9,fit=input", ids)
    lost = engine.compress(few[1], few[2])
    x = inputs_of(engine, ids)[3][:, SINKS:]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    expected = (u[..., :9] * s[:, None, :9] @ vh[:, :9]) @ engine.projections(3)[0].weight.T
    torch.testing.assert_close(lost.stores[3].prefix.k.decode().flatten(2), expected, atol=1e-3, rtol=1e-3)
    joint = fill(model, ids, "recompute:rank=48,group=4", ids)
    shared = engine.compress(joint[1], joint[2])
    assert len({id(shared.stores[i].prefix.k.a) for i in range(4)}) == 1


# ---- folded values --------------------------------------------------------------------------------------------------


def slow_fold(anchor, own):
    """The order of `own`'s heads and T of each, from values (tokens, G, D), by trying all orders."""
    heads, d = anchor.shape[1:]

    def root(m, power):
        values, vectors = torch.linalg.eigh(m + 1e-4 * m.diagonal().mean() * torch.eye(d, dtype=m.dtype))
        return vectors @ torch.diag(values**power) @ vectors.T

    maps = {}
    for g, h in itertools.product(range(heads), repeat=2):
        a, b = anchor[:, g].double(), own[:, h].double()
        u, _, wt = torch.linalg.svd(root(a.T @ a, -0.5) @ (a.T @ b) @ root(b.T @ b, -0.5))
        t = root(b.T @ b, -0.5) @ wt.T @ u.T @ root(a.T @ a, 0.5)
        maps[g, h] = t, (a @ torch.linalg.inv(t) - b).norm().item()
    order = min(itertools.permutations(range(heads)), key=lambda o: sum(maps[g, h][1] for g, h in enumerate(o)))
    return order, [maps[g, h][0] for g, h in enumerate(order)]


@pytest.mark.parametrize("group", [2, 3])
def test_vfold_averages_values_in_common_coordinates(group, decoder, tokens, filled):
    model, ids, text = decoder(n_layers=5), tokens(2, 40), tokens(2, 60, seed=1)
    engine, cache, method = fill(model, ids, f"vfold:group={group},recent=6", text)
    compressed = engine.compress(cache, method)
    stores = [compressed.stores[i] for i in range(5)]
    of_text = [slot.v[:, SINKS:].flatten(0, 1) for slot in engine.compressible(filled(model, text)[1]).slots.values()]
    of_ids = [slot.v[:, SINKS:] for slot in engine.compressible(cache).slots.values()]
    for first in range(0, 5 - 5 % group, group):
        anchor, members = first + group // 2, range(first, first + group)
        folds = {i: slow_fold(of_text[anchor], of_text[i]) for i in members if i != anchor}
        folded = {i: of_ids[i][:, :30].double() for i in members}
        for i, (order, maps) in folds.items():
            folded[i] = torch.stack([folded[i][:, :, h] @ t for h, t in zip(order, maps, strict=True)], dim=2)
        mean = sum(folded.values()) / group
        for i in members:
            expected = mean
            if i in folds:
                order, maps = folds[i]
                expected = torch.empty_like(mean)
                for g, (h, t) in enumerate(zip(order, maps, strict=True)):
                    expected[:, :, h] = mean[:, :, g] @ torch.linalg.inv(t)
            found = stores[i].prefix.v.decode()
            torch.testing.assert_close(found[:, :30].double(), expected, atol=1e-3, rtol=1e-3)
            assert torch.equal(found[:, 30:], of_ids[i][:, 30:])
            assert compressed.outcome.errors[i]["k"] == 0
    # keys, sinks, recent values of every slot; one mean for each group, and the values of slots without one
    means, alone = 5 // group + (5 % group > 1), 5 % group == 1
    rows = 5 * (40 + SINKS + 6) + 30 * (means + alone)
    assert compressed.nbytes() == 2 * 4 * 32 * rows


@pytest.mark.parametrize("name", ["mha", "gqa", "cla", "llama", "qwen2"])
def test_a_folded_model_computes_the_same(name, design, llama, tokens):
    model, ids = llama(name) if name in ("llama", "qwen2") else design(name), tokens(2, LENGTH)
    engine, cache, method = fill(model, ids[:, :PREFIX], "vfold:recent=4", tokens(2, 60, seed=1))
    changed, folded = method.folded(engine)

    def logits(e, c):
        return e.logits(ids[:, PREFIX:], c)

    expected = logits(engine, engine.compress(cache, method))
    twin = changed.new_cache()
    changed.hidden(ids[:, :PREFIX], twin)
    moved = changed.compress(twin, folded)
    torch.testing.assert_close(logits(changed, moved), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(changed, twin), logits(engine, cache), atol=1e-5, rtol=1e-5)
    kept = changed.compressible(twin).slots
    assert any((kept[i].v - slot.v).abs().max() > 0.05 for i, slot in engine.compressible(cache).slots.items())
    assert folded.weight_bytes() < method.weight_bytes()


def test_vfold_averages_tokens_that_leave_the_window_once(decoder, tokens):
    model, ids = decoder(n_layers=4), tokens(2, 40)
    engine, cache, method = fill(model, ids[:, :PREFIX], "vfold:recent=6,recompress=5", tokens(2, 60, seed=1))
    compressed = engine.compress(cache, method)
    first = compressed.stores[0].prefix.v.mean.data.clone()
    for i in range(PREFIX, PREFIX + 10):
        engine.logits(ids[:, i : i + 1], compressed)
    now = compressed.stores[0].prefix.v
    assert now.mean.data.shape[1] == first.shape[1] + 10 == 20
    assert now.recent.shape[1] == 6
    torch.testing.assert_close(now.mean.data[:, :10], first, atol=1e-4, rtol=1e-4)


# ---- all ------------------------------------------------------------------------------------------------------------

CALIBRATED = [
    "palu:keep=0.5,heads=2,bits=4,hadamard=true",
    "asvd:keep=0.5,allocation=search",
    "eigenattention:keep=0.5,allocation=errors",
    "kvquant:bits=4,levels=fisher",
]
LOSSY = [
    *CALIBRATED,
    "palu:keep=0.5,heads=2",
    "asvd:keep=0.5",
    "lorc:keep=0.5",
    "eigenattention:keep=0.8",
    "shadowkv:rank=9,select=null",
    "recompute:rank=20",
    "recompute",
    "vfold:recent=5",
    "vfold:recent=4+kivi:bits=8,group=8,residual=0",
    "shadowkv:rank=9,select=8,chunk=4,outliers=1+kivi:bits=8,group=8,residual=0",
]


@pytest.mark.parametrize("spec", LOSSY)
def test_a_padded_sequence_is_compressed_like_one_alone(spec, decoder, tokens):
    model, ids, start, text = decoder(), tokens(1, 32), 8, tokens(2, 60, seed=1)
    double = torch.cat((ids, ids.roll(1)))
    starts = torch.tensor([start, 0])
    _, cache, method = fill(model, double[:, :24], spec, text, starts=starts)
    found = model(double[:, 24:25], cache=compress_cache(cache, method))[0]
    _, alone, method = fill(model, ids[:, start:24], spec, text)
    expected = model(ids[:, 24:25], cache=compress_cache(alone, method))[0]
    torch.testing.assert_close(found, expected, atol=5e-2 if "kivi" in spec else 1e-3, rtol=1e-2)


def test_what_recompute_keeps_of_a_sequence_does_not_depend_on_its_batch(decoder, tokens):
    model, ids = decoder(), tokens(1, 24)
    together = torch.cat((ids, torch.zeros_like(ids)))  # one token repeated: keys and values of other sizes
    codes: list[Any] = []
    for batch in (ids, together):
        _, cache, method = fill(model, batch, "recompute:rank=8", tokens(2, 60, seed=1))
        store: Any = compress_cache(cache, method).stores[0]
        codes.append(store.prefix)
    for part in ("k", "v"):
        one, other = (getattr(prefix, part).decode()[0] for prefix in codes)
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [*LOSSY[:9], "vfold:recent=5", "kvtc:ratio=1.5,basis=calibration"])
def test_transformers_caches_and_batches(spec, llama, tokens):
    model, ids = llama("qwen2"), tokens(3, 30)
    engine, cache, method = fill(model, ids[:, :24], spec, tokens(2, 60, seed=1))
    compressed = compress_dynamic(cache, method, model)
    before, order = compressed.nbytes(), torch.tensor([2, 0])
    expected = engine.logits(ids[:, 24:], compress_dynamic(cache, method, model))
    compressed.batch_select_indices(order)
    assert compressed.nbytes() == before // 3 * 2
    torch.testing.assert_close(engine.logits(ids[order, 24:], compressed), expected[order], atol=1e-4, rtol=1e-4)


def test_bf16(decoder, tokens):
    model, ids = decoder().bfloat16(), tokens(2, 28)
    for spec in LOSSY:
        engine, cache, method = fill(model, ids[:, :24], spec, tokens(2, 60, seed=1))
        compressed = engine.compress(cache, method)
        kinds = {
            t.dtype for store in compressed.stores.values() for t in store.tensors().values() if t.is_floating_point()
        }
        assert kinds == {torch.bfloat16}, spec
        assert all(torch.isfinite(torch.tensor(list(e.values()))).all() for e in compressed.outcome.errors.values())
        for step in ids[:, 24:].split([2, 1, 1], dim=1):
            assert engine.logits(step, compressed).isfinite().all()


def test_what_methods_refuse(decoder, design, llama, tokens, filled):
    text = tokens(1, 30)
    engine, cache = filled(decoder(), tokens(1, PREFIX))
    for spec in ("palu:ratio=2", "vfold", "lorc:keep=0.5"):
        with pytest.raises(UserError, match="not calibrated"):
            engine.compress(cache, parse(spec))
    short = filled(decoder(), tokens(1, SINKS))[1]
    for spec in ("recompute:ratio=2", "palu:ratio=2"):
        with pytest.raises(UserError, match="at 4 tokens sinks=4 leave nothing to compress"):
            engine.compress(short, parse(spec))
    with pytest.raises(UserError, match="has not seen the cache being filled"):
        engine.compress(cache, parse("recompute"))
    with pytest.raises(UserError, match="keys of slot 0 have 32 channels; allowed: 1 to 32"):
        engine.compress(cache, parse("shadowkv:rank=33"))
    with pytest.raises(UserError, match="3 calibration tokens, and sinks=4 are left out"):
        parse("palu:ratio=2").prepare(engine, text[:, :3])
    for spec in ("palu:keep=0.5", "lorc:keep=0.5", "eigenattention:keep=0.5", "vfold"):
        with pytest.raises(UserError, match="nothing to compress: all slots have a window"):
            parse(spec).prepare(engine_of(decoder(kv={"preset": "mha", "window": 4})), text)
    cyclic = fill(design("lckv"), text, "recompute", text)
    with pytest.raises(UserError, match="allowed: plans whose layers run once for each token"):
        cyclic[0].compress(cyclic[1], cyclic[2])
    method = parse("palu:ratio=100")
    method.prepare(engine, text)
    with pytest.raises(UserError, match="palu: ratio=100: at 20 tokens 20% of the cache stay as they are"):
        engine.compress(cache, method)
    method = parse("asvd:keep=0.02,allocation=search")
    method.prepare(engine, text)
    with pytest.raises(UserError, match=r"asvd: keep=0.02: a share of 0.05 of all ranks, .*; allowed: a lower ratio"):
        engine.compress(cache, method)
    method = parse("eigenattention:ratio=60,allocation=errors,sinks=0")
    method.prepare(engine, text)
    with pytest.raises(UserError, match=r"ratio=60: at 20 tokens: a share of 0.02 of the sum of singular values, the"):
        engine.compress(cache, method)
    with pytest.raises(UserError, match="asvd: allocation=search needs a loss: give 2 or more calibration tokens"):
        parse("asvd:keep=0.5,allocation=search,sinks=0").prepare(engine, text[:, :1])
    latent = design("mla")
    for spec in ("palu:keep=0.5", "eigenattention:keep=0.5", "recompute", "vfold"):
        with pytest.raises(UserError, match="latent"):
            fill(latent, text, spec, text)
    for spec in ("shadowkv:rank=4", "recompute:rank=4"):
        with pytest.raises(UserError, match="the slots are latents"):
            engine_of(latent).compress(filled(latent, text)[1], parse(spec))
    narrow = fill(llama("llama"), text, "recompute", text)
    with pytest.raises(
        UserError, match=r"input has 32 numbers a token, and its keys and values have 32.*rank from 1 to 31"
    ):
        narrow[0].compress(narrow[1], narrow[2])
    biased = fill(llama("qwen2"), text, "recompute:rank=8,fit=input", text)
    with pytest.raises(UserError, match="fit=input: the projections have a bias; allowed: fit=kv"):
        biased[0].compress(biased[1], biased[2])
    engine, cache, method = fill(design("fusedkv"), text, "vfold", text)
    with pytest.raises(UserError, match="weights of channels"):
        method.folded(engine)
