"""Attention of one new token over low-rank factors and an exact tail, against the definition.

The definition multiplies the factors out, rotates keys with the function below, and computes a softmax in fp64 over the
tokens that each head sees. Free entries of the tail are NaN, so that a kernel which reads one fails.

Run as a program, this file tests the Triton kernels, interpreted on the CPU.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cllm.config import Rope
from cllm.errors import UserError
from cllm.kernels import gather, gluon_lowrank, hopper, resident_lowrank, split_lowrank
from cllm.kernels.choice import log_once
from cllm.kernels.decode import Visible
from cllm.kernels.gluon_lowrank import NODES, STRETCHES, TILE
from cllm.kernels.lowrank_decode import lowrank_decode
from cllm.kernels.lowrank_tiles import Choosing, Rebuild, Tuning, choose_choosing, choose_rebuild
from cllm.kernels.resident_lowrank import choose_resident, programs_per_pack, resident_tiles
from cllm.kernels.selection import Factored, Selection, Table, chosen_tokens
from cllm.kernels.split_decode import Limits
from cllm.model.rope import rope_frequencies, rope_table

B, SCALE = 2, 0.3


@dataclass(frozen=True)
class Case:
    """One call. `parts`: of keys and of values. `column`: of the new token, `s` + `t` - 1 by default."""

    s: int = 75
    t: int = 5
    d: int = 16
    h: int = 4
    g: int = 2
    rank: int = 11
    parts: tuple[int, int] = (1, 1)
    first: tuple[int, ...] | None = None
    column: int | None = None
    exclude_self: bool = False
    budget: int | None = None
    outliers: int = 2
    uncompressed: bool = False
    """Whether values are not in factors."""
    factor: float = 1.0
    """Factor on cosines and sines, as YaRN has."""

    @property
    def hides(self) -> bool:
        """Whether all that differs from the first case is what is visible, for which dtype and tiles do not matter."""
        plain = Case()
        return self != plain and plain == replace(
            self, s=plain.s, t=plain.t, first=None, column=None, exclude_self=False
        )

    def __str__(self) -> str:
        default = Case()
        changed = (f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name))
        return "-".join(changed).replace(" ", "") or "plain"


CHUNK = 4
CASES = [
    Case(),
    Case(g=4),
    Case(h=20, g=1),
    Case(h=40, g=1),
    Case(d=24, g=4),
    Case(rank=75, d=64),
    Case(rank=70, s=140, t=70),
    Case(t=1),
    Case(t=12, column=78),
    Case(first=(0, 33)),
    Case(first=(70, 77)),
    Case(factor=1.3, first=(0, 33)),
    Case(s=40, t=12, first=(43, 0)),
    Case(exclude_self=True, t=1),
    Case(parts=(2, 2), first=(5, 0)),
    Case(budget=20),
    Case(budget=20, g=4, first=(0, 33)),
    Case(budget=20, h=20, g=1, outliers=0),
    Case(budget=20, first=(70, 12), t=12, column=78),
    Case(budget=4, outliers=6),
    Case(uncompressed=True, g=4, first=(0, 33)),
    Case(uncompressed=True, d=24, budget=20, first=(0, 33)),
    Case(uncompressed=True, h=40, g=1, budget=20),
    Case(uncompressed=True, budget=20, first=(70, 77), t=12, column=82),
]


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000) -> torch.Tensor:
    """Keys (n, G, D) rotated by positions (n,): channel j and j + D/2 are a complex number."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)


def table(case: Case, dtype: torch.dtype) -> Table:
    """RoPE's table as the decoder makes it, or for fp64 one that is more exact."""
    if dtype == torch.float64:
        half = case.d // 2
        angles = torch.arange(case.s).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        return Table(angles.cos() * case.factor, angles.sin() * case.factor)
    cos, sin = rope_table(Rope(), case.d, torch.arange(case.s))
    return Table(cos[:, 0, 0] * case.factor, sin[:, 0, 1] * case.factor)


