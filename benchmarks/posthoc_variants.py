r"""Time variants of the kernels over compressed caches, and of the compression, on one GPU in less than six minutes.

    python -m benchmarks.posthoc_variants --out posthoc_variants.json

For each part one setting after another is changed, and a change that is faster is kept. The best settings become the
rules of `cllm.kernels.lowrank_tiles`. Times are ms of one layer in a CUDA graph, as in `benchmarks.posthoc_decode`,
whose sizes and options these are.

chosen 64k, 256k   attention over 2,048 chosen tokens: tiles of the choice, of rebuilt keys and of the weighted sum
all keys           attention over all tokens, keys rebuilt: tiles of the weighted sum; ranks that are no multiple of 8
compress           an 8B model's cache: groups in threads or as one batch; quantisers
small              the same for models of 45 and 135 million parameters
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.posthoc_compression import bench_all_compression
from benchmarks.posthoc_decode import Layers
from benchmarks.posthoc_options import add_outputs, add_sizes, begin_record, check_sizes, device_of
from benchmarks.record import KEPT, reason_of
from benchmarks.timing import free, wait
from benchmarks.variants import SECONDS, Variants
from cllm.arguments import Parser
from cllm.errors import UserError, one_line
from cllm.kernels import split_lowrank, triton_decode
from cllm.kernels.lowrank_tiles import Choosing, Rebuild, Tuning, Weighing, choose_weighing
from cllm.kernels.selection import Factored, Selection, chosen_tokens
from cllm.posthoc.landmarks import make_landmarks
from cllm.signals import stoppable

CHOOSING: dict[str, Sequence[Any]] = {
    "taken": (1024, 2048, 8192), "warps": (8, 4), "ordered": (128, 512, 1024), "landmarks": (32, 64),
}  # fmt: skip
WEIGHING: dict[str, Sequence[Any]] = {
    "block_w": (64, 128), "block_n": (64, 128), "warps": (8, 2), "stages": (2, 4), "splits": (4, 8, 16, 20, 32, 39),
}  # fmt: skip
WEIGHING_ALL: dict[str, Sequence[Any]] = {
    "block_w": (64, 128), "block_n": (128, 32), "warps": (8, 2), "stages": (4, 2, 5),
    "splits": (29, 44, 58, 66, 88, 128),
}  # fmt: skip
REBUILDS = [
    Rebuild(block_n=n, block_r=r, pack=1, num_warps=warps, num_stages=stages)
    for n, r, warps, stages in ((64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 4, 2), (64, 128, 8, 3), (32, 128, 4, 3),
                                (32, 64, 4, 4), (128, 64, 8, 3), (64, 64, 4, 4))
]  # fmt: skip


# ---- decoding --------------------------------------------------------------------------------------------------------


class Decode:
    """Attention of the layers of one shape, by any tiles."""

    def __init__(self, o: argparse.Namespace, variants: Variants, what: str):
        self.o, self.variants, self.what = o, variants, what
        self.layers = Layers(o, variants.device)
        self.every = range(len(self.layers.keys))
        self.selections: list[Selection] = []

    def uncompressed(self) -> float:
        """Time attention over the uncompressed keys and values, and make the selections."""
        layers, o = self.layers, self.o
        made = [layers.uncompressed(i) for i in range(min(o.group, len(self.every)))]
        calls = [functools.partial(layers.attend_uncompressed, i, k, v) for i, (k, v) in enumerate(made)]
        ms = self.variants.time(self.what, "uncompressed", calls)
        made.clear()
        calls.clear()
        return ms

    def select(self) -> None:
        """Choose outliers and average landmarks of all layers."""
        o = self.o
        for i in self.every:
            k = self.layers.uncompressed(i)[0][:, : o.tokens]
            parts = [
                make_landmarks(
                    k[:, :, g : g + 1], None, chunk=o.chunk, budget=o.select, outliers=o.outliers, local=o.local
                )
                for g in range(o.kv_heads)
            ]
            marks, outliers, keys = (
                torch.cat([getattr(part, name) for part in parts], dim=at)
                for name, at in (("landmarks", 2), ("outliers", 1), ("outlier_keys", 2))
            )
            self.selections.append(Selection(marks, outliers, keys, o.chunk, o.select))
            del k, parts
            free(self.variants.device)

    def run(self, i: int, tuning: Tuning | None) -> Tensor:
        layers = self.layers
        selection = self.selections[i] if self.selections else None
        parts = ([layers.queries[i]], [layers.keys[i]], [layers.values[i]])
        return split_lowrank.run(*parts, layers.table, layers.visible, layers.scale, selection, tuning)

    def calls(self, tuning: Tuning | None) -> list[Callable[[], object]]:
        return [functools.partial(self.run, i, tuning) for i in self.every]

    def ms(self, tuning: Tuning | None, name: str, **more: Any) -> float:
        return self.variants.time(self.what, name, self.calls(tuning), **more)

    def check_choice(self) -> None:
        """Count the chosen tokens that `topk` does not choose, which rounding explains, or one program a head."""
        for i in list(self.every)[:2]:
            q, selection = self.layers.queries[i], self.selections[i]
            calls = [
                split_lowrank._Call([q], self.o.kv_heads, self.layers.visible, self.layers.scale, Tuning(choosing=how))
                for how in (Choosing(), "one program")
            ]
            marks = selection.landmarks.float()
            scores = torch.einsum("bgnd,bcgd->bgnc", q.float().unflatten(1, (self.o.kv_heads, -1)), marks)
            wanted = chosen_tokens(scores.flatten(1, 2) * self.layers.scale, selection)
            found, before = (split_lowrank._choose(call, q, selection) for call in calls)
            differ = [
                sum(
                    len(set(a) - set(b))
                    for a, b in zip(found.flatten(0, 1).tolist(), x.flatten(0, 1).tolist(), strict=True)
                )
                for x in (wanted, before)
            ]
            row = {"tokens": found.numel(), "not_of_topk": differ[0], "not_chosen_before": differ[1]}
            self.variants.record.add({"what": self.what, "name": f"choice of layer {i}", "ms": 0.0, **row})
            print(f"  {row}", flush=True)

    def profile(self, tuning: Tuning | None, name: str) -> None:
        """Print and keep the mean µs of each kernel of a call."""
        if self.variants.device.type != "cuda":
            return
        try:
            from torch.profiler import ProfilerActivity, profile

            calls = self.calls(tuning)
            for call in calls:
                call()
            wait(self.variants.device)
            with profile(activities=[ProfilerActivity.CUDA]) as made:
                for _ in range(3):
                    for call in calls:
                        call()
                wait(self.variants.device)
            times = {e.key: round(e.device_time_total / (3 * len(calls)), 2) for e in made.key_averages()}
            times = {key: us for key, us in sorted(times.items(), key=lambda item: -item[1]) if us >= 0.1}
        except Exception as failure:
            print(f"{self.what} no profile: {reason_of(failure, 150)}", flush=True)
            return
        self.variants.record.results.setdefault("kernels_us", {})[f"{self.what} {name}"] = times
        self.variants.record.write()
        for key, us in list(times.items())[:14]:
            print(f"    {us:8.2f} µs  {key[:80]}", flush=True)

    def before(self) -> float:
        """Time the choice by one program for each KV head."""
        alone = Tuning(choosing="one program")
        ms = self.ms(alone, "chosen by one program a head")
        self.profile(alone, "one program a head")
        return ms

    def search_chosen(self, until: tuple[float, float, float], start: Tuning | None = None) -> Tuning:
        """The best tiles of a call with chosen tokens: of the choice, the weighted sum and rebuilt keys, each until its
        time."""
        best, variants = start or Tuning(choosing=Choosing(), weighing=choose_weighing(gathered=True)), self.variants

        def choosing(how: Choosing, name: str) -> float:
            return self.ms(replace(best, choosing=how), f"choosing {name}", choosing=asdict(how))

        best = replace(best, choosing=variants.search(self.what, best.choosing, CHOOSING, choosing, until[0]))

        def weighing(how: Weighing, name: str) -> float:
            return self.ms(replace(best, weighing=how), f"weighing {name}", weighing=asdict(how))

        best = replace(best, weighing=variants.search(self.what, best.weighing, WEIGHING, weighing, until[1]))
        rebuilt = {
            self.ms(replace(best, rebuild=how), f"rebuild {how}".replace("Rebuild", ""), rebuild=asdict(how)): how
            for how in REBUILDS
            if time.monotonic() - variants.begin < until[2]
        }
        if rebuilt and min(rebuilt) < float("inf"):
            best = replace(best, rebuild=rebuilt[min(rebuilt)])
        return best


def sized(o: argparse.Namespace, **changed: int) -> argparse.Namespace:
    return argparse.Namespace(**(vars(o) | changed))


def bench_chosen(o: argparse.Namespace, variants: Variants) -> None:
    """Chosen tokens at both lengths, the second with the first one's best tiles."""
    what, best = f"{o.tokens // 1024}k", None
    decode = Decode(o, variants, what)
    exact = decode.uncompressed()
    all_keys(decode, exact, until=45)
    free(variants.device)
    decode.select()
    decode.check_choice()
    before = decode.before()
    decode.ms(None, "by rule")
    decode.profile(None, "by rule")
    best = decode.search_chosen((82, 105, 125))
    decode.profile(best, "best")
    summary(variants, what, exact, before, decode.ms(best, "best", tiles=asdict(best)))
    del decode
    free(variants.device)
    long = sized(o, tokens=4 * o.tokens, groups=1)
    what = f"{long.tokens // 1024}k"
    decode = Decode(long, variants, what)
    exact = decode.uncompressed()
    free(variants.device)
    decode.select()
    decode.check_choice()
    before = decode.before()
    decode.ms(None, "by rule")
    first = decode.ms(best, "best of the shorter cache", tiles=asdict(best))
    now = time.monotonic() - variants.begin
    found = decode.search_chosen((now + 14, now + 22, now), start=best)
    decode.profile(found, "best")
    summary(variants, what, exact, before, min(first, decode.ms(found, "best", tiles=asdict(found))))


