"""The Triton decode kernels against plain torch on a GPU, at real shapes.

Entries that the new token does not see hold NaN. fp32 queries take products of fp32 precision, so that there a single
column of thousands that is lost, or counted twice, shows; in half precision the first and the last visible column
carry values as large as all others together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from cllm.config import Rope
from cllm.kernels import hopper, split_decode, triton_decode
from cllm.kernels.decode import Stored, Visible, decode_attention, decode_attention_reference, rotation_of
from cllm.kernels.split_decode import AnyTiles
from cllm.kernels.split_latent import LatentTiles
from cllm.kernels.split_tied import TiedTiles
from cllm.model.rope import rope_table

pytestmark = pytest.mark.skipif(triton_decode.MISSING is not None, reason=f"no triton: {triton_decode.MISSING}")
B = 3


@dataclass(frozen=True)
class Case:
    """One call. `alias`: the first value part is the first key part. `rope`: that key part is stored before RoPE."""

    d: tuple[int, ...] = (128,)
    e: tuple[int, ...] = (128,)
    h: int = 16
    g: int = 4
    s: int = 3000
    column: int = 2500
    first: tuple[int, ...] | None = None
    window: int | None = None
    exclude_self: bool = False
    alias: bool = False
    rope: bool = False

    def __str__(self) -> str:
        default = Case()
        changed = (f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name))
        return "-".join(changed).replace(" ", "") or "plain"


LATENT = {"d": (512, 64), "e": (512,), "g": 1, "alias": True}
TIED = {"alias": True, "rope": True}
CASES = [
    Case(),
    Case(g=16),
    Case(h=32, g=1),
    Case(h=40, g=1),
    Case(h=128, g=1),
    Case(d=(64,), e=(64,)),
    Case(d=(80,), e=(80,)),
    Case(d=(96,), e=(96,), g=16),
    Case(d=(192,), e=(128,), g=16),
    Case(d=(256,), e=(256,)),
    Case(d=(576,), e=(512,), g=1),
    Case(d=(128, 128), e=(128, 128)),
    Case(d=(128, 128), e=(128, 128), g=16),
    Case(d=(256, 256), e=(256, 256)),
    Case(d=(128, 128, 128), e=(128, 128, 128)),
    Case(**LATENT),
    Case(**LATENT, h=32),
    Case(**LATENT, h=64),
    Case(**LATENT, h=128),
    Case(d=(128, 64), e=(128,), h=64, alias=True),
    Case(column=7000),
    Case(column=7000, exclude_self=True, first=(0, 6999, 5000)),
    Case(column=7000, window=700),
    Case(window=100, exclude_self=True, first=(0, 2450, 2500)),
    Case(**LATENT, column=7000, first=(0, 6990, 7001)),
    Case(**LATENT, column=7000, window=700, exclude_self=True),
    Case(**LATENT, column=7000, exclude_self=True, h=1),
    Case(**LATENT, column=2500, first=(0, 2499, 1), window=2000, h=13),
    Case(**LATENT, s=64, column=1000),
    Case(**LATENT, s=1, column=9),
    Case(**LATENT, column=0, exclude_self=True),
    Case(**LATENT, s=30000, column=29999),
    Case(column=0),
    Case(column=0, exclude_self=True),
    Case(s=1, column=9),
    Case(s=131072, column=1000),
    Case(**TIED),
    Case(**TIED, g=16, column=7000),
    Case(**TIED, g=16, column=7000, first=(0, 6999, 5000)),
    Case(**TIED, column=7000, window=700, exclude_self=True),
    Case(**TIED, d=(96,), e=(96,)),
    Case(**TIED, d=(64,), e=(64,), g=16, column=7000, window=700, exclude_self=True),
    Case(**TIED, d=(256,), e=(256,), g=16, first=(0, 5, 2500)),
    Case(**TIED, d=(80,), e=(80,), g=16),
    Case(**TIED, g=8, column=7000, first=(0, 6999, 5000)),
    Case(**TIED, g=16, column=0),
    Case(**TIED, g=16, s=131072, column=1000),
    Case(**TIED, d=(256,), e=(256,)),
    Case(**TIED, d=(512,), e=(512,), h=8, g=1),
    Case(**TIED, d=(128, 128), e=(128, 128), g=16),
]


def quantized(x: torch.Tensor) -> Stored:
    scale = x.float().abs().amax(-1) / 448
    return Stored((x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale)


def table(case: Case, column: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of every entry's position, which counts from the row's first token."""
    columns = column - (column - torch.arange(case.s, device=device)) % case.s
    first = torch.tensor(case.first or (0,), device=device)[:, None]
    return rope_table(Rope(), case.d[0], (columns - first).clamp(min=0))


