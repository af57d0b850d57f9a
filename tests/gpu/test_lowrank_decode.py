"""The Triton kernels over low-rank factors against plain torch on a GPU, at real shapes.

Places of the tail that are not filled hold NaN. fp32 takes products of fp32 precision, so that there a single token of
thousands that is lost, or counted twice, shows: the first and the last visible one of the factors and of the tail carry
values as large as all others together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, Rope
from cllm.kernels import resident_lowrank, split_lowrank, triton_decode
from cllm.kernels.decode import Visible
from cllm.kernels.lowrank_decode import _keys, lowrank_decode, lowrank_decode_reference
from cllm.kernels.lowrank_tiles import Rebuild, Tuning, choose_rebuild
from cllm.kernels.selection import Factored, chosen_tokens
from cllm.model.graph import StepGraph
from cllm.model.sizes import build_decoder
from cllm.posthoc import deferred
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.landmarks import make_landmarks
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import consecutive_table

pytestmark = pytest.mark.skipif(triton_decode.MISSING is not None, reason=f"no triton: {triton_decode.MISSING}")
B = 2


@dataclass(frozen=True)
class Case:
    """One call; `filled` of `t` tokens of the tail hold tokens."""

    s: int = 3000
    t: int = 200
    filled: int = 150
    d: int = 128
    h: int = 32
    g: int = 8
    rank_k: int = 384
    rank_v: int = 576
    parts: int = 1
    first: tuple[int, ...] | None = None
    exclude_self: bool = False
    budget: int | None = None

    def __str__(self) -> str:
        default = Case()
        changed = (f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name))
        return "-".join(changed).replace(" ", "") or "plain"


CASES = [
    Case(),
    Case(rank_k=383, rank_v=517),
    Case(rank_k=16, rank_v=24),
    Case(rank_k=1024, rank_v=1024),
    Case(h=8, g=8),
    Case(h=32, g=1),
    Case(h=14, g=2, d=64),
    Case(h=12, g=3, d=96),
    Case(d=80, h=16, g=16),
    Case(d=64, g=32, h=32),
    Case(parts=2),
    Case(s=17, t=1, filled=1),
    Case(s=8192, first=(0, 8190)),
    Case(first=(10, 2999), exclude_self=True),
    Case(filled=1, exclude_self=True),
    Case(budget=512),
    Case(budget=512, first=(0, 2000), rank_k=383, rank_v=517),
    Case(budget=512, h=8, g=8, d=64),
    Case(budget=4096, first=(7, 0)),
]


def call(case: Case, device, dtype):
    """Arguments of `lowrank_decode`, its selection among them."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    column = case.s + case.filled - 1
    first = torch.tensor(case.first or (0,) * B, device=device)
    count = column + 1 - first - int(case.exclude_self)  # B: tokens that each row sees

    def part(rank: int, heavy: bool) -> Factored:
        a, tail = randn(B, case.s, rank), randn(B, case.t, case.g, case.d)
        b = randn(B, case.g * case.d, rank) / rank**0.5
        if heavy:
            for row in range(B):
                edges = [int(first[row]), case.s - 1] if first[row] < case.s else []
                a[row, edges] *= count[row].to(dtype)
                late = case.filled - 1 - int(case.exclude_self)
                if late >= 0:
                    tail[row, [0, late]] *= count[row].to(dtype)
        tail[:, case.filled :] = torch.nan
        return Factored(a, b, tail)

    queries = [randn(B, case.h, case.d) for _ in range(case.parts)]
    keys = [part(case.rank_k, False) for _ in range(case.parts)]
    values = [part(case.rank_v, True) for _ in range(case.parts)]
    table = consecutive_table(Rope(), case.d, torch.arange(case.s, device=device))
    visible = Visible(
        torch.tensor([column], device=device), None if case.first is None else first, None, case.exclude_self
    )
    selection = None
    if case.budget is not None:
        text = None if case.first is None else torch.arange(case.s, device=device) >= first[:, None]
        k = randn(B, case.s, case.g, case.d)
        selection = make_landmarks(k, text, chunk=8, budget=case.budget, outliers=12)
    return queries, keys, values, table, visible, selection


def exact(arguments, scale: float):
    """By plain torch in fp32, of the same numbers."""
    queries, keys, values, table, visible, selection = arguments
    queries = [q.float() for q in queries]
    return lowrank_decode_reference(queries, keys, values, table, visible, scale=scale, selection=selection)


