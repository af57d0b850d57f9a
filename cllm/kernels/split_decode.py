"""Launches the Triton kernels of `triton_decode`: supported calls, tiles, splits, and the launch.

Shapes: B batch, S entries, H query heads, G KV heads, D and E channels of a key and value part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels import split_latent, split_tied, triton_decode
from cllm.kernels.chunks import Chunk, argument, channels, chunks_of, key_chunk_of, out_starts
from cllm.kernels.limits import Limits, balanced_splits, device_limits, next_power_of_2
from cllm.kernels.split_call import SplitCall
from cllm.kernels.split_latent import LatentTiles
from cllm.kernels.split_tied import TiedTiles

FLOAT8 = torch.float8_e4m3fn
MAX_WIDTH = 640
"""Maximum channels of all key parts together, and of all value parts: queries and accumulators are in registers."""
MAX_WIDTH_FP32 = 256
"""Maximum for fp32 data or queries, whose products take three passes and more registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How one call is divided among programs."""

    block_n: int
    """Columns of a tile, a power of two, at least 16."""
    splits: int
    """Programs that share the columns of one sequence and KV head."""
    num_warps: int
    num_stages: int
    """Tiles in shared memory: one in use, the others being loaded."""
    elementwise: bool = False
    """Multiply and add in fp32 instead of tensor-core products; only for one query head for each KV head."""


AnyTiles = Tiles | TiedTiles | LatentTiles
"""Tiles of one of the kernels that `run` launches."""


class Rotation(NamedTuple):
    """RoPE of keys that are stored before it."""

    cos: Tensor
    """(B or 1, S, P) fp32 for each entry, channels contiguous; P is half of the channels of a head."""
    sin: Tensor
    """The same shape, strides and dtype."""
    parts: tuple[int, ...]
    """The key parts that are stored before RoPE."""


def _halved(
    rotation: Rotation | None, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Collection[int], Collection[int]]:
    """The key parts and the value parts that are cut into the two halves of RoPE's pairs."""
    if rotation is None:
        return (), ()
    return rotation.parts, [i for i, v in enumerate(values) if any(v.is_set_to(keys[part]) for part in rotation.parts)]


def unsupported(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    rotation: Rotation | None = None,
) -> str | None:
    """The reason why the kernels do not support this call, or None."""
    if obstacle := triton_decode.device_obstacle(queries[0]):
        return obstacle
    device, stored = queries[0].device, [*keys, *values]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if capability < (8, 9) and any(t.dtype == FLOAT8 for t in stored):
        return "float8 needs compute capability 8.9 or newer"
    known = (torch.bfloat16, torch.float16, torch.float32)
    for tensor in (*queries, *(t for t in stored if t.dtype != FLOAT8), *(t for t in scales if t is not None)):
        if tensor.dtype not in known:
            return f"does not compute {str(tensor.dtype).removeprefix('torch.')}"
    if any(t.stride(-1) != 1 for t in (*queries, *stored)):
        return "the channels of a tensor are not contiguous"
    most = MAX_WIDTH_FP32 if any(t.dtype == torch.float32 for t in (*queries, *stored)) else MAX_WIDTH
    for what, parts, halved in zip(("keys", "values"), (keys, values), _halved(rotation, keys, values), strict=True):
        if (width := sum(chunk.block for chunk in chunks_of(parts, halved))) > most:
            return f"{what} of {width} channels in all parts; at most {most}"
    limits = device_limits(device)
    if (needed := tiles_for(queries, keys, values, None, rotation)[1]) > limits.shared:
        return f"needs {needed} bytes of shared memory; the device has {limits.shared}"
    return None