def summary(variants: Variants, what: str, exact: float, before: float, best: float) -> None:
    """Keep and print how much longer attention takes than uncompressed. Infinity stands for what was not measured."""
    if not math.isfinite(exact + before + best):
        print(f"== {what}: no comparison, because a part was not measured", flush=True)
        return
    row = {"uncompressed": exact, "before": before, "best": best, "ratio": best / exact, "ratio_before": before / exact}
    variants.record.results.setdefault("summary", {})[what] = row
    print(f"== {what}: {before / exact:.3f} x uncompressed before, {best / exact:.3f} x now", flush=True)


def all_keys(decode: Decode, exact: float, until: float) -> None:
    """Attention over all tokens: tiles of the weighted sum, then other ranks."""
    o, variants = decode.o, decode.variants
    decode.what = "all keys"
    first = decode.ms(None, "by rule")
    decode.profile(None, "by rule")

    def weighing(how: Weighing, name: str) -> float:
        return decode.ms(Tuning(weighing=how), f"weighing {name}", weighing=asdict(how))

    how = variants.search("all keys", choose_weighing(gathered=False), WEIGHING_ALL, weighing, until)
    summary(variants, "all keys", exact, first, decode.ms(Tuning(weighing=how), "best", weighing=asdict(how)))
    keys, values = decode.layers.keys, decode.layers.values
    whole = list(keys), list(values)
    for name, size in (("ranks less 3, rows side by side", None), ("ranks less 3, rows of a multiple of 8", 8)):
        keys[:], values[:] = ([narrowed(part, part.a.shape[2] - 3, size) for part in parts] for parts in whole)
        decode.ms(None, name)
    keys[:], values[:] = whole
    decode.what = f"{o.tokens // 1024}k"