def assert_close(found, wanted, dtype) -> None:
    """Half precision rounds keys, probabilities and the result, fp32 products are three of TF32."""
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        relative = 2e-5 if dtype == torch.float32 else 2**-5 if dtype == torch.bfloat16 else 2**-8
        error, largest = (ours.float() - expected.float()).abs().max(), expected.float().abs().max()
        assert error <= relative * largest + 1e-6, f"error {error:.2e}, largest {largest:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_token_counts_once(gpu, case, dtype):
    *arguments, selection = call(case, gpu, dtype)
    scale = case.d**-0.5
    found = lowrank_decode(*arguments, scale=scale, selection=selection, kernel="triton")
    assert_close(found, exact((*arguments, selection), scale), dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(budget=512),
        Case(budget=512, first=(0, 2000)),
        Case(budget=64, s=100, h=8, g=8),
        Case(budget=2048, s=65536),
        Case(budget=4096, s=200_000, h=8, g=8),
    ],
    ids=str,
)
def test_the_kernel_chooses_the_chunks_that_torch_does(gpu, case):
    """From the same scores. Logarithms round differently, so that the last one or two chunks may differ."""
    queries, *_, visible, selection = call(case, gpu, torch.bfloat16)
    assert selection is not None
    launch = split_lowrank._Call(queries, case.g, visible, case.d**-0.5)
    landmark_scores = launch.empty_scores(selection.landmarks.shape[1])
    launch.score_stored(queries[0], selection.landmarks, landmark_scores, span=selection.chunk, factor=1.0)
    wanted = chosen_tokens(landmark_scores, selection)
    found = split_lowrank._choose(launch, queries[0], selection)
    assert found.shape == wanted.shape
    always = selection.outliers.shape[2] * selection.chunk
    assert torch.equal(found[..., :always], wanted[..., :always])
    for ours, theirs in zip(found.flatten(0, 1).tolist(), wanted.flatten(0, 1).tolist(), strict=True):
        assert len(set(ours)) == len(ours), "each once"
        assert len(set(ours) - set(theirs)) <= 2 * selection.chunk


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("block_r", [32, 64])
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("num_warps", [4, 8])
def test_any_tiles(gpu, block_n, block_r, pack, num_warps):
    case = Case(first=(0, 1234))
    arguments = call(case, gpu, torch.bfloat16)
    rebuild = Rebuild(block_n=block_n, block_r=block_r, pack=pack, num_warps=num_warps, num_stages=2)
    queries, keys, values, table, visible, selection = arguments
    found = split_lowrank.run(queries, keys, values, table, visible, 0.09, selection, Tuning(rebuild=rebuild))
    assert_close([found], exact(arguments, 0.09), torch.bfloat16)