def call(case: Case, dtype: torch.dtype):
    """Arguments of `lowrank_decode`, and its results by the definition."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    column = case.s + case.t - 1 if case.column is None else case.column
    last = column - int(case.exclude_self)

    def part(uncompressed: bool) -> Factored:
        b = randn(B, case.g * case.d, case.rank) / case.rank**0.5
        tail = randn(B, case.t, case.g, case.d)
        tail[:, column + 1 - case.s :] = torch.nan
        if uncompressed:
            return Factored(randn(B, case.s, case.g * case.d), None, tail)
        return Factored(randn(B, case.s, case.rank), b.to(dtype), tail)

    queries = [randn(B, case.h, case.d) for _ in range(case.parts[0])]
    are = (False, case.uncompressed)
    keys, values = ([part(it_is) for _ in range(n)] for n, it_is in zip(case.parts, are, strict=True))
    first = torch.tensor(case.first or (0,) * B)

    def full(part: Factored, b: int) -> torch.Tensor:
        made = part.a[b].double() if part.b is None else part.a[b].double() @ part.b[b].double().T
        return made.unflatten(-1, (case.g, case.d))

    def turned(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rotated(keys, positions) * case.factor

    every_key = [
        [
            torch.cat((turned(full(k, b), (torch.arange(case.s) - first[b]).clamp(min=0)), k.tail[b].double()))
            for b in range(B)
        ]
        for k in keys
    ]
    every_value = [[torch.cat((full(v, b), v.tail[b].double())) for b in range(B)] for v in values]
    selection = None
    if case.budget is not None:
        selection = select(case, torch.stack(every_key[0])[:, : case.s], first, dtype)
        size = CHUNK * selection.outliers.shape[-1]
        for b in range(B):  # the definition's outliers are as exact as those that are stored
            for g in range(case.g):
                tokens = (selection.outliers[b, g][:, None] * CHUNK + torch.arange(CHUNK)).flatten()
                for i in range(size):
                    if tokens[i] < case.s:
                        every_key[0][b][tokens[i], g] = selection.outlier_keys[b, i, g].double()
    wanted = [torch.zeros(B, case.h, case.d, dtype=torch.float64) for _ in values]
    for b in range(B):
        for h in range(case.h):
            g = h // (case.h // case.g)
            seen = torch.arange(int(first[b]), last + 1)
            if selection is not None:
                tokens = read_by_hand(case, selection, queries[0].double(), first, b, g)
                seen = torch.cat((tokens, torch.arange(max(case.s, int(first[b])), last + 1)))
            if not len(seen):
                continue
            scores = SCALE * sum(k[b][seen, g] @ q[b, h].double() for q, k in zip(queries, every_key, strict=True))
            for result, v in zip(wanted, every_value, strict=True):
                result[b, h] = scores.softmax(0) @ v[b][seen, g]
    visible = Visible(torch.tensor([column]), None if case.first is None else first, None, case.exclude_self)
    return (queries, keys, values, table(case, dtype), visible), selection, wanted


def select(case: Case, keys: torch.Tensor, first: torch.Tensor, dtype: torch.dtype) -> Selection:
    """Landmarks of `keys` (B, S, G, D); outliers drawn, and keys of outliers that are not what the factors give."""
    generator = torch.Generator().manual_seed(1)
    chunks = -(-case.s // CHUNK)
    marks = torch.zeros(B, chunks, case.g, case.d)
    for b in range(B):
        for c in range(chunks):
            tokens = torch.arange(c * CHUNK, min((c + 1) * CHUNK, case.s))
            tokens = tokens[tokens >= first[b]]
            if len(tokens):
                marks[b, c] = keys[b, tokens].mean(0)
    outliers = torch.rand(B, case.g, chunks, generator=generator).argsort(-1)[..., : case.outliers]
    exact = torch.randn(B, case.outliers * CHUNK, case.g, case.d, generator=generator)
    return Selection(marks.to(dtype), outliers, exact.to(dtype), CHUNK, case.budget or 0)


def read_by_hand(case: Case, selection: Selection, q: torch.Tensor, first, b: int, g: int) -> torch.Tensor:
    """Compressed tokens that KV head g of sequence b reads."""
    heads = range(g * case.h // case.g, (g + 1) * case.h // case.g)
    marks = selection.landmarks[b, :, g].double()
    real = [c for c in range(len(marks)) if (c + 1) * CHUNK > first[b]]
    shares = torch.stack([(SCALE * marks[real] @ q[b, h]).softmax(0) for h in heads]).amax(0)
    outliers = set(selection.outliers[b, g].tolist())
    ranked = [real[i] for i in shares.argsort(descending=True).tolist() if real[i] not in outliers]
    chosen = sorted(outliers | set(ranked[: selection.budget // CHUNK]))
    tokens = torch.tensor([c * CHUNK + i for c in chosen for i in range(CHUNK)])
    return tokens[(tokens >= first[b]) & (tokens < case.s)]


def assert_close(found, wanted, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case, dtype):
    arguments, selection, wanted = call(case, dtype)
    found = lowrank_decode(*arguments, scale=SCALE, selection=selection, kernel="reference")
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("budget", [72, 76, 400])
@pytest.mark.parametrize("outliers", [0, 2])
def test_a_budget_of_all_tokens_reads_all(budget, outliers):
    case = Case(first=(0, 33), outliers=outliers)
    (queries, keys, values, tables, visible), _, wanted = call(case, torch.float64)
    made = (keys[0].a @ keys[0].b.mT).unflatten(-1, (case.g, case.d))
    first = torch.tensor(case.first)
    exact = torch.stack([rotated(made[b], (torch.arange(case.s) - first[b]).clamp(min=0)) for b in range(B)])
    selection = select(replace(case, budget=budget), exact, first, torch.float64)
    tokens = (selection.outliers[..., None] * CHUNK + torch.arange(CHUNK)).flatten(-2).clamp(max=case.s - 1)
    index = tokens.mT[..., None].expand(-1, -1, -1, case.d)
    selection = replace(selection, outlier_keys=exact.gather(1, index))
    found = lowrank_decode(queries, keys, values, tables, visible, scale=SCALE, selection=selection)
    chunks = -(-case.s // CHUNK)
    if budget // CHUNK + outliers >= chunks:
        assert_close(found, wanted, torch.float64)
    else:
        with pytest.raises(AssertionError, match="not close"):
            assert_close(found, wanted, torch.float64)


def test_autocast_changes_nothing():
    arguments, _, wanted = call(Case(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = lowrank_decode(*arguments, scale=SCALE)
    assert_close(found, wanted, torch.float32)


SELECTING = [
    Case(t=12, column=78, first=(0, 33)),
    Case(t=12, column=78, budget=20),
    Case(t=12, column=78, budget=20, uncompressed=True),
]


@pytest.mark.parametrize("case", SELECTING, ids=str)
def test_one_graph_whatever_the_column(case):
    """A compiled step has no graph break, and another column does not recompile."""
    torch._dynamo.reset()
    (queries, keys, values, tables, visible), selection, _ = call(case, torch.float32)
    for part in (*keys, *values):
        part.tail.nan_to_num_()

    def step(queries, keys, values, tables, visible, selection):
        found = lowrank_decode(queries, keys, values, tables, visible, scale=SCALE, selection=selection)
        return [x + 1 for x in found]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(queries, keys, values, tables, visible, selection)
    with torch._dynamo.config.patch(error_on_recompile=True):
        visible.column.add_(6)
        found = compiled(queries, keys, values, tables, visible, selection)
    for ours, wanted in zip(found, step(queries, keys, values, tables, visible, selection), strict=True):
        assert torch.equal(ours, wanted)
    torch._dynamo.reset()


@pytest.fixture
def no_interpreter(monkeypatch):
    """Triton without its interpreter, also where TRITON_INTERPRET=1 is set."""
    monkeypatch.setattr(split_lowrank.triton_decode, "INTERPRETED", False)


@pytest.mark.usefixtures("no_interpreter")
def test_the_choice_is_logged_once(caplog):
    log_once.cache_clear()
    arguments, _, _ = call(Case(), torch.float32)
    with caplog.at_level(logging.INFO, logger="cllm.kernels.choice"):
        for _ in range(3):
            lowrank_decode(*arguments, scale=SCALE)
    assert len(caplog.records) == 1
    assert "plain torch, because triton cannot: " in caplog.records[0].getMessage()
    assert caplog.records[0].levelno == logging.INFO


@pytest.mark.parametrize(("kernel", "message"), [("flash", "allowed: auto, triton, reference"), ("triton", "cannot: ")])
@pytest.mark.usefixtures("no_interpreter")
def test_a_kernel_that_cannot_is_refused(kernel, message):
    arguments, _, _ = call(Case(), torch.float32)
    with pytest.raises(UserError, match=message):
        lowrank_decode(*arguments, scale=SCALE, kernel=kernel)


def test_what_does_not_fit_is_refused():
    (queries, keys, values, tables, visible), selection, _ = call(Case(budget=20), torch.float32)
    rest = (tables, visible)
    with pytest.raises(ValueError, match="2 queries for 1 key parts"):
        lowrank_decode(queries * 2, keys, values, *rest, scale=SCALE)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        lowrank_decode([queries[0][:, :3]], keys, values, *rest, scale=SCALE)
    with pytest.raises(ValueError, match="a window of 7; allowed: none"):
        lowrank_decode(queries, keys, values, tables, replace(visible, window=7), scale=SCALE)
    with pytest.raises(ValueError, match="a selection for 2 key parts"):
        lowrank_decode(queries * 2, keys * 2, values, *rest, scale=SCALE, selection=selection)
    elsewhere = [replace(values[0], a=values[0].a.to("meta"), b=None)]
    with pytest.raises(ValueError, match="values on meta without a selection; allowed: with one"):
        lowrank_decode(queries, keys, elsewhere, *rest, scale=SCALE)


@pytest.mark.parametrize("shared", [227 * 1024, 163 * 1024, 99 * 1024])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dim", "groups"), [(64, 8), (80, 7), (96, 12), (128, 8), (128, 1), (256, 2)])
def test_tiles_fit_a_multiprocessor(shared, gathered, size, dim, groups):
    limits = Limits(shared=shared)
    rebuild = choose_rebuild(dim=dim, groups=groups, size=size, gathered=gathered, limits=limits)
    half = 1 << (dim // 2 - 1).bit_length()
    assert rebuild.shared(half, size) <= shared
    assert groups % rebuild.pack == 0
    assert rebuild.pack == 1 or not gathered
    accumulators = 2 * rebuild.block_n * rebuild.pack * half
    assert accumulators <= 128 * 32 * rebuild.num_warps  # half of the registers


@pytest.mark.parametrize("chunks", [4096, 8191, 8192, 32768])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_many_programs_choose_if_each_has_a_multiprocessor(chunks, rows):
    limits = Limits(processors=132)
    how = choose_choosing(chunks=chunks, rows=rows, limits=limits)
    assert isinstance(how, Choosing)
    programs = rows * -(-chunks // how.taken)
    assert 2 * rows <= programs <= limits.processors
    assert choose_choosing(chunks=4095, rows=rows, limits=limits) == "one program"
    assert choose_choosing(chunks=chunks, rows=34, limits=limits) == "one program"


@pytest.mark.parametrize(("dim", "heads", "rank"), [(128, 4, 384), (128, 1, 768), (64, 16, 1024), (128, 8, 40)])
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 3, 200])
@pytest.mark.parametrize("turn", [0.01, 0.1])
def test_resident_programs_fit_and_have_two_tiles_each(dim, heads, rank, groups, batch, turn):
    limits = Limits(processors=132, shared=227 * 1024)
    shape = {"dim": dim, "heads": heads, "rank": rank, "groups": groups, "batch": batch, "limits": limits, "turn": turn}
    how = choose_resident(tokens=100_000, **shape)
    assert how is not None
    assert how.shared(dim=dim, heads=heads, rank=rank) <= limits.shared
    assert groups % how.pack == 0
    programs = programs_per_pack(batch=batch, packs=groups // how.pack, limits=limits)
    assert programs == 1 or programs * batch * (groups // how.pack) <= limits.processors
    assert how.interpolates == (turn == 0.01 and heads in (4, 8) and how.pack == 2)
    if how.interpolates:
        assert choose_resident(tokens=programs * 2 * STRETCHES[0], **shape) == how
        shape["turn"] = 0.1
        assert choose_resident(tokens=programs * 2 * STRETCHES[0] - 1, **shape | {"turn": 0.01}) in (
            choose_resident(tokens=100_000, **shape),
            replace(how, pack=1, stages=16),
        )
        how = choose_resident(tokens=100_000, **shape)
        assert how is not None
        programs = programs_per_pack(batch=batch, packs=groups // how.pack, limits=limits)
    fewest = programs * 2 * TILE
    assert choose_resident(tokens=fewest, **shape) == how
    assert choose_resident(tokens=fewest - 1, **shape) in (None, replace(how, pack=1, stages=16))


@pytest.mark.parametrize(
    ("turn", "tokens", "stretch"),
    [
        (0.0101, 65536, 256),
        (0.005, 65536, 512),
        (0.0014, 65536, 1024),  # base 500,000: two stretches for each of 33 programs, of any length
        (0.0014, 33 * 1024, 1024),
        (0.0014, 33 * 1024 + 1, 256),  # longer stretches would give a program 2,048 or 1,536 tokens, these 1,280
        (0.0014, 33 * 3 * 512, 512),
        (0.0014, 33 * 512 - 1, TILE),
    ],
)
def test_stretches_are_as_long_as_programs_stay_equally_busy(turn, tokens, stretch):
    shape = {"dim": 128, "heads": 4, "rank": 384, "groups": 8, "batch": 1, "limits": Limits(132, 227 * 1024)}
    how = choose_resident(tokens=tokens, turn=turn, **shape)
    assert how is not None
    assert how.stretch == stretch
    alone = choose_resident(tokens=1000, turn=0.0014, **shape | {"batch": 200})
    assert alone is not None
    assert alone.stretch == 512, "the nodes of a longer one have rows of the table from 1,000 on"


@pytest.mark.parametrize(
    "changed",
    [{"dim": 96}, {"dim": 256}, {"rank": 383}, {"heads": 32}, {"rank": 1024}, {"limits": Limits(132, 99 * 1024)}],
)
def test_shapes_that_resident_programs_do_not_support(changed):
    limits = Limits(132, 227 * 1024)
    shape = {"dim": 128, "heads": 4, "rank": 384, "groups": 8, "batch": 1, "turn": 0.1, "limits": limits}
    assert choose_resident(tokens=65536, **shape) is not None
    assert choose_resident(tokens=65536, **(shape | changed)) is None


@pytest.mark.usefixtures("no_interpreter")
def test_tensors_that_resident_programs_support(monkeypatch):
    """Hopper, 16 bits, rows that TMA can address; everything else uses Triton's kernel."""
    limits, a, b = Limits(), torch.zeros(1, 20_000, 96).bfloat16(), torch.zeros(1, 512, 96).bfloat16()
    q, near = torch.zeros(1, 8, 128).bfloat16(), Table(torch.ones(20_000, 64), torch.zeros(20_000, 64), 0.01)
    assert resident_tiles(q, a, b, near, 4, limits) is None, "the tensors are on the CPU"
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "MISSING", None)
    assert resident_tiles(q, a, b, near, 4, limits) == choose_resident(
        dim=128, groups=4, heads=2, rank=96, tokens=20_000, batch=1, turn=0.01, limits=limits
    )
    half = [x.half() for x in (q, a, b)]
    assert resident_tiles(*half, near, 4, limits) == choose_resident(
        dim=128, groups=4, heads=2, rank=96, tokens=20_000, batch=1, turn=math.inf, limits=limits
    ), "fp16 is more exact than interpolation"
    gaps = replace(near, turn=None)
    assert resident_tiles(q, a, b, gaps, 4, limits) is None, "positions after eviction"
    assert resident_tiles(q.float(), a, b, near, 4, limits) is None
    assert resident_tiles(q, a.float(), b.float(), near, 4, limits) is None
    assert resident_tiles(q, a[..., :88], b[..., :88], near, 4, limits) is None, "rows that are not side by side"
    shifted = torch.zeros(1 + a.numel()).bfloat16()[1:].view_as(a)
    assert resident_tiles(q, shifted, b, near, 4, limits) is None, "an address that is no multiple of 16 bytes"
    monkeypatch.setattr(hopper, "MISSING", "Gluon of triton 9.9")
    assert resident_tiles(q, a, b, near, 4, limits) is None