@functools.cache
def _narrow_a(a: Tensor, rank: int, multiple: int | None) -> Tensor:
    if multiple is None:
        return a[..., :rank].contiguous()
    padded = a.clone()
    padded[..., rank:] = 0
    return padded


def narrowed(part: Factored, rank: int, multiple: int | None) -> Factored:
    """`part` with `rank` columns, or with zeros in the columns after them."""
    return Factored(_narrow_a(part.a, rank, multiple), _narrow_a(part.b, rank, multiple), part.tail)


# ---- the command line ------------------------------------------------------------------------------------------------

PARTS = {"decode": bench_chosen, "compress": bench_all_compression}
"""The parts of the benchmark, by their name in `--only`."""


@one_line
@stoppable(kept=KEPT)
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a part failed."""
    parser = Parser(prog="python -m benchmarks.posthoc_variants", description=__doc__)
    add_sizes(parser)
    add_outputs(parser)
    o = parser.parse_args(argv)
    device = device_of(o, "benchmarks.posthoc_variants")
    if device.type == "cpu" and not triton_decode.INTERPRETED:
        if o.only == "decode":
            raise UserError("--only decode with --device cpu: its kernels need a GPU; allowed: compress")
        if o.only is None:
            print("decode is left out: its kernels need a GPU", flush=True)
        o.only = "compress"
    check_sizes(o, least_rank=4)  # smaller ranks are measured too
    begin = time.monotonic()
    record, _, _ = begin_record(o, device)
    variants = Variants(device, record, begin)
    for part, run in PARTS.items():
        if o.only not in (None, part):
            continue
        variants.begin = time.monotonic()
        try:
            if time.monotonic() - begin < SECONDS:
                run(o, variants)
        except Exception as failure:
            print(f"{part} ended early: {type(failure).__name__}: {reason_of(failure, 300)}", flush=True)
            record.results.setdefault("failures", []).append(f"{part}: {failure}")
        free(device)
        print(f"-- {part}: {time.monotonic() - begin:.0f} s since the start", flush=True)
    record.write()
    return 1 if record.results.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
