"""Without a GPU: every Triton kernel compiles, as its launcher launches it, to machine code for real GPUs.

Another process gives Triton a device that does not exist, and stops each launch after compiling. These tests check that
the compiler accepts the kernels, that they fit, and how many registers spill. The interpreter's tests check results.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICES = {80: (108, 163 * 1024), 90: (132, 227 * 1024)}
"""Multiprocessors, and bytes of shared memory of one program at most: A100; H100 and H200."""
SPILLED = {"3.6": {80: 144, 90: 0}, "3.7": {80: 128, 90: 0}}
"""Bytes a thread at most, by Triton's version: an A100 keeps operands of matrix products in registers, and has too few
to rebuild keys."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("capability", DEVICES)
def test_kernels_compile_and_fit(capability: int, warm_executable: Path) -> None:
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [warm_executable, __file__, str(capability)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    # Of 16 lengths with 15 to 30 splits: one kernel for each power of two, and one for a multiple of 16.
    assert kernels.pop() == {"split_dot": 1, "merge": 3}
    names = {
        "split_dot",
        "split_tied",
        "merge",
        "rebuilt_scores",
        "plain_scores",
        "choose",
        "order_chunks",
        "take_chunks",
        "weigh",
        "finish",
        "copy_rows",
        "rotate_pairs",
        "merge_parts",
        "multiply",
    }
    if capability == 90:
        names |= {"resident_scores", "project_nodes", "split_latent"}
    assert {made["name"] for made in kernels} - {"split_elementwise"} == names
    for made in kernels:
        assert made["shared"] <= DEVICES[capability][1], made
        # In fp16, where scores are added to; and with 32,768 chunks (one program for all spills 2,312 bytes).
        more = {"resident_scores": 24, "take_chunks": 32}.get(made["name"], 0)
        assert made["spilled"] <= (32 if made["coded"] else SPILLED[version][capability] + more), made


@functools.cache
def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes that one kernel spills for each thread, as the assembler reports. Many launches share a kernel."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    done = subprocess.run(
        [assembler, "-v", f"-arch={arch}", "-o", os.devnull, "/dev/stdin"], input=ptx, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return max(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))