def _token_size(keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[int, int]:
    """Channels and bytes of one token and KV head. Tensors that are both keys and values count once."""
    only_values = [v for v in values if not any(v.is_set_to(k) for k in keys)]
    widths = [(t.shape[-1], t.element_size()) for t in (*keys, *only_values)]
    return sum(width for width, _ in widths), sum(width * size for width, size in widths)


def head_block(heads: int) -> int:
    """Query heads of one program, for `heads` that read one KV head: at least 16, for matrix products, at most 64."""
    return min(64, max(16, next_power_of_2(heads)))


@functools.cache
def choose_tiles(
    *,
    groups: int,
    heads: int,
    row: tuple[int, int],
    columns: int,
    widths: tuple[int, int],
    limits: Limits,
    rotates: bool = False,
) -> tuple[Tiles, int]:
    """Tiles and splits by rule, without autotuning, and the bytes of shared memory that a program needs.

    - A tile has about 16384 numbers, 32 KiB in bf16, in two buffers. There are enough programs to keep about 96 KiB in
      flight in each multiprocessor: three times bandwidth times latency (4.8 TB/s x 0.8 µs = 29 KiB for each one of an
      H200). With one query head for each KV head and many programs, tiles are twice as long, which makes merging
      cheaper (238 µs instead of 244 for 4 sequences x 16 heads x 32k).
    - fp8 with one query head for each KV head does not use matrix products: converting their operands takes longer
      than multiplying (181 µs instead of 275 for the same shape).
    - Outputs of more than 16 x 256 numbers need the registers of 8 warps. If keys are rotated, so do outputs of more
      than 16 x 128, fp8 and fp32: with 4 warps 16 x 256 spill 424 bytes a thread, compiled for an H100.
    - The smallest number of splits that fills waves of programs to 90 %, so that all programs finish together; at most
      as many as tiles.

    Args:
        groups: programs for each split: sequences x KV heads x blocks of query heads.
        heads: query heads of one KV head.
        row: stored channels and bytes of one token and KV head.
        columns: maximum number of columns that a token can see.
        widths: channels of all key parts, and of all value parts.
        limits: resources of the device.
        rotates: keys are rotated, which needs matrix products, and registers for the angles of a tile: shorter tiles
            or 8 warps.
    """
    channels, size = row
    block_h, stages = head_block(heads), 3

    def shared(block_n: int) -> int:
        """Bytes of tiles in flight, queries, and reductions. Products of 64 rows need one more tile."""
        return (stages - (block_h < 64)) * block_n * size + block_h * widths[0] * 2 + 4096

    many = heads == 1 and channels <= 256 and size >= 2 * channels and groups >= 64 and columns >= 16384
    long = 2 if many and not rotates else 1
    numbers = 8192 if rotates and channels > 256 else 16384 * long
    block_n = 2 ** round(math.log2(min(numbers / channels, 2 * numbers / size)))
    block_n = max(16, min(block_n, 64 * long, next_power_of_2(columns)))
    while block_n > 16 and shared(block_n) > limits.shared:
        block_n //= 2
    wanted = round(98304 / (block_n * size))
    slots = limits.processors * max(1, min(wanted, 6, limits.shared // shared(block_n)))
    most = max(1, min(-(-columns // block_n), 2 * slots // groups, 256))

    splits = balanced_splits(groups, slots, most)
    wide = widths[1] * block_h > 16 * (128 if rotates else 256)
    warps = 8 if wide or (rotates and size != 2 * channels) else 4
    elementwise = heads == 1 and size < 2 * channels and not rotates
    tiles = Tiles(block_n=block_n, splits=splits, num_warps=warps, num_stages=stages, elementwise=elementwise)
    return tiles, shared(block_n)


def tiles_for(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    window: int | None,
    rotation: Rotation | None = None,
) -> tuple[Tiles, int]:
    """`choose_tiles` for the arguments of `run`."""
    batch, n_heads = queries[0].shape[:2]
    length, groups = keys[0].shape[1:3]
    heads = n_heads // groups
    return choose_tiles(
        groups=batch * groups * -(-heads // head_block(heads)),
        heads=heads,
        row=_token_size(keys, values),
        columns=min(length, window or length),
        widths=(sum(k.shape[-1] for k in keys), sum(v.shape[-1] for v in values)),
        limits=device_limits(queries[0].device),
        rotates=rotation is not None,
    )


def best_tiles(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    window: int | None,
    rotation: Rotation | None = None,
) -> AnyTiles:
    """Tiles by rule for the arguments of `run`: of the kernel of tied slots or of latents, if one computes the call."""
    arguments = (queries, keys, key_scales, values, value_scales, () if rotation is None else rotation.parts)
    batch, length, groups, dim = keys[0].shape
    columns, limits = min(length, window or length), device_limits(queries[0].device)
    if split_tied.supports(*arguments):
        size = keys[0].element_size()
        return split_tied.choose_tiles(groups=batch * groups, dim=dim, size=size, columns=columns, limits=limits)
    if split_latent.supports(*arguments):
        return split_latent.choose_tiles(batch=batch, columns=columns, limits=limits)
    return tiles_for(queries, keys, values, window, rotation)[0]


def run(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    column: Tensor,
    first: Tensor | None,
    window: int | None,
    exclude_self: bool,
    scale: float,
    tiles: AnyTiles | None = None,
    log_sum: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Compute `cllm.kernels.decode.decode_attention` for a call that is supported (see `unsupported`).

    Args:
        tiles: by default those of `best_tiles`.
        log_sum: (B, H) fp32, contiguous: receives the log-sum-exp of the scores, to base 2; or None.
        rotation: of keys that are stored before RoPE, or None.

    Returns:
        (B, H, sum of E): the value parts side by side; fp32 with `log_sum`.
    """
    batch, n_heads = queries[0].shape[:2]
    length, groups = keys[0].shape[1:3]
    heads = n_heads // groups
    arguments = (queries, keys, key_scales, values, value_scales)
    rotated = () if rotation is None else rotation.parts
    if tiles is None:
        tiles = best_tiles(*arguments, window, rotation)
    elif isinstance(tiles, TiedTiles):
        if not split_tied.supports(*arguments, rotated):
            raise ValueError(
                "tiles of tied slots are for one key part before RoPE that is the value, and few query heads"
            )
    elif isinstance(tiles, LatentTiles):
        if not split_latent.supports(*arguments, rotated):
            raise ValueError("tiles of a latent are for a latent of 512 + 64 channels and few query heads, on Hopper")
    elif tiles.elementwise and heads > 1:
        raise ValueError(f"elementwise tiles are for one query head a KV head, not {heads}")
    elif tiles.elementwise and rotation is not None:
        raise ValueError("elementwise tiles do not rotate keys")
    width = sum(v.shape[-1] for v in values)
    out = queries[0].new_empty((batch, n_heads, width), dtype=queries[0].dtype if log_sum is None else torch.float32)
    call = SplitCall(
        column=column,
        first=first,
        length=length,
        window=min(length, window or length),
        exclude_self=exclude_self,
        log2_scale=scale * math.log2(math.e),
        partial=torch.empty((batch, n_heads, tiles.splits, width), dtype=torch.float32, device=out.device),
        log_sums=torch.empty((batch, n_heads, tiles.splits), dtype=torch.float32, device=out.device),
    )
    if isinstance(tiles, TiedTiles):
        assert rotation is not None
        split_tied.launch(tiles, queries[0], keys[0], key_scales[0], rotation.cos, rotation.sin, call)
    elif isinstance(tiles, LatentTiles):
        split_latent.launch(tiles, queries, keys, call)
    else:
        _launch(tiles, *arguments, rotation, call)
    _merge_splits(call.partial, call.log_sums, out, log_sum)
    return out


def _merge_splits(partial: Tensor, log_sums: Tensor, out: Tensor, log_sum: Tensor | None) -> None:
    """Write the results of all splits together, `out` (B, H, E) and `log_sum` (B, H) fp32 to base 2, or None.

    Args:
        partial: (B, H, splits, E) fp32; uninitialised for an empty split.
        log_sums: (B, H, splits) fp32 to base 2; -inf for an empty split.
    """
    batch, n_heads, splits, width = partial.shape
    block, every = min(128, max(16, next_power_of_2(width))), next_power_of_2(splits)
    triton_decode.merge[(batch * n_heads, -(-width // block))](
        partial, log_sums, out, log_sum, splits, OUT_WIDTH=width, ALL=every, CHUNK=min(every, 32), BLOCK=block
    )


def _launch(
    tiles: Tiles,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    rotation: Rotation | None,
    call: SplitCall,
) -> None:
    """Write the results of all splits."""
    batch, n_heads = queries[0].shape[:2]
    groups = keys[0].shape[2]
    heads = n_heads // groups
    halved = _halved(rotation, keys, values)
    key_chunks, value_chunks = chunks_of(keys, halved[0]), chunks_of(values, halved[1])
    constants: dict[str, Any] = {
        "G": groups,
        "WIDTHS": tuple(chunk.width for chunk in key_chunks),
        "BLOCKS": tuple(chunk.block for chunk in key_chunks),
        "K_SCALED": tuple(key_scales[chunk.part] is not None for chunk in key_chunks),
        "OUT_WIDTHS": tuple(chunk.width for chunk in value_chunks),
        "OUT_BLOCKS": tuple(chunk.block for chunk in value_chunks),
        "OUT_STARTS": out_starts(value_chunks, values),
        "OUT_WIDTH": call.partial.shape[-1],
        "V_FROM": key_chunk_of(value_chunks, values, value_scales, key_chunks, keys, key_scales),
        "V_SCALED": tuple(value_scales[chunk.part] is not None for chunk in value_chunks),
        "EXCLUDE_SELF": call.exclude_self,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
    }
    parts = (
        tuple((channels(queries, chunk), queries[chunk.part].stride()[:2]) for chunk in key_chunks),
        tuple(argument(chunk, keys, key_scales) for chunk in key_chunks),
        tuple(argument(chunk, values, value_scales) for chunk in value_chunks),
    )
    if tiles.elementwise:
        triton_decode.split_elementwise[(batch * groups, tiles.splits)](*parts, *call.arguments, **constants)
    else:
        block_h = head_block(heads)
        turns, turned = _turns(rotation, batch, key_chunks)
        k_types = tuple(_product_type(queries[c.part], keys[c.part], queries[c.part].dtype) for c in key_chunks)
        v_types = tuple(_product_type(queries[0], values[c.part], torch.bfloat16) for c in value_chunks)
        triton_decode.split_dot[(batch * groups * -(-heads // block_h), tiles.splits)](
            *parts,
            *turns,
            *call.arguments,
            **constants,
            **turned,
            HEADS=heads,
            BLOCK_H=block_h,
            K_TYPES=k_types,
            V_TYPES=v_types,
        )


def _turns(rotation: Rotation | None, batch: int, chunks: Sequence[Chunk]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tables and their strides (B, S), and the constants of `split_dot` that say which chunks are rotated."""
    if rotation is None:
        names = ("TURN_STARTS", "TURN_WIDTHS", "TURN_BLOCKS")
        return (None, None, (0, 0)), {"TURN_OF": (-1,) * len(chunks), **dict.fromkeys(names, ())}
    cos, sin, parts = rotation
    pairs = cos.shape[-1]
    upper = [chunk.part in parts and chunk.start >= pairs for chunk in chunks]
    turns = {chunk.start: chunk for chunk, is_upper in zip(chunks, upper, strict=True) if is_upper}  # of all parts
    places = list(turns)
    of = [places.index(c.start) if is_upper else -1 for c, is_upper in zip(chunks, upper, strict=True)]
    of = [-2 if turn < 0 and chunk.part in parts else turn for chunk, turn in zip(chunks, of, strict=True)]
    constants = {
        "TURN_OF": tuple(of),
        "TURN_STARTS": tuple(start - pairs for start in places),
        "TURN_WIDTHS": tuple(chunk.width for chunk in turns.values()),
        "TURN_BLOCKS": tuple(chunk.block for chunk in turns.values()),
    }
    return (cos, sin, cos.expand(batch, -1, -1).stride()[:2]), constants


def _product_type(query: Tensor, stored: Tensor, float8: torch.dtype) -> Any:
    """The type of a matrix product: the wider of the two; for float8 data it is `float8`, or fp32 for fp32 queries.

    For values `float8` is bf16, because probabilities times scales can leave the range of fp16.
    """
    if stored.dtype == FLOAT8:
        return triton_decode.TYPES[torch.float32 if query.dtype == torch.float32 else float8]
    return triton_decode.TYPES[torch.promote_types(query.dtype, stored.dtype)]
