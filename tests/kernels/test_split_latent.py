"""Which calls the kernel of latents for Hopper GPUs computes, and its splits. `tests/gpu` checks its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm.kernels import hopper, split_decode, split_latent, triton_decode
from cllm.kernels.limits import Limits
from cllm.kernels.split_decode import Tiles
from cllm.kernels.split_latent import LatentTiles

Parts = tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor], list[Tensor | None]]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a Hopper GPU, with Gluon."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "MISSING", None)
    monkeypatch.setattr(triton_decode, "INTERPRETED", False)


def parts(
    rank: int = 512, rope: int = 64, heads: int = 16, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Parts:
    """Queries, keys, their scales, values and their scales."""
    slots = [torch.zeros(2, 100, groups, width, dtype=dtype) for width in (rank, rope)]
    queries = [torch.zeros(2, heads, width, dtype=dtype) for width in (rank, rope)]
    return queries, slots, [None, None], slots[:1], [None]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("shape", [{}, {"heads": 1}, {"heads": 13}, {"dtype": torch.float16}])
def test_latents_that_it_computes(shape: dict[str, Any]) -> None:
    assert split_latent.supports(*parts(**shape), ())
    assert split_decode.best_tiles(*parts(**shape), None) == LatentTiles(splits=2)
    assert split_decode.best_tiles(*parts(**shape), 64) == LatentTiles(splits=1), "a window of one tile"


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    "shape", [{"heads": 17}, {"rank": 256}, {"rope": 32}, {"groups": 2}, {"dtype": torch.float32}], ids=str
)
def test_other_shapes_use_the_kernel_for_every_gpu(shape: dict[str, Any]) -> None:
    assert not split_latent.supports(*parts(**shape), ())
    assert isinstance(split_decode.best_tiles(*parts(**shape), None), Tiles)


@pytest.mark.usefixtures("on_hopper")
def test_other_calls_use_the_kernel_for_every_gpu() -> None:
    """TMA needs addresses that are multiples of 16 bytes, and rows side by side."""
    queries, keys, none, values, no_scale = parts()
    latent, rope = keys
    scales = torch.ones(2, 100, 1)
    shifted = torch.zeros(1 + latent.numel(), dtype=latent.dtype)[1:].view_as(latent)
    gaps = torch.zeros(2, 200, 1, 512, dtype=latent.dtype)[:, ::2]
    for other in (
        (queries, keys, none, [latent.clone()], no_scale),
        (queries, keys, none, [rope], no_scale),
        (queries, keys, none, [latent, rope], [None, None]),
        (queries, keys, [scales, None], values, [scales]),
        (queries, [shifted, rope], none, [shifted], no_scale),
        (queries, [gaps, rope], none, [gaps], no_scale),
        ([queries[0].half(), queries[1]], keys, none, values, no_scale),
        (queries[:1], keys[:1], none[:1], values, no_scale),
    ):
        assert not split_latent.supports(*other, ())
    assert not split_latent.supports(queries, keys, none, values, no_scale, (1,)), "a key before RoPE"
    assert split_latent.supports(queries, keys, none, values, no_scale, ())


@pytest.mark.parametrize(
    ("what", "name", "value"),
    [
        (hopper, "_is_hopper", lambda device: False),
        (hopper, "MISSING", "Gluon of triton 9.9"),
        (triton_decode, "INTERPRETED", True),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
@pytest.mark.usefixtures("on_hopper")
def test_other_devices_and_versions_use_the_kernel_for_every_gpu(
    what: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(what, name, value)
    assert not split_latent.supports(*parts(), ())


def test_tiles_of_a_latent_are_refused_for_other_calls() -> None:
    queries, keys, none, values, no_scale = parts(rank=256)
    rule = (torch.tensor([3]), None, None, False, 1.0, LatentTiles(splits=1))
    with pytest.raises(ValueError, match=r"tiles of a latent are for a latent of 512 [+] 64 channels"):
        split_decode.run(queries, keys, none, values, no_scale, *rule)


def test_a_program_fits_into_shared_memory() -> None:
    assert split_latent.shared_bytes() <= Limits().shared


@pytest.mark.parametrize("batch", [1, 3, 4, 9, 16, 66, 100, 133, 500])
@pytest.mark.parametrize("columns", [1, 64, 1024, 30_000, 131_072])
def test_splits_fill_half_of_the_device(batch: int, columns: int) -> None:
    splits = split_latent.choose_tiles(batch=batch, columns=columns, limits=Limits()).splits
    tiles = -(-columns // split_latent.TILE)
    assert 1 <= splits <= min(tiles, 256)
    assert batch * splits >= 0.48 * Limits().processors or -(-tiles // splits) <= 2


FASTEST = {
    (1, 64): 1, (1, 256): 4, (1, 1024): 16, (1, 4096): 32, (1, 32_768): 64, (1, 131_072): 128, (4, 2048): 16,
    (4, 8192): 32, (4, 32_000): 32, (4, 32_768): 32, (8, 32_768): 16, (16, 8192): 8, (32, 4096): 4,
    (64, 2048): 2, (200, 2048): 1,
}  # fmt: skip
"""The fastest number of splits that was measured on an H200, for sequences and tokens."""


@pytest.mark.parametrize(("batch", "columns"), FASTEST)
def test_splits_of_measured_lengths_are_the_fastest(batch: int, columns: int) -> None:
    tiles = split_latent.choose_tiles(batch=batch, columns=columns, limits=Limits())
    assert tiles.splits == FASTEST[batch, columns]