def call(case: Case, device, dtype, float8: bool = False):
    """Arguments of `decode_attention`."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    column = case.column
    columns = column - (column - torch.arange(case.s, device=device)) % case.s  # the column of each entry
    oldest = max(0, column + 1 - min(case.window or case.s, case.s))
    first = torch.tensor(case.first or (0,) * B, device=device).clamp(min=oldest)[:, None]
    last = column - int(case.exclude_self)
    seen = (columns >= first) & (columns <= last)  # B, S
    edge = seen & ((columns == first) | (columns == last))

    def stored(width: int, heavy: bool) -> Stored:
        x = randn(B, case.s, case.g, width)
        if heavy:
            x = torch.where(edge[:, :, None, None], x * seen.sum(1).to(dtype)[:, None, None, None], x)
        ring = quantized(x) if float8 else Stored(x)
        ring.data.view(torch.uint8 if float8 else x.dtype)[~seen] = 127 if float8 else float("nan")  # 127: NaN in e4m3
        if ring.scale is not None:
            ring.scale[~seen] = float("nan")
        return ring

    queries = [randn(B, case.h, d) for d in case.d]
    keys = [stored(d, False) for d in case.d]
    values = [keys[0], *(stored(e, True) for e in case.e[1:])] if case.alias else [stored(e, True) for e in case.e]
    if case.rope:
        keys[0] = replace(keys[0], rope=table(case, column, device))
    visible = Visible(
        torch.tensor([column], device=device),
        None if case.first is None else torch.tensor(case.first, device=device),
        case.window,
        case.exclude_self,
    )
    return queries, keys, values, visible


def scale_of(case: Case) -> float:
    return sum(case.d) ** -0.5


def assert_close(found, wanted, dtype) -> None:
    """Half precision rounds the probabilities and the result, fp32 products are three of TF32."""
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        relative = 1e-5 if dtype == torch.float32 else 2**-6 if dtype == torch.bfloat16 else 2**-9
        error, largest = (ours.float() - exact.float()).abs().max(), exact.float().abs().max()
        assert error <= relative * largest + 1e-6, f"error {error:.2e}, largest {largest:.2e}"


def check(case: Case, device, dtype, float8: bool = False, tiles: AnyTiles | None = None, **run) -> None:
    queries, keys, values, visible = arguments = call(case, device, dtype, float8)
    exact = [q.float() for q in queries]
    wanted = decode_attention_reference(exact, keys, values, visible, scale=scale_of(case))
    if not run and tiles is None:
        found = decode_attention(*arguments, scale=scale_of(case), kernel="triton")
    else:
        form = tiles or split_decode.Tiles(num_warps=4, num_stages=3, **run)
        parts = ([x.data for x in keys], [x.scale for x in keys], [x.data for x in values], [x.scale for x in values])
        rule = (visible.column, visible.first, visible.window, visible.exclude_self)
        rotation = rotation_of(keys)
        result = split_decode.run(queries, *parts, *rule, scale_of(case), form, rotation=rotation)
        found = result.split(list(case.e), dim=-1)
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(gpu, case, dtype):
    check(case, gpu, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if sum(c.d) <= 256], ids=str)
def test_every_column_counts_once(gpu, case):
    check(case, gpu, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float8(gpu, case):
    if torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    check(case, gpu, torch.bfloat16, float8=True)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c.h == c.g and not c.rope], ids=str)
def test_elementwise_form(gpu, case, float8):
    check(case, gpu, torch.bfloat16, float8, block_n=32, splits=7, elementwise=True)


@pytest.mark.parametrize("splits", [1, 33])
@pytest.mark.parametrize(
    "tiles",
    [
        TiedTiles(splits=1),
        TiedTiles(splits=1, parts=8),
        TiedTiles(splits=1, parts=2, num_warps=1),
        TiedTiles(splits=1, num_warps=2, num_stages=4),
    ],
    ids=lambda tiles: f"{tiles.parts}-{tiles.num_warps}-{tiles.num_stages}",
)
@pytest.mark.parametrize("case", [c for c in CASES if c.h <= 2 * c.g and c.rope and len(c.d) == 1], ids=str)
def test_tied_form(gpu, case, tiles, splits):
    """In bf16, whose two numbers of one register are taken apart, and in fp8."""
    for float8 in (False, torch.cuda.get_device_capability(gpu) >= (8, 9)):
        check(case, gpu, torch.bfloat16, float8, replace(tiles, splits=splits))


@pytest.mark.parametrize("splits", [1, 2, 33, 132])
@pytest.mark.parametrize("case", [c for c in CASES if c.d == (512, 64) and c.h <= 16], ids=str)
def test_latent_form(gpu, case, splits):
    """By the kernel for Hopper, which is the one that the rule chooses, and with other numbers of splits."""
    if not hopper.is_usable(gpu):
        pytest.skip("needs a Hopper GPU and Gluon")
    queries, keys, values, visible = call(case, gpu, torch.bfloat16)
    parts = ([x.data for x in keys], [x.scale for x in keys], [x.data for x in values], [x.scale for x in values])
    assert isinstance(split_decode.best_tiles(queries, *parts, visible.window), LatentTiles)
    for dtype in (torch.bfloat16, torch.float16):
        check(case, gpu, dtype, tiles=LatentTiles(splits=splits))


@pytest.mark.parametrize("case", [c for c in CASES if c.d == (512, 64)], ids=str)
def test_latent_by_the_kernel_for_every_gpu(gpu, case):
    check(case, gpu, torch.bfloat16, block_n=32, splits=7)


@pytest.mark.parametrize("splits", [1, 2, 33, 256])
@pytest.mark.parametrize("block_n", [16, 64])
def test_any_number_of_splits(gpu, splits, block_n):
    check(Case(column=7000, first=(0, 6999, 5000)), gpu, torch.float32, block_n=block_n, splits=splits)


@pytest.mark.parametrize(
    "case", [Case(s=300), Case(**LATENT, s=300), Case(s=300, window=37), Case(**TIED, s=300, g=16)], ids=str
)
def test_graph_replay_while_the_column_grows(gpu, case):
    """One capture serves every length, also after the ring wraps, and reads what is stored between replays."""
    queries, keys, values, visible = call(case, gpu, torch.bfloat16)
    parts = list(dict.fromkeys(x.data for x in (*keys, *values)))
    for tensor in parts:
        tensor.normal_()
    visible.column.zero_()
    decode_attention(queries, keys, values, visible, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(queries, keys, values, visible, scale=0.1)
    exact = [q.float() for q in queries]
    for column in (0, 1, 63, 64, 65, 298, 299, 300, 301, 777):
        visible.column.fill_(column)
        if case.rope and keys[0].rope is not None:
            for old, new in zip(keys[0].rope, table(case, column, gpu), strict=True):
                old.copy_(new)
        for tensor in parts:
            tensor[:, column % case.s].normal_()
        graph.replay()
        assert_close(found, decode_attention_reference(exact, keys, values, visible, scale=0.1), torch.bfloat16)


def test_compiled_once_without_graph_breaks(gpu):
    """One graph with work around the kernel; another column neither recompiles nor syncs."""
    torch._dynamo.reset()
    case = Case(**LATENT)

    def step(queries, keys, values, visible):
        scaled = [q * 2 for q in queries]
        return [x + 1 for x in decode_attention(scaled, keys, values, visible, scale=scale_of(case))]

    compiled = torch.compile(step, fullgraph=True)
    arguments = call(case, gpu, torch.bfloat16)
    compiled(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            arguments[3].column.sub_(7)
            found = compiled(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    queries, keys, values, visible = arguments
    exact = [q.float() * 2 for q in queries]
    wanted = decode_attention_reference(exact, keys, values, visible, scale=scale_of(case))
    assert_close(found, [x + 1 for x in wanted], torch.bfloat16)
    torch._dynamo.reset()


def test_caches_of_more_than_2_31_elements(gpu):
    """The last 1000 columns of 4 GiB in a ring that has wrapped, against a copy of only these columns."""
    groups, dim, window = 16, 128, 1000
    length = 2**31 // (groups * dim) + 500
    if torch.cuda.mem_get_info(gpu)[0] < 3 * 2**31:
        pytest.skip("needs 6 GiB of free memory")
    cache = torch.empty((1, length, groups, dim), device=gpu, dtype=torch.bfloat16)
    cache[:, -2000:].normal_()
    cache[:, :100].normal_()
    recent = torch.cat((cache[:, length - window + 100 :], cache[:, :100]), dim=1)
    queries = [torch.randn(1, groups, dim, device=gpu, dtype=torch.bfloat16)]

    def attend(data: torch.Tensor, column: int):
        visible = Visible(torch.tensor([column], device=gpu), None, window, False)
        return decode_attention(queries, [Stored(data)], [Stored(data)], visible, scale=0.1, kernel="triton")

    assert torch.equal(attend(cache, length + 99)[0], attend(recent, window - 1)[0])
