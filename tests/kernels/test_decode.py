"""Attention of one new token over a ring of cached entries, against the definition over the entire history.

The definition does not use the ring: it keeps every column that was ever stored, selects those that the new token sees
and computes a softmax in fp64. Entries that were never written are NaN, so that a kernel which reads one fails.

Run as a program, this file tests the Triton kernels, interpreted on the CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch

from cllm.errors import UserError
from cllm.kernels import split_decode, split_tied
from cllm.kernels.choice import log_once, uses_triton
from cllm.kernels.chunks import chunks_of
from cllm.kernels.decode import Stored, Visible, decode_attention, decode_attention_lse, rotation_of
from cllm.kernels.joint import DecodePart, joint_decode
from cllm.kernels.split_decode import Limits, Tiles, choose_tiles
from cllm.kernels.split_tied import TiedTiles

SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """One call. `alias`: the first value part is the first key part. `common`: all heads have the last key part.

    `rope`: as many key parts are stored before RoPE."""

    d: tuple[int, ...] = (16,)
    e: tuple[int, ...] = (16,)
    h: int = 4
    g: int = 2
    s: int = 40
    column: int = 29
    first: tuple[int, ...] | None = None
    window: int | None = None
    exclude_self: bool = False
    alias: bool = False
    common: bool = False
    float8: bool = False
    rope: int = 0

    @property
    def rows(self) -> int:
        """Sequences: one for each of `first`."""
        return 2 if self.first is None else len(self.first)

    @property
    def hides(self) -> bool:
        """Whether all that differs from the first case is what is visible, for which the dtype does not matter."""
        plain = Case()
        return self != plain and plain == replace(
            self, s=plain.s, column=plain.column, first=None, window=None, exclude_self=False
        )

    def __str__(self) -> str:
        default = Case()
        changed = (f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name))
        return "-".join(changed).replace(" ", "") or "plain"


CASES = [
    Case(),
    Case(g=4),
    Case(h=20, g=1),
    Case(d=(8,), e=(5,)),
    Case(d=(24,), e=(80,)),
    Case(column=0),
    Case(column=39),
    Case(column=40),
    Case(column=101),
    Case(column=101, exclude_self=True),
    Case(column=101, window=7),
    Case(column=83, window=7, exclude_self=True),
    Case(column=101, window=40),
    Case(column=101, first=(0, 90, 64)),
    Case(first=(0, 5, 29)),
    Case(first=(29, 30, -4), exclude_self=True),
    Case(first=(20, 26, 3), window=7, exclude_self=True),
    Case(column=0, exclude_self=True),
    Case(window=1, exclude_self=True),
    Case(s=1, column=6),
    Case(s=1, column=6, exclude_self=True),
    Case(d=(16, 16), e=(16, 16)),
    Case(d=(16, 16), e=(16, 16), g=4, column=101),
    Case(d=(16, 8, 24), e=(8, 16, 24), column=55),
    Case(d=(32, 16), e=(32,), g=1, alias=True),
    Case(d=(48, 16), e=(48,), g=1, alias=True, column=55, first=(0, 54, 60)),
    Case(d=(16, 16), e=(16,), h=8, g=4, alias=True, common=True, column=55, first=(0, 54, 60)),
    Case(float8=True, column=55),
    Case(d=(16, 16), e=(16, 16), g=4, float8=True),
    Case(d=(32, 16), e=(32,), h=17, g=1, alias=True, float8=True),
    Case(d=(32,), e=(32,), alias=True, rope=1),
    Case(d=(32,), e=(32,), g=4, alias=True, rope=1, column=101, first=(0, 90, 64)),
    Case(d=(32,), e=(32,), alias=True, rope=1, column=83, window=20, exclude_self=True),
    Case(d=(32,), e=(24,), rope=1, column=55),  # keys alone are read
    Case(d=(24, 24, 8), e=(24, 24, 24), alias=True, rope=2, column=55, first=(0, 5, 29)),
    Case(d=(32,), e=(32,), alias=True, rope=1, float8=True, g=4, column=55),
    # Tied slots with one query head for each KV head: full and partial tiles, padding, windows, and a ring that wraps.
    Case(d=(32,), e=(32,), h=2, s=200, column=190, alias=True, rope=1),
    Case(d=(32,), e=(32,), h=2, s=200, column=33201, first=(33100, 33180, 0), alias=True, rope=1),
    Case(d=(64,), e=(64,), h=2, s=150, column=400, window=131, exclude_self=True, alias=True, rope=1),
    Case(d=(48,), e=(48,), h=3, g=3, column=0, alias=True, rope=1),
    Case(d=(16,), e=(16,), h=2, column=0, exclude_self=True, alias=True, rope=1),
    Case(d=(6,), e=(6,), h=2, s=17, column=70001, window=16, alias=True, rope=1),
    Case(d=(256,), e=(256,), h=1, g=1, s=30, alias=True, rope=1),
    Case(d=(32,), e=(32,), h=2, s=90, column=55, first=(0, 40), alias=True, rope=1, float8=True),
    # Positions above 2^15, odd sizes of heads, and several query heads for each KV head.
    Case(d=(34,), e=(34,), h=10, s=48, alias=True, rope=1, column=33001, first=(0, 32990)),
    Case(d=(10,), e=(10,), h=9, g=3, s=17, alias=True, rope=1, column=70001, window=16),
    Case(d=(6, 6), e=(6, 6), h=5, g=1, alias=True, rope=1, column=40000, first=(39990, 5)),
    Case(d=(24,), e=(24,), h=12, g=4, s=48, column=33001, window=5),
]


def quantized(x: torch.Tensor) -> Stored:
    scale = x.abs().amax(-1) / 448
    return Stored((x / scale[..., None]).to(torch.float8_e4m3fn), scale)


def turns(case: Case, width: int) -> torch.Tensor:
    """(rows, columns, width / 2) complex: 1.25 exp(i angle) of RoPE, whose positions count from a row's first token.

    The factor is one as yarn has. Rounded to single precision.
    """
    first = torch.tensor(case.first or (0,) * case.rows)[:, None, None]
    angles = (torch.arange(case.column + 1)[:, None] - first) * 10.0 ** -(torch.arange(width // 2).double() / width * 2)
    return torch.polar(torch.full_like(angles, 1.25), angles).to(torch.complex64)


def rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`x` (rows, columns, G, width) whose channels j and j + width / 2 are the complex numbers that are multiplied."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * turns.to(torch.complex128)[:, :, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def call(case: Case, dtype: torch.dtype):
    """Arguments of `decode_attention`, and its results by the definition."""
    generator = torch.Generator().manual_seed(0)

    def history(width: int, common: bool = False) -> tuple[Stored, torch.Tensor]:
        """The ring, and all numbers (rows, columns, G, width) stored in it, once for all heads if `common`."""
        heads = 1 if common else case.g
        every = torch.randn(case.rows, case.column + 1, heads, width, generator=generator).to(dtype)
        stored = quantized(every.float()) if case.float8 else Stored(every)
        ring: list[torch.Tensor | None] = []
        for tensor in (stored.data, stored.scale):
            if tensor is None:
                ring.append(None)
                continue
            target = torch.full((case.rows, case.s, *tensor.shape[2:]), float("nan")).to(tensor.dtype)
            for c in range(max(0, case.column + 1 - case.s), case.column + 1):
                target[:, c % case.s] = tensor[:, c]
            ring.append(target)
        exact = stored.data.double() if stored.scale is None else stored.data.double() * stored.scale[..., None]
        if common:
            ring = [t if t is None else t.expand(-1, -1, case.g, *t.shape[3:]) for t in ring]
            exact = exact.expand(-1, -1, case.g, -1)
        return Stored(*ring), exact

    def before_rope(stored: Stored, exact: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        """The same ring as keys that have to be rotated, with a table for its entries; and all keys, rotated."""
        every = turns(case, exact.shape[-1])
        ring = torch.zeros(case.rows, case.s, every.shape[-1], dtype=every.dtype)
        for c in range(max(0, case.column + 1 - case.s), case.column + 1):
            ring[:, c % case.s] = every[:, c]
        cos, sin = (t[:, :, None, None] for t in (ring.real, ring.imag))
        rope = torch.cat((cos, cos), dim=3), torch.cat((-sin, sin), dim=3)
        return replace(stored, rope=rope), rotated(exact, every)

    queries = [torch.randn(case.rows, case.h, d, generator=generator).to(dtype) for d in case.d]
    keys = [history(d, case.common and n == len(case.d) - 1) for n, d in enumerate(case.d)]
    values = [keys[0], *(history(e) for e in case.e[1:])] if case.alias else [history(e) for e in case.e]
    keys = [before_rope(*key) if n < case.rope else key for n, key in enumerate(keys)]
    first = None if case.first is None else torch.tensor(case.first)
    visible = Visible(torch.tensor([case.column]), first, case.window, case.exclude_self)
    wanted = [torch.zeros(case.rows, case.h, e, dtype=torch.float64) for e in case.e]
    for b in range(case.rows):
        oldest = max(0, case.column - case.s + 1, case.column + 1 - (case.window or case.s))
        oldest = max(oldest, case.first[b] if case.first else 0)
        seen = slice(oldest, case.column + (not case.exclude_self))
        for h in range(case.h):
            g = h // (case.h // case.g)
            pairs = zip(queries, keys, strict=True)
            scores = SCALE * sum(exact[b, seen, g] @ q[b, h].double() for q, (_, exact) in pairs)
            assert isinstance(scores, torch.Tensor)
            for result, (_, exact) in zip(wanted, values, strict=True):
                result[b, h] = scores.softmax(0) @ exact[b, seen, g]
    return (queries, [k for k, _ in keys], [v for v, _ in values], visible), wanted


def assert_close(found, wanted, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case, dtype):
    arguments, wanted = call(case, dtype)
    assert_close(decode_attention(*arguments, scale=SCALE, kernel="reference"), wanted, dtype)


def test_strided_caches():
    """Slots may be slices of a larger cache."""
    (queries, [key], [value], visible), wanted = call(Case(), torch.float32)
    both = torch.stack((key.data, value.data), dim=2).flatten(2, 3)  # B, S, 2G, D
    arguments = (queries, [Stored(both[:, :, :2])], [Stored(both[:, :, 2:])], visible)
    assert_close(decode_attention(*arguments, scale=SCALE), wanted, torch.float32)


def test_autocast_changes_nothing():
    arguments, wanted = call(Case(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_attention(*arguments, scale=SCALE)
    assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize(
    "case", [Case(first=(0, 5, 29)), Case(d=(32, 16), e=(32,), g=1, alias=True, float8=True)], ids=str
)
def test_one_graph_whatever_the_column(case):
    """A compiled step has no graph break, and another column does not recompile."""
    torch._dynamo.reset()

    def step(queries, keys, values, visible):
        return [x + 1 for x in decode_attention(queries, keys, values, visible, scale=SCALE)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    queries, keys, values, visible = call(case, torch.float32)[0]
    compiled(queries, keys, values, visible)
    with torch._dynamo.config.patch(error_on_recompile=True):
        visible.column.sub_(11)
        found = compiled(queries, keys, values, visible)
    for ours, wanted in zip(found, step(queries, keys, values, visible), strict=True):
        assert torch.equal(ours, wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [Case(first=(0, 5, 29)), Case(d=(32, 16), e=(32,), g=1, alias=True)], ids=str)
def test_operator_passes_torch_opcheck(case):
    queries, keys, values, visible = call(case, torch.float32)[0]
    parts = ([x.data for x in keys], [x.scale for x in keys], [x.data for x in values], [x.scale for x in values])
    rule = (visible.column, visible.first, visible.window, visible.exclude_self)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.cllm.decode_attention.default, (queries, *parts, *rule, SCALE, "auto"), test_utils=checks
    )


def test_the_choice_is_logged_once(caplog):
    log_once.cache_clear()
    arguments, _ = call(Case(), torch.float32)
    with caplog.at_level(logging.INFO, logger="cllm.kernels.choice"):
        for _ in range(3):
            decode_attention(*arguments, scale=SCALE)
    assert len(caplog.records) == 1
    assert "plain torch, because triton cannot: " in caplog.records[0].getMessage()
    assert caplog.records[0].levelno == logging.INFO


def test_plain_torch_on_a_gpu_is_a_warning_once(caplog):
    log_once.cache_clear()
    for _ in range(2):
        assert not uses_triton("decode_attention", "auto", lambda: "too wide", on_gpu=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "decode_attention: plain torch, because triton cannot: too wide (slow)"


@pytest.mark.parametrize(("kernel", "message"), [("flash", "allowed: auto, triton, reference"), ("triton", "cannot: ")])
def test_a_kernel_that_cannot_is_refused(kernel, message):
    arguments, _ = call(Case(), torch.float32)
    with pytest.raises(UserError, match=message):
        decode_attention(*arguments, scale=SCALE, kernel=kernel)


def test_parts_and_heads_must_fit():
    queries, keys, values, visible = call(Case(), torch.float32)[0]
    with pytest.raises(ValueError, match="2 queries for 1 key parts"):
        decode_attention(queries * 2, keys, values, visible, scale=SCALE)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        decode_attention([queries[0][:, :3]], keys, values, visible, scale=SCALE)


def test_head_dimensions_are_cut_into_powers_of_two():
    def cut(width: int):
        return [(c.start, c.width, c.block) for c in chunks_of([torch.empty(width)])]

    assert cut(128) == [(0, 128, 128)]
    assert cut(576) == [(0, 512, 512), (512, 64, 64)]
    assert cut(192) == [(0, 128, 128), (128, 64, 64)]
    assert cut(80) == [(0, 64, 64), (64, 16, 16)]
    assert cut(112) == [(0, 64, 64), (64, 48, 64)]
    assert cut(8) == [(0, 8, 16)]


@pytest.mark.parametrize("groups", [1, 16, 64, 100, 300, 1024])
@pytest.mark.parametrize("columns", [1, 1024, 32768])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_tiles_fit_and_fill_the_device(groups, columns, width):
    limits = Limits()
    tiles, shared = choose_tiles(
        groups=groups, heads=1, row=(2 * width, 4 * width), columns=columns, widths=(width, width), limits=limits
    )
    assert shared <= limits.shared
    assert tiles.splits <= -(-columns // tiles.block_n)
    programs = groups * tiles.splits
    per_processor = -(-programs // limits.processors)
    balance = programs / (limits.processors * per_processor)
    assert balance > 0.65 or tiles.splits in (-(-columns // tiles.block_n), 256)


@pytest.mark.parametrize("groups", [1, 16, 64, 100, 300, 1024])
@pytest.mark.parametrize("columns", [1, 1024, 32768])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles_of_tied_slots_fill_the_device(groups, columns, dim):
    tiles = split_tied.choose_tiles(groups=groups, dim=dim, size=2, columns=columns, limits=Limits())
    most = -(-columns // (tiles.parts * tiles.rows(dim)))
    assert tiles.splits <= most
    programs = groups * tiles.splits
    per_processor = -(-programs // Limits().processors)
    assert programs / (Limits().processors * per_processor) > 0.65 or tiles.splits in (most, 256)
    assert tiles.parts == 1 or programs >= Limits().processors


def test_tied_tiles_are_for_tied_slots():
    """One key part before RoPE that is also the value, with at most two query heads for each KV head."""
    tied = Case(d=(32,), e=(32,), g=4, alias=True, rope=1)
    chosen = {}
    for case in (
        tied,
        replace(tied, float8=True),
        replace(tied, g=1),
        replace(tied, alias=False),
        replace(tied, rope=0),
        replace(tied, d=(32, 32), e=(32, 32), rope=2),
        replace(tied, d=(258,), e=(258,)),
    ):
        (queries, keys, values, visible), _ = call(case, torch.float32)
        parts = [[getattr(x, name) for x in part] for part in (keys, values) for name in ("data", "scale")]
        chosen[case] = isinstance(split_decode.best_tiles(queries, *parts, None, rotation_of(keys)), TiedTiles)
        if not chosen[case]:
            rule = (visible.column, None, None, False, SCALE, TiedTiles(splits=1))
            with pytest.raises(ValueError, match="tiles of tied slots are for one key part"):
                split_decode.run(queries, *parts, *rule, None, rotation_of(keys))
    assert list(chosen.values()) == [True, True, False, False, False, False, False]
    (queries, (key,), (value,), _), _ = call(replace(tied, g=2), torch.float32)
    two_heads = ([key.data], [None], [value.data], [None])
    assert split_tied.supports(queries, *two_heads, (0,))
    assert isinstance(split_decode.best_tiles(queries, *two_heads, None, rotation_of([key])), TiedTiles)
    (queries, (key,), (value,), _), _ = call(replace(tied, g=1), torch.float32)
    four_heads = ([key.data], [None], [value.data], [None])
    assert not split_tied.supports(queries, *four_heads, (0,))
    assert isinstance(split_decode.best_tiles(queries, *four_heads, None, rotation_of([key])), Tiles)


def all_tiles(case: Case, dtype: torch.dtype, turn: int) -> list[Tiles | TiedTiles]:
    """Tiles of every form of the kernel that computes a case, with empty, full and partial splits. Of the forms for
    tied slots in fp32 there are two, by `turn`."""
    each = (1, 3) if dtype == torch.float32 else (3,)
    forms = (False, True) if case.h == case.g and not case.rope else (False,)
    tiles: list[Tiles | TiedTiles] = [
        Tiles(block_n=16, splits=splits, num_warps=4, num_stages=2, elementwise=form)
        for form in forms
        for splits in each
    ]
    if case.h <= 2 * case.g and case.rope and case.alias and len(case.d) == 1:
        tied = TiedTiles(splits=3, num_warps=1, parts=2)
        if dtype != torch.float32:
            return [*tiles, tied]
        splits_and_parts = ((1, 1), (3, 4), (3, 3), (1, 8))
        tiles += [replace(tied, splits=n, parts=parts) for n, parts in splits_and_parts[turn % 2 :: 2]]
    return tiles


def interpreted() -> None:
    """Every case, by every kernel that computes it."""
    assert split_decode.triton_decode.INTERPRETED
    for turn, case in enumerate(CASES):
        if len(case.d) == 3:
            continue  # three parts add nothing to two parts with chunks
        for dtype in (torch.float32, torch.float16):
            if dtype == torch.float16 and (case.hides or case.float8):
                continue  # fp8 takes its second product in bf16, which the interpreter multiplies as integers
            (queries, keys, values, visible), wanted = call(case, dtype)
            rotation = rotation_of(keys)
            k, v = ([x.data for x in part] for part in (keys, values))
            k_scales, v_scales = ([x.scale for x in part] for part in (keys, values))
            rule = (visible.column, visible.first, visible.window, visible.exclude_self, SCALE)
            for tiles in all_tiles(case, dtype, turn):
                out = split_decode.run(queries, k, k_scales, v, v_scales, *rule, tiles, rotation=rotation)
                try:
                    assert_close(out.split(list(case.e), dim=-1), wanted, dtype)
                except AssertionError as error:
                    raise AssertionError(f"{case}, {dtype}, {tiles}") from error
    arguments, wanted = call(Case(column=55), torch.float32)
    assert_close(decode_attention(*arguments, scale=SCALE, kernel="triton"), wanted, torch.float32)
    tied = Case(d=(32,), e=(32,), alias=True, rope=1, column=101)
    for case in (Case(column=55), Case(g=4, first=(20, 26, 3), window=7), Case(column=0, exclude_self=True), tied):
        arguments, wanted = call(case, torch.float32)
        results, lse = decode_attention_lse(*arguments, scale=SCALE, kernel="triton")
        assert_close(results, wanted, torch.float32)
        torch.testing.assert_close(lse, decode_attention_lse(*arguments, scale=SCALE)[1], atol=1e-4, rtol=1e-4)
    joined = [Case(d=(10,), e=(10,), h=6, s=17, column=33001), Case(d=(10,), e=(10,), h=6, g=3, column=33001, window=5)]
    calls = [call(replace(case, alias=True, rope=n), torch.float32)[0] for n, case in enumerate(joined)]
    query, sink = calls[0][0][0], torch.linspace(-1, 1, 6)
    for parts in (calls, calls[:1], calls[1:]):
        slots = [DecodePart(key, value, visible) for _, (key,), (value,), visible in parts]
        found = joint_decode(query, slots, sink, scale=SCALE, kernel="triton")
        wanted = joint_decode(query.double(), slots, sink, scale=SCALE, kernel="reference")
        assert_close([found], [wanted], torch.float32)


def test_triton_kernels_interpreted_are_the_definition(run_interpreted):
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreted()