@pytest.mark.parametrize(("theta", "start"), [(10_000, 0), (10_000, 4), (500_000, 4), (1_000, 4)])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(s=70_001),
        Case(s=65_300, first=(3, 40_000)),  # with base 500,000 in stretches of 1,024
        Case(s=20_000, first=(0, 12_345)),
        Case(s=30_000, first=(65, 29_999)),
        Case(s=20_000, h=8, g=8),
        Case(s=20_000, g=2),
        Case(s=20_000, d=64),
        Case(s=20_000, rank_k=40),
        Case(s=20_000, rank_k=328),
        Case(s=20_000, rank_k=768),
        Case(s=33_333, h=28, g=4, rank_k=256),
        Case(s=20_000, h=8, g=1),
    ],
    ids=str,
)
def test_resident_programs_score_as_fp32_does(gpu, case, dtype, add, theta, start):
    """Every score, on tables with a factor that begin at any position, nearly as close as Triton's kernel is.

    By arithmetic, the standard error is 1.08 to 1.14 times that kernel's if slow channels are interpolated, and 1.27
    times in fp16, where cosines are rounded like keys.
    """
    queries, (keys,), _, _, visible, _ = call(case, gpu, dtype)
    table = consecutive_table(Rope(theta=theta), case.d, torch.arange(start, start + case.s, device=gpu))
    table = replace(table, cos=1.3 * table.cos, sin=1.3 * table.sin)
    launch = split_lowrank._Call(queries, case.g, visible, case.d**-0.5)
    tiles = resident_lowrank.resident_tiles(queries[0], keys.a, keys.b, table, case.g, launch.limits)
    if tiles is None:
        pytest.skip("needs a Hopper GPU")
    slow = theta >= 10_000 and (case.h // case.g == 4 or (case.h // case.g, case.d) == (7, 128))
    assert tiles.interpolates == (slow and case.rank_k < 768 and dtype == torch.bfloat16)
    rule = choose_rebuild(dim=case.d, groups=case.g, size=2, gathered=False, limits=launch.limits)
    low = torch.zeros(B, 1, dtype=torch.long, device=gpu) if visible.first is None else visible.first[:, None]
    tokens = torch.arange(case.s, device=gpu)
    k = _keys(keys, table, tokens[None, None], low[..., None], None, torch.float32)
    grouped = queries[0].float().unflatten(1, (case.g, -1))
    wanted = torch.einsum("bgnd,bgtd->bgnt", grouped, k).flatten(1, 2) * launch.scale * split_lowrank._LOG2 + add
    hidden = (tokens < low)[:, None].expand_as(wanted)
    errors = []
    for rebuild in (None, rule):
        scores = launch.empty_scores(case.s).fill_(1.0 if add else torch.nan)
        launch.tuning = Tuning(rebuild=rebuild)
        launch.score_rebuilt(queries[0], keys, table, None, scores, add=add)
        assert (scores[hidden] == -torch.inf).all()
        errors.append((scores - wanted)[~hidden])
    ours, triton = errors
    assert ours.square().mean().sqrt() < 1.4 * triton.square().mean().sqrt()
    assert ours.abs().max() < 2 * triton.abs().max()


@pytest.mark.parametrize("case", [Case(), Case(budget=512, first=(0, 2000))], ids=str)
def test_graph_replay_while_the_tail_fills(gpu, case):
    """One capture serves every column, and reads and chooses by what is stored between replays."""
    queries, keys, values, table, visible, selection = arguments = call(case, gpu, torch.bfloat16)
    scale = case.d**-0.5

    def attend():
        return lowrank_decode(queries, keys, values, table, visible, scale=scale, selection=selection, kernel="triton")

    attend()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    for filled in (1, 2, 65, 199, 200):
        visible.column.fill_(case.s + filled - 1)
        for part in (*keys, *values):
            part.tail[:, :filled].normal_()
        queries[0].normal_()
        graph.replay()
        assert_close(found, exact(arguments, scale), torch.bfloat16)


def test_factors_of_more_than_2_31_elements(gpu):
    """The last rows of a batch of 5 GiB against only the last sequence."""
    case_rank, tokens, dim = 576, 1_300_000, 128
    if torch.cuda.mem_get_info(gpu)[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    a = torch.empty((3, tokens, case_rank), device=gpu, dtype=torch.bfloat16)
    a[2].normal_()
    b = torch.randn(3, dim, case_rank, device=gpu).bfloat16() / 24
    tail, q = torch.randn(3, 1, 1, dim, device=gpu).bfloat16(), torch.randn(3, 4, dim, device=gpu).bfloat16()
    a[:2].zero_()
    table = consecutive_table(Rope(), dim, torch.arange(tokens, device=gpu))
    visible = Visible(torch.tensor([tokens], device=gpu), None, None, False)

    def attend(rows: slice) -> torch.Tensor:
        part = Factored(a[rows], b[rows], tail[rows])
        return lowrank_decode([q[rows]], [part], [part], table, visible, scale=0.09, kernel="triton")[0]

    torch.testing.assert_close(attend(slice(0, 3))[2:], attend(slice(2, 3)), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "spec", ["xkv:group=2,ratio=2", "xkv:group=2,ratio=2,sinks=0", "streaming:ratio=2+xkv:group=2,ratio=2"]
)
def test_a_cache_of_many_tokens_is_read_at_their_positions(gpu, spec, batch, monkeypatch):
    """Behind sinks, and behind evicted tokens: each layer's step is what plain torch reads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 1024, "n_layers": 2, "n_heads": 8, "d_ff": 512, "max_seq_len": 20_000}
    model = build_decoder(ModelConfig(**sizes, kv={"preset": "gqa", "n_kv_heads": 2}))
    model.init_weights()
    model.to(gpu, torch.bfloat16).requires_grad_(False).eval()
    ids = torch.randint(512, (1, 19_000), device=gpu, generator=torch.Generator(gpu).manual_seed(1)).expand(batch, -1)
    calls, kernel = [], deferred.lowrank_decode

    def keep(queries, *words, **options):
        calls.append((queries, *words, options["selection"]))
        return kernel(queries, *words, **options)

    monkeypatch.setattr(deferred, "lowrank_decode", keep)
    cache = KVCache(model.config)
    model.prefill(ids[:, :-1], cache)
    model(ids[:, -1:], cache=compress_cache(cache, parse(spec)))
    assert len(calls) == 2
    for (q,), *arguments in calls:
        queries = [4 * q / q.float().std()]  # the first layers of a random model look at everything alike
        found = kernel(queries, *arguments[:-1], scale=128**-0.5, selection=None, kernel="triton")
        assert_close(found, exact((queries, *arguments), 128**-0.5), torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "xkv:group=4,energy=1.0",
        "xkv:group=4,energy=1.0,select=64,outliers=2",
        "shadowkv:rank=64,select=64,outliers=2,values=host",
    ],
)
@pytest.mark.parametrize("preset", ["mha", "cla", "fusedkv_lite"])
def test_replayed_steps_over_a_compressed_cache(gpu, preset, spec, compiled):
    """A captured step of a decoder gives the logits of a growing copy of its cache that plain torch reads."""
    prompt, length = 100, 120
    options = {"vocab_size": 512, "d_model": 512, "n_layers": 8, "n_heads": 8, "d_ff": 1024, "max_seq_len": 512}
    torch.manual_seed(0)
    model = build_decoder(ModelConfig(**options, kv={"preset": preset})).to(gpu).requires_grad_(False).eval()
    model.init_weights()
    ids = torch.randint(512, (2, length), device=gpu, generator=torch.Generator(gpu).manual_seed(1))
    cache = KVCache(model.config)
    with torch.no_grad():
        model.prefill(ids[:, :prompt], cache, starts=torch.tensor([0, 16], device=gpu))
        growing = compress_cache(cache, parse(spec))
        expected = torch.stack([model(ids[:, i : i + 1], cache=growing)[:, 0] for i in range(prompt, length)], 1)
        if compiled:
            model.compile_decoding()
        step = StepGraph(model, compress_cache(cache, parse(spec), room=length - prompt))
        found = torch.stack([step(ids[:, i]).clone() for i in range(prompt, length)], 1)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert step.is_valid
