"""Variants of the kernel that decodes tied slots, each checked and timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.kernels.checked import Checked, fastest, print_row
from benchmarks.kernels.decoding import Decode, unpacked
from benchmarks.kernels.table import Table
from benchmarks.record import Row
from cllm.kernels import split_decode
from cllm.kernels.decode import rotation_of
from cllm.kernels.split_decode import AnyTiles
from cllm.kernels.split_tied import TiedTiles

CASE = Decode(name="tied, 4 x 16 heads", latent=True, rope=True)
MORE = (
    Decode(name="tied, 4 x 32 heads of 64", h=32, g=32, d=(64,), e=(64,), latent=True, rope=True),
    Decode(name="tied, 4 x 8 heads of 256", h=8, g=8, d=(256,), e=(256,), latent=True, rope=True),
    Decode(name="tied, float8, 4 x 16 heads", latent=True, rope=True, float8=True),
    Decode(name="tied, 1 x 16 heads, 4096 tokens", b=1, s=4096, live=4096, latent=True, rope=True),
    Decode(name="tied, 1 x 16 heads, 131072 tokens", b=1, s=131072, live=131072, latent=True, rope=True),
)
"""Cases for which only the tiles by rule are timed, and the kernel with matrix products."""
FORMS = ((4, 4, 3), (4, 4, 4), (2, 4, 4), (8, 4, 3), (4, 2, 3), (4, 1, 4))
"""Of CASE: parts, warps and stages; each is timed with several numbers of splits."""
FORMS_OF_TWO = ((4, 4, 3), (2, 4, 3), (4, 2, 3))
"""Of TWO_HEADS."""
TWO_HEADS = Decode(name="tied, 4 x 16 heads, 32 queries", h=32, latent=True, rope=True)
SPLITS = (4, 6, 8, 10, 12, 16, 24, 32)
"""Of programs of four warps; with fewer warps there are as many more."""


def _rules(call: Checked) -> dict[str, AnyTiles]:
    """Tiles by rule: of the kernel that rotates keys and multiplies matrices, and of the one that is chosen."""
    k, k_scales, v, v_scales = unpacked(*call.sets[0])
    rotation = rotation_of(call.sets[0][0])
    return {
        "matrix products": split_decode.tiles_for(call.queries, k, v, None, rotation)[0],
        "by rule": split_decode.best_tiles(call.queries, k, k_scales, v, v_scales, None, rotation),
    }


def _tiles(parts: int, warps: int, stages: int) -> TiedTiles:
    return TiedTiles(splits=1, parts=parts, num_warps=warps, num_stages=stages)


def _name(tiles: TiedTiles) -> str:
    return f"parts {tiles.parts}, warps {tiles.num_warps}, stages {tiles.num_stages}"


def _by_rule(call: Checked, table: Table, copy: float) -> None:
    for name, tiles in _rules(call).items():
        print_row(call.measure(table, copy, name, tiles))


def bench_tied(table: Table, copy: float) -> None:
    """Check and time every variant of `CASE` and `TWO_HEADS`, and the tiles by rule for `MORE`; `copy`: bytes/s.

    Of each variant the fastest number of splits is printed; the file has all of them.
    """
    for case, forms in ((CASE, FORMS), (TWO_HEADS, FORMS_OF_TWO)):
        call = Checked("tied", case)
        best = [_best_splits(call, table, copy, _tiles(*form)) for form in forms]
        _by_rule(call, table, copy)  # last: what is timed first on an idle GPU is slower
        print(f"tied      fastest: {min(best, key=lambda row: row['ms'])['name']}", flush=True)
        del call
        torch.cuda.empty_cache()
    for case in MORE:
        call = Checked("tied", case)
        _by_rule(call, table, copy)
        del call
        torch.cuda.empty_cache()


def _best_splits(call: Checked, table: Table, copy: float, variant: TiedTiles) -> Row:
    """The row of the fastest number of splits, printed."""
    each = (replace(variant, splits=splits * 4 // variant.num_warps) for splits in SPLITS)
    best = fastest(call.measure(table, copy, f"{_name(tiles)}, splits {tiles.splits}", tiles) for tiles in each)
    print_row(best)
    return best
