"""Time the pieces of a training or decoding step on one GPU, each against its alternatives and its bound.

    python -m benchmarks.kernels                          everything
    python -m benchmarks.kernels attention fusion --out kernels.json

attention  every installed backend, causal and with documents
joint      one softmax over a slot and a window: attention to each and to both, and the merge beside a copy
fusion     one fusing layer: plain, fused keys and values materialised, doubled head dimension
mlp norm   SwiGLU and RMSNorm: compiled by torch, and from libraries that are installed
loss       the head and the cross-entropy of its logits, by every installed kernel
decode     one new token over cached slots; with --sweep also other tiles than the default ones
tied       one new token over tied slots: variants of the kernel, each checked against plain torch
latent     one new token over a latent slot (MLA) of the shape of --shape, with many tiles, checked and sorted; no
           tiles start after --seconds
Training pieces are timed forward and backward. Bounds are bytes over the copy bandwidth measured in the same run, or
FLOPs over the matmul rate.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.kernels.decoding import bench_decode
from benchmarks.kernels.joint import bench_joint
from benchmarks.kernels.latent import bench_latent, parse_shape
from benchmarks.kernels.table import Table
from benchmarks.kernels.tied import bench_tied
from benchmarks.kernels.training import bench_attention, bench_fusion, bench_loss, bench_mlp, bench_norm
from benchmarks.record import KEPT
from benchmarks.timing import CUDA, copy_bandwidth, matmul_rate
from cllm.arguments import Parser, number
from cllm.environment import clocks, environment
from cllm.errors import UserError, one_line
from cllm.signals import stoppable

BY_BYTES = {"joint": bench_joint, "fusion": bench_fusion, "norm": bench_norm, "tied": bench_tied}
BY_FLOPS = {"attention": bench_attention, "mlp": bench_mlp, "loss": bench_loss}
KINDS = ("attention", "joint", "fusion", "mlp", "norm", "loss", "decode", "tied", "latent")


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON, after every row")
    parser.add_argument("--sweep", action="store_true", help="decode: try other tiles too; minutes")
    parser.add_argument("--only", metavar="TEXT", default="", help="decode: cases whose name contains TEXT")
    parser.add_argument(
        "--shape", metavar="KEY=VALUE,...", default="rank=512",
        help="latent: any of rank=512,rope=64,heads=16,sequences=4,tokens=32768, which are the defaults",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=number(least=0), metavar="N", default=100, help="latent: no tiles start later; default 100"
    )
    options = parser.parse_args(argv)
    shape = parse_shape(options.shape)
    if unknown := set(options.what) - set(KINDS):
        raise UserError(f"benchmarks.kernels: unknown {', '.join(unknown)}; allowed: {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        raise UserError("benchmarks.kernels times a GPU, and torch sees none here")
    torch.manual_seed(0)
    before = clocks()
    copy, flops = copy_bandwidth(CUDA, 2**32), matmul_rate(CUDA)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, matmul {flops / 1e12:.0f} TFLOP/s")
    known = {"environment": environment(), "copy_bytes_per_s": copy, "matmul_flops": flops, "clocks": [before]}
    table = Table(known | {"rows": []}, Path(options.out) if options.out else None)
    table.write()
    for what in options.what or KINDS:
        if what == "decode":
            bench_decode(table, copy, options.sweep, options.only)
        elif what == "latent":
            bench_latent(table, copy, shape, options.seconds)
        elif what in BY_BYTES:
            BY_BYTES[what](table, copy)
        else:
            BY_FLOPS[what](table, flops)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