def weights_of_nodes(stretch: int) -> torch.Tensor:
    """(stretch, 4) fp64: the weights of the kernel's interpolation, by its own code, with torch for Gluon."""
    gluon: Any = SimpleNamespace(
        SliceLayout=lambda *_: None, arange=lambda begin, end, layout: torch.arange(begin, end), where=torch.where
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_lowrank, "gl", gluon, raising=False)
        code = getattr(gluon_lowrank._weights, "fn", gluon_lowrank._weights)
        return torch.cat(code(torch.arange(stretch).double() * (STRETCHES[0] / stretch), None, 2), dim=1)


@pytest.mark.parametrize("stretch", STRETCHES)
def test_waves_are_interpolated(stretch):
    """Of any phase and all frequencies that are interpolated, to eight bits; two of them, and the nodes, exactly."""
    weights, nodes = weights_of_nodes(stretch), [node * stretch // STRETCHES[0] for node in NODES]
    torch.testing.assert_close(weights[nodes], torch.eye(4).double(), atol=1e-6, rtol=0)

    def error(turns: float) -> float:
        """The largest error of a wave that turns by `turns` radians in the stretch."""
        wave = torch.polar(torch.ones(stretch).double(), torch.arange(stretch).double() * turns / stretch)
        return (weights.to(wave.dtype) @ wave[nodes] - wave).abs().max().item()

    exact = [resident_lowrank._SLOW * math.sqrt((1 + sign * math.cos(math.pi / 4)) / 2) for sign in (1, -1)]
    assert max(map(error, exact)) < 1e-6
    errors = [error(resident_lowrank._SLOW * i / 100) for i in range(101)]
    assert 1e-3 < max(errors) < 2.2e-3
    assert error(1.3 * resident_lowrank._SLOW) > 4e-3


def interpreted_nodes() -> None:
    """Scores of the slower half of the channels, interpolated between the nodes, against the definition: with tables
    that begin at any position, have a factor, and end with the last token; with padding; and for two packs of heads."""
    generator = torch.Generator().manual_seed(3)
    for dim, heads, groups, pack, rank, start, factor, first, theta, stretch in (
        (64, 3, 2, 2, 40, 0, 1.0, None, 10_000, 256),
        (128, 4, 2, 1, 24, 5, 1.3, (0, 300), 10_000, 256),
        (128, 8, 4, 2, 136, 4, 1.0, (17, 0), 10_000, 256),
        (128, 4, 2, 2, 24, 4, 1.3, (0, 700), 40_000, 512),
        (128, 4, 2, 1, 40, 4, 1.0, (0, 1500), 500_000, 1024),
    ):
        tokens, half, rope, weights = stretch * 2 + 88, dim // 2, Rope(theta=theta), weights_of_nodes(stretch)
        q, a = (
            torch.randn(B, groups * heads, dim, generator=generator),
            torch.randn(B, tokens, rank, generator=generator),
        )
        b = torch.randn(B, groups * dim, rank, generator=generator) / rank**0.5
        cos, sin = rope_table(rope, dim, torch.arange(start, start + tokens))
        table = Table(cos[:, 0, 0] * factor, sin[:, 0, 1] * factor, float(rope_frequencies(rope, dim)[0][dim // 4]))
        tiles = resident_lowrank.ResidentTiles(pack=pack, stages=4, stretch=stretch)
        low = torch.tensor(first or (0,) * B)
        w = resident_lowrank.project_nodes(tiles, q, b, table, None if first is None else low, tokens, groups)
        room = max(4, 1 << (heads - 1).bit_length())
        assert w.shape == (B, groups // pack, -(-tokens // stretch), pack, 2, room, 2, rank)
        w = w.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(5, 6).flatten(1, 2)[:, :, :heads]  # B, G, heads, stretch, node, r
        mixed = torch.einsum("bghsnr,un->bghsur", w.double(), weights).flatten(3, 4)[:, :, :, :tokens]
        found = torch.einsum("btr,bghtr->bght", a.double(), mixed)
        keys = (a.double() @ b.double().mT).unflatten(-1, (groups, dim))
        is_slow = torch.arange(dim) % half >= half // 2
        for row in range(B):
            k = rotated(keys[row], torch.arange(tokens) - low[row] + start, theta) * factor * is_slow
            wanted = torch.einsum("ghd,tgd->ght", q[row].double().unflatten(0, (groups, heads)), k)
            errors = (found[row] - wanted)[..., low[row] :]
            assert errors.square().mean() < (1.5e-3 * wanted.std()) ** 2, (dim, heads, row, errors.abs().max())


def interpreted() -> None:
    """All cases, fp32 with two KV heads a program, and in turn fp16 with one or the default tiles. Uninitialised memory
    is NaN."""
    assert split_lowrank.triton_decode.INTERPRETED
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    split_lowrank.torch.empty = poisoned
    for n, case in enumerate(CASES):
        two = 2 if case.budget is None and case.g % 2 == 0 else 1
        for dtype, pack in ((torch.float32, two), (torch.float16, 1))[: 1 if case.hides or n % 2 else 2]:
            arguments, selection, wanted = call(case, dtype)
            queries, keys, values, tables, visible = arguments
            rebuild = Rebuild(block_n=32, block_r=16, pack=pack, num_warps=4, num_stages=2)
            found = split_lowrank.run(queries, keys, values, tables, visible, SCALE, selection, Tuning(rebuild=rebuild))
            try:
                assert found.isfinite().all()
                assert_close(found.split(case.d, dim=-1), wanted, dtype)
            except AssertionError as error:
                raise AssertionError(f"{case}, {dtype}, pack {pack}") from error
        if case.hides or n % 2 == 0:
            continue
        arguments, selection, wanted = call(case, torch.float32)
        parts = lowrank_decode(*arguments, scale=SCALE, selection=selection, kernel="triton")
        assert_close(parts, wanted, torch.float32)


def interpreted_gathering() -> None:
    """Values of chosen tokens that are gathered first give the same numbers as those that are read by their index."""
    for case in CASES:
        if not case.uncompressed or case.budget is None:
            continue
        (queries, _, values, _, visible), selection, _ = call(case, torch.float16)
        source = values[0].a.unflatten(2, (case.g, case.d))
        source[0, : (case.first or (0,))[0]] = torch.nan
        launch = split_lowrank._Call(queries, case.g, visible, SCALE)
        index = split_lowrank._choose(launch, queries[0], selection)
        rows = gather.run(source, index, visible.first)
        wanted = gather.gather_rows(source, index, visible.first)
        assert rows.isfinite().all()
        assert torch.equal(rows, wanted)
        for b in range(B):
            for g in range(case.g):
                for row, token in zip(rows[b, :, g], index[b, g].tolist(), strict=True):
                    exists = (case.first or (0,) * B)[b] <= token < case.s
                    assert torch.equal(row, source[b, token, g] if exists else torch.zeros_like(row))
        scores = launch.empty_scores(index.shape[2]).normal_(generator=torch.Generator().manual_seed(4))
        for b in range(B):
            hidden = (index[b] < (case.first or (0,) * B)[b]) | (index[b] >= case.s)
            scores[b].unflatten(0, (case.g, -1)).masked_fill_(hidden[:, None], -torch.inf)
        read = launch.sum_rows(scores, values[0], index, None), launch.sum_rows(scores, values[0], index, rows)
        for one, other in zip(*read, strict=True):
            seen = launch.sum_rows(scores, values[0], index, None)[1].isfinite()  # the others are undefined
            assert torch.equal(one[seen], other[seen])


def interpreted_choice() -> None:
    """Chunks chosen by many programs and by one, against `topk`, and with equal chunks against a stable sort."""
    generator = torch.Generator().manual_seed(2)
    many, one = Choosing(landmarks=32, ordered=64, taken=64), Choosing(ordered=512, taken=512)
    cases = (
        (150, 3, 3, 40, 0, many),
        (77, 1, 0, 1, 50, many),
        (40, 2, 5, 35, 0, one),
        (40, 3, 2, 9, 0, "one program"),
        (150, 3, 3, 75, 0, many),  # two searches that end at the upper one of two points
    )
    for chunks, heads, outliers, count, first, how in cases:
        always = torch.rand(1, 2, chunks, generator=generator).argsort(-1)[..., :outliers]
        exact = torch.zeros(1, outliers * CHUNK, 2, 16)
        visible = Visible(torch.tensor([chunks * CHUNK]), torch.tensor([first * CHUNK]), None, False)
        for equal in (False, True):
            marks = torch.randn(1, chunks, 2, 16, generator=generator)
            q = torch.randn(1, 2 * heads, 16, generator=generator)
            if equal:  # four different landmarks, so that the bound lies among equal ones; their scores are exact
                marks = marks[:, torch.randint(4, (chunks,), generator=generator)].round()
                q = q.round()
            selection = Selection(marks, always, exact, CHUNK, count * CHUNK)
            call = split_lowrank._Call([q], 2, visible, 0.25, Tuning(choosing=how))
            found = split_lowrank._choose(call, q, selection)
            scores = torch.einsum("bgnd,bcgd->bgnc", q.unflatten(1, (2, heads)), marks) * 0.25
            scores[..., :first] = -torch.inf
            if equal:
                order = scores.log_softmax(-1).amax(2).scatter(-1, always, -torch.inf).mul(1e4).round()
                best = order.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
                wanted = (torch.cat((always, best), -1)[..., None] * CHUNK + torch.arange(CHUNK)).flatten(-2)
            else:
                wanted = chosen_tokens(scores.flatten(1, 2), selection)
            assert torch.equal(found, wanted), (chunks, heads, outliers, count, equal, how)


def test_triton_kernels_interpreted_are_the_definition(run_interpreted):
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreted_gathering()
    interpreted_choice()
    interpreted_nodes()
    interpreted()