def compile_everything(capability: int) -> None:
    """Prints a line of JSON for every kernel that the calls below launch, and one with the number of kernels that a
    cache needs while it grows."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from cllm.kernels import few_rows, hopper, split_decode, split_lowrank

    class Device:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

    driver.set_active(Device())
    run: Any = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, warmup=True, **options)
        coded = any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in flat(arguments))
        made = {"name": self.__name__, "shared": kernel.metadata.shared, "coded": coded}
        print(json.dumps(made | {"spilled": spilled_bytes(kernel.asm["ptx"], capability)}))
        return kernel

    def count_only(self: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> Any:
        compiled.setdefault(self.__name__, set()).add(run(self, *arguments, warmup=True, **options))

    JITFunction.run = compile_only
    for module in (split_decode, split_lowrank, few_rows):
        module.device_limits = lambda device: split_decode.Limits(*DEVICES[capability])  # type: ignore[attr-defined]
    decode(fp8=capability >= 89)
    decode_factors()
    rotate_keys()
    merge_outputs()
    multiply_few_rows()
    if capability == 90:
        hopper._is_hopper = lambda device: True  # type: ignore[assignment]
        decode_resident_factors()
        decode_latents()
    compiled: dict[str, set[Any]] = {}
    JITFunction.run = count_only
    decode_longer_and_longer()
    print(json.dumps({name: len(kernels) for name, kernels in compiled.items()}))


def flat(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flat(argument)
        else:
            yield argument


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def decode(*, fp8: bool) -> None:
    """Shared, grouped, fused, latent and tied slots, in bf16 and, on devices that have it, in fp8."""
    from cllm.kernels import split_decode

    column = torch.tensor([900])
    for heads, groups, parts in ((16, 16, 1), (32, 8, 1), (16, 16, 2), (16, 4, 2)):
        slots = [drawn(1, 1024, groups, 128) for _ in range(parts)]
        queries, none = [drawn(1, heads, 128)] * parts, [None] * parts
        split_decode.run(queries, slots, none, slots, none, column, None, None, False, 0.1)
        if not fp8:
            continue
        coded, scales = [slot.to(torch.float8_e4m3fn) for slot in slots], [drawn(1, 1024, groups)] * parts
        split_decode.run(queries, coded, scales, coded, scales, column, None, None, False, 0.1)
    for heads, groups, dim in ((16, 16, 128), (32, 8, 128), (8, 1, 512), (16, 2, 256), (24, 1, 128)):
        slots, query, none = [drawn(4, 1024, groups, dim)], [drawn(4, heads, dim)], [None]
        turns = split_decode.Rotation(torch.randn(1, 1024, dim // 2), torch.randn(1, 1024, dim // 2), (0,))
        split_decode.run(query, slots, none, slots, none, column, None, None, False, 0.1, rotation=turns)
        if fp8 and dim == 128:
            coded, scales = [slots[0].to(torch.float8_e4m3fn)], [drawn(4, 1024, groups)]
            split_decode.run(query, coded, scales, coded, scales, column, None, None, False, 0.1, rotation=turns)
    for dim, dtype in ((64, torch.float16), (256, torch.bfloat16), (96, torch.float32), (6, torch.bfloat16)):
        slots, query, none = [drawn(2, 1024, 16, dim).to(dtype)], [drawn(2, 16, dim).to(dtype)], [None]
        turns = split_decode.Rotation(torch.randn(2, 1024, dim // 2), torch.randn(2, 1024, dim // 2), (0,))
        split_decode.run(query, slots, none, slots, none, column, None, 700, True, 0.1, rotation=turns)
    for heads, groups, dim in ((12, 4, 96), (9, 3, 80), (5, 1, 6)):  # sizes that are no powers of two, padded rows
        slots, query, sums = [drawn(2, 1024, groups, dim)], [drawn(2, heads, dim)], torch.empty(2, heads)
        turns = split_decode.Rotation(torch.randn(2, 1024, dim // 2), torch.randn(2, 1024, dim // 2), (0,))
        for rotation in (None, turns):
            split_decode.run(
                query, slots, [None], slots, [None], column, column[:1].expand(2), 500, True, 0.1,
                log_sum=sums, rotation=rotation,
            )  # fmt: skip
    latent, rope = drawn(1, 1024, 1, 512), drawn(1, 1024, 1, 64)
    queries = [drawn(1, 16, 512), drawn(1, 16, 64)]
    split_decode.run(queries, [latent, rope], [None] * 2, [latent], [None], column, None, None, False, 0.1)


def decode_latents() -> None:
    """By the kernel for Hopper GPUs; few and many heads, both dtypes, padding, windows."""
    from cllm.kernels import split_decode

    column = torch.tensor([900])
    for heads, dtype, first, window in (
        (16, torch.bfloat16, None, None),
        (16, torch.float16, torch.tensor([3, 5]), 700),
        (1, torch.bfloat16, None, 700),
    ):
        latent, rope = drawn(2, 1024, 1, 512).to(dtype), drawn(2, 1024, 1, 64).to(dtype)
        queries = [drawn(2, heads, 512).to(dtype), drawn(2, heads, 64).to(dtype)]
        split_decode.run(
            queries, [latent, rope], [None] * 2, [latent], [None], column, first, window, window is not None, 0.1
        )


def rotate_keys() -> None:
    """Keys of a long prompt, also behind sinks, in each dtype."""
    from cllm.kernels import rotate

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (16, 64, 128, 256):
            table = torch.randn(1, 100, 1, 2, dim // 2), torch.randn(1, 100, 1, 2, dim // 2)
            rotate.run(torch.randn(2, 104, 3, dim).to(dtype)[:, 4:], *table)


def multiply_few_rows() -> None:
    """By each tile, for even and odd widths, and several weights."""
    from cllm.kernels import few_rows

    for rows, sizes, width in ((4, (2048,), 1024), (16, (2048, 1024, 1024), 1000), (2, (8192, 300), 512)):
        few_rows.run(drawn(rows, width), [drawn(size, width) for size in sizes])


def merge_outputs() -> None:
    """Of training, with two or three parts and other head dimensions, and of a decoding step."""
    from cllm.kernels import merge

    def lse(heads: int, length: int) -> torch.Tensor:
        return torch.randn(heads, 2, length).transpose(0, 1)

    for parts, heads, length, width, dtype, sink in (
        (2, 16, 256, 64, torch.bfloat16, torch.zeros(16)),
        (2, 16, 256, 128, torch.bfloat16, None),
        (3, 6, 333, 96, torch.float16, torch.zeros(6).bfloat16()),
        (2, 4, 256, 256, torch.float32, None),
        (2, 16, 1, 64, torch.float32, torch.zeros(16)),
    ):
        outs = [drawn(2, length, heads, width).to(dtype) for _ in range(parts)]
        merge.run(outs, [lse(heads, length) for _ in range(parts)], sink, torch.bfloat16)


def decode_longer_and_longer() -> None:
    """One sequence with 8 KV heads, of which every step has more tokens."""
    from cllm.kernels import split_decode

    for length in range(960, 1984, 64):
        slot, query = [drawn(1, length, 8, 128)], [drawn(1, 32, 128)]
        column = torch.tensor([length - 1])
        split_decode.run(query, slot, [None], slot, [None], column, None, None, False, 0.1)


def decode_factors() -> None:
    """xKV-4 at 8x of an 8B model's layer: all tokens, with padding, and chosen ones."""
    from cllm.kernels import gather, split_lowrank
    from cllm.kernels.decode import Visible
    from cllm.kernels.selection import Factored, Selection, Table
    from cllm.posthoc.landmarks import make_landmarks

    tokens, tail, groups, heads, dim = 4096, 64, 8, 32, 128

    def part(rank: int) -> Factored:
        return Factored(drawn(1, tokens, rank), drawn(1, groups * dim, rank), drawn(1, tail, groups, dim))

    table = Table(torch.randn(tokens, dim // 2), torch.randn(tokens, dim // 2))
    landmarks = make_landmarks(drawn(1, tokens, groups, dim), None, chunk=8, budget=512, outliers=12)
    for first, selection in ((None, None), (torch.tensor([3]), None), (None, landmarks)):
        visible = Visible(torch.tensor([tokens + 10]), first, None, False)
        split_lowrank.run([drawn(1, heads, dim)], [part(384)], [part(576)], table, visible, 0.1, selection)
    values = Factored(drawn(1, tokens, groups * dim), None, drawn(1, tail, groups, dim))  # uncompressed
    for first in (None, torch.tensor([3])):
        visible = Visible(torch.tensor([tokens + 10]), first, None, False)
        for selection in (None, landmarks):
            split_lowrank.run([drawn(1, heads, dim)], [part(192)], [values], table, visible, 0.1, selection)
        gather.run(values.a.unflatten(2, (groups, dim)), torch.zeros(1, groups, 608, dtype=torch.int64), first)
    outliers, query = torch.arange(12).expand(1, groups, 12), drawn(1, heads, dim)
    for chunks in (8192, 32768):  # chosen by many programs
        many = Selection(drawn(1, chunks, groups, dim), outliers, drawn(1, 96, groups, dim), 8, 2048)
        split_lowrank._choose(split_lowrank._Call([query], groups, visible, 0.1), query, many)


def decode_resident_factors() -> None:
    """The same, rebuilt by programs that keep B; and other heads, ranks and KV heads of a program."""
    from cllm.kernels import split_lowrank
    from cllm.kernels.decode import Visible
    from cllm.kernels.selection import Factored, Table

    tokens = 33 * 1024
    for heads, groups, dim, rank, first, dtype, turn in (
        (32, 8, 128, 384, None, torch.bfloat16, 0.01),
        (32, 8, 128, 384, torch.tensor([3]), torch.float16, 0.01),
        (32, 4, 128, 384, None, torch.bfloat16, 0.01),
        (32, 8, 128, 384, None, torch.bfloat16, 0.0014),
        (12, 3, 64, 96, None, torch.bfloat16, 0.01),
        (32, 8, 128, 384, None, torch.bfloat16, 0.1),
        (32, 8, 128, 384, torch.tensor([3]), torch.float16, 0.1),
        (32, 4, 128, 768, None, torch.bfloat16, 0.1),
        (3, 3, 64, 40, None, torch.bfloat16, 0.01),
    ):
        table = Table(torch.randn(tokens, dim // 2), torch.randn(tokens, dim // 2), turn)
        a, b, tail = drawn(1, tokens, rank), drawn(1, groups * dim, rank), drawn(1, 64, groups, dim)
        part, query = Factored(a.to(dtype), b.to(dtype), tail.to(dtype)), drawn(1, heads, dim).to(dtype)
        call = split_lowrank._Call([query], groups, Visible(tail, first, None, False), 0.1)
        call.score_rebuilt(query, part, table, None, call.empty_scores(tokens), add=first is not None)


if __name__ == "__main__":
    compile_everything(int(sys.argv[1]))
