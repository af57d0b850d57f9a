#!/usr/bin/env python
"""Time training steps on random tokens: designs of this project and, with --peers, other trainers at the same shape.

    python scripts/bench_train.py --config configs/bench/374m.yaml --designs mha fusedkv --peers --out bench.json

All contenders live on one GPU and take turns, round after round, so that clocks and heat are the same for all. Where
its memory does not hold them together, --swap keeps those that wait in the machine's. Each does the same work: bf16
autocast over fp32 weights, forward, backward, clipping at norm 1, the optimizer of `optim:`; with --accumulate, several
micro-batches a step. A step's time is read from device events. Prints a table (median, spread over rounds, tokens a
second, MFU, peak memory, against the first contender) and writes JSON with versions, commit, clocks, and the chosen
kernels.
--fp8 adds the first design with fp8 products, which is other arithmetic and so a table of its own, MFU against the bf16
peak as elsewhere. --train.accelerator cpu runs it on a CPU, to try it out; its times there mean nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_contender import Batches, Contender, Loss, at_work
from bench_peers import check_peers, hf_liger, litgpt_compiled

from cllm.config import Config, OptimConfig
from cllm.config.load import config_parser
from cllm.environment import clocks, environment
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.model.sizes import build_decoder, count_parameters, training_flops_per_token
from cllm.train.float8 import check_float8
from cllm.train.launch import Launch
from cllm.train.optim import find_optimizer, make_optimizer
from cllm.train.prepare import prepare_for_training
from cllm.train.throughput import peak_flops
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[1]


class Choices(logging.Handler):
    """Prints and keeps the lines in which this project tells what it chose: attention backends, the loss, and why."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        print(self.lines[-1], file=sys.stderr, flush=True)


def design(name: str, config: Config) -> Contender:
    """This project's model with a plan, as train.py would build it."""
    torch.manual_seed(0)
    device = torch.device(_device(config))
    with device:
        model = build_decoder(config.model, backend=config.attention.backend)
    launch = Launch.on(config, "cpu" if device.type == "cpu" else "gpu", 1)
    prepare_for_training(model, config, dataclasses.replace(launch, compiled=bool(config.train.compile)))
    flops = training_flops_per_token(model, config.data.seq_len)
    return Contender(name, model, model.loss, make_optimizer(model, config.optim), flops)


def with_documents(plain: Contender, batch: int, seq_len: int, mean: int, device: str) -> Contender:
    """The same model on packed documents of random lengths, attention inside documents, positions restarting."""
    draw = torch.Generator(device).manual_seed(1)
    begins = torch.rand(batch, seq_len, device=device, generator=draw) < 1 / mean
    begins[:, 0] = True
    ids = begins.long().cumsum(1) - 1
    place = torch.arange(seq_len, device=device).expand(batch, -1)
    positions = place - torch.where(begins, place, 0).cummax(1).values

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return plain.loss(tokens, labels, positions, ids)

    return dataclasses.replace(plain, name=f"{plain.name}, documents", loss=loss, rounds=[])


def peer(name: str, model: nn.Module, loss: Loss, flops: float, config: OptimConfig) -> Contender:
    """Another trainer, with the same optimizer."""
    groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
    return Contender(name, model, loss, find_optimizer(config).build(groups, config), flops)


def waiting(contender: Contender, swap: bool) -> Contender:
    """The same, out of the way of the next one where they do not fit together."""
    if swap:
        contender.leave()
    return contender


def measure(contender: Contender, batches: Batches, steps: int, states: int) -> None:
    """One round: `steps` timed steps. `states`: bytes of optimizer state a parameter."""
    gpu = batches[0][0][0].is_cuda
    if not gpu:
        marks = [time.perf_counter()]
        for n in range(steps):
            contender.last_loss = float(contender.step(batches[n % len(batches)]))
            marks.append(time.perf_counter())
        contender.rounds.append([1000 * (b - a) for a, b in itertools.pairwise(marks)])
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    loss = None
    for n in range(steps):
        loss = contender.step(batches[n % len(batches)])
        events[n + 1].record()
    torch.cuda.synchronize()
    assert loss is not None
    contender.last_loss = float(loss)
    contender.rounds.append([a.elapsed_time(b) for a, b in itertools.pairwise(events)])
    own = (4 + states) * count_parameters(contender.model)  # fp32 weights and states, which existed before
    contender.peak_gib = (torch.cuda.max_memory_allocated() - before + own) / 2**30


def profile(contender: Contender, batches: Batches) -> dict[str, float]:
    """Kernel ms of one step by kind, and the ten longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        contender.step(batches[0])
        torch.cuda.synchronize()
    kinds = {
        "matmul": ("gemm", "nvjet", "cutlass_80", "sm90_xmma", "splitk", "cublas"),
        "attention": ("flash", "fmha", "cudnn", "attention"),
        "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
        "loss": ("cross_entropy", "liger"),
    }
    totals: dict[str, float] = dict.fromkeys((*kinds, "elementwise"), 0.0)
    kernels = []
    for event in trace.key_averages():
        ms = event.self_device_time_total / 1000
        if ms <= 0:
            continue
        kind = next((k for k, words in kinds.items() if any(w in event.key.lower() for w in words)), "elementwise")
        totals[kind] += ms
        kernels.append((ms, event.count, kind, event.key[:110]))
    for ms, count, kind, name in sorted(kernels, reverse=True)[:22]:
        print(f"    {ms:8.2f} ms  x{count:<4} {kind:<11} {name}")
    print(
        "    " + "  ".join(f"{kind} {ms:.1f}" for kind, ms in totals.items()) + f"  sum {sum(totals.values()):.1f} ms"
    )
    return totals


def warm_up(contender: Contender, batches: Batches, steps: int) -> bool:
    """Untimed steps; False, with its memory given back, for a contender that does not fit beside the others."""
    try:
        for n in range(steps):
            contender.step(batches[n % len(batches)])
        if batches[0][0][0].is_cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        print(f"out of memory: {contender.name}", file=sys.stderr, flush=True)
        contender.drop()
        return False
    return True


def rows_of(contenders: list[Contender], first: Contender, tokens: int, device: str) -> list[dict[str, Any]]:
    """Rows of a table, times against those of `first`."""
    peak = peak_flops(torch.device(device))
    rows = []
    base = statistics.median(t for r in first.rounds for t in r)
    for c in contenders:
        medians = [statistics.median(r) for r in c.rounds]
        ms = statistics.median(t for r in c.rounds for t in r)
        rows.append(
            {
                "name": c.name,
                "parameters": count_parameters(c.model),
                "ms": ms,
                "round_medians_ms": medians,
                "tokens_per_s": tokens / ms * 1000,
                "mfu": c.flops_per_token * tokens / ms * 1000 / peak if peak else None,
                "peak_gib": c.peak_gib,
                "time_vs_first": ms / base,
                "loss": c.last_loss,
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'contender':<24}{'M params':>9}{'ms':>9}{'spread':>15}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}{'time':>7}")
    for row in rows:
        medians = row["round_medians_ms"]
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-"
        print(
            f"{row['name']:<24}{row['parameters'] / 1e6:>9.1f}{row['ms']:>9.2f}"
            f"{f'{min(medians):.1f}..{max(medians):.1f}':>15}{row['tokens_per_s']:>11,.0f}{mfu:>7}"
            f"{'-' if row['peak_gib'] is None else format(row['peak_gib'], '.1f'):>7}{row['time_vs_first']:>7.3f}"
        )


def _device(config: Config) -> str:
    return "cpu" if config.train.accelerator == "cpu" else "cuda"


def check(config: Config) -> None:
    """Refuse settings that this script would leave out of account.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    train = config.train
    if _device(config) == "cuda" and not torch.cuda.is_available():
        raise UserError("scripts/bench_train.py times a GPU, and torch sees none here")
    if train.precision == "fp32":
        raise UserError("train.precision is fp32, and bench_train.py times bf16 autocast; allowed: auto, bf16")
    if train.strategy not in ("auto", "single"):
        raise UserError(
            f"train.strategy is {train.strategy}, and bench_train.py times one device; allowed: auto, single; "
            "benchmarks/scaling.py compares strategies"
        )
    if config.data.document_mask:
        raise UserError(
            "data.document_mask is true, and bench_train.py draws its tokens; allowed: false; see --documents"
        )
    check_float8(config, "cpu" if _device(config) == "cpu" else "gpu")


@one_line
def main(argv: list[str] | None = None) -> None:
    parser = config_parser(Config, __doc__ or "")
    parser.add_argument("--designs", nargs="+", default=["mha"], metavar="NAME", help="files of configs/kv/")
    parser.add_argument("--peers", action="store_true", help="also litgpt compiled and Hugging Face + Liger")
    parser.add_argument(
        "--documents", type=int, metavar="TOKENS", help="also the first design on packed documents of this mean length"
    )
    parser.add_argument(
        "--fp8",
        nargs="?",
        const="tensorwise",
        metavar="SCALES",
        help="also the first design with train.fp8 set to this (tensorwise)",
    )
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (default 1)")
    parser.add_argument("--swap", action="store_true", help="contenders that wait do so in the machine's memory")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contender (default 4)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn (default 6)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first turn (default 4)")
    parser.add_argument("--profile", action="store_true", help="print where the kernel time of each contender goes")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    arguments, overrides = parser.parse_settings(argv)
    files = arguments.config or ["configs/bench/374m.yaml"]
    configs = {
        name: load_config([*files, ROOT / "configs" / "kv" / f"{name}.yaml"], overrides) for name in arguments.designs
    }
    narrow: dict[str, Config] = {}
    if arguments.fp8:
        name = arguments.designs[0]
        plan = ROOT / "configs" / "kv" / f"{name}.yaml"
        narrow[f"{name}, fp8"] = load_config([*files, plan], [*overrides, "--train.fp8", arguments.fp8])
    first = next(iter(configs.values()))
    device = _device(first)
    for config in (*configs.values(), *narrow.values()):
        check(config)
    if arguments.accumulate < 1:
        raise UserError(f"--accumulate is {arguments.accumulate}; allowed: 1 or more")
    if arguments.swap and device == "cpu":
        raise UserError("--swap moves contenders out of a GPU's memory, and train.accelerator is cpu")
    if arguments.peers:
        check_peers(first)
    choices = Choices()
    ours = logging.getLogger("cllm")
    ours.handlers, ours.propagate = [choices], False
    ours.setLevel(logging.INFO)
    swap = arguments.swap
    contenders = [waiting(design(name, config), swap) for name, config in configs.items()]
    if arguments.peers:
        flops = contenders[0].flops_per_token
        contenders += [waiting(peer(*build(first), flops, first.optim), swap) for build in (litgpt_compiled, hf_liger)]
    seq_len, batch = first.data.seq_len, first.train.micro_batch
    tokens = arguments.accumulate * batch * seq_len
    if arguments.documents:
        contenders.insert(1, with_documents(contenders[0], batch, seq_len, arguments.documents, device))
    in_fp8 = [waiting(design(name, config), swap) for name, config in narrow.items()]
    everyone = contenders + in_fp8
    draw = torch.Generator(device).manual_seed(0)
    vocab = first.model.vocab_size or 0
    batches = [
        [
            (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            for ids in torch.randint(
                vocab, (arguments.accumulate, batch, seq_len + 1), device=device, generator=draw
            ).unbind()
        ]
        for _ in range(4)
    ]
    dropped: list[Contender] = []
    for contender in everyone:
        with at_work(contender, swap):
            if not warm_up(contender, batches, arguments.warmup):
                dropped.append(contender)
        print(f"warm: {contender.name}", file=sys.stderr, flush=True)
        if contenders[0] in dropped:
            raise UserError(
                f"{contenders[0].name}, which the others are compared with, does not fit in memory beside them; give "
                "fewer --designs or a smaller --train.micro_batch"
            )
    contenders, in_fp8 = ([c for c in group if c not in dropped] for group in (contenders, in_fp8))
    everyone = contenders + in_fp8
    found: dict[str, Any] = {"environment": environment(), "tokens_per_step": tokens}
    found["settings"] = {"micro_batches": arguments.accumulate, "swap": swap}
    found["configs"] = {name: config.as_yaml_data() for name, config in (configs | narrow).items()}
    found["out_of_memory"] = [c.name for c in dropped]
    before, states = clocks(), find_optimizer(first.optim).state_bytes
    for turn in range(arguments.rounds):
        for contender in everyone:
            with at_work(contender, swap):
                if swap:
                    warm_up(contender, batches, 1)
                measure(contender, batches, arguments.steps, states)
        found["clocks"] = [before, clocks()]
        found["chosen"] = choices.lines
        found["rows"] = rows_of(contenders, contenders[0], tokens, device)
        found["rows_fp8"] = rows_of(in_fp8, contenders[0], tokens, device)
        if arguments.out:  # after every turn: what is measured stays if the rest is cut off
            write_atomic(Path(arguments.out), json.dumps(found, indent=2) + "\n")
        print(f"turn {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    if arguments.profile:
        found["profile_ms"] = {}
        for contender in everyone:
            print(contender.name)
            with at_work(contender, swap):
                found["profile_ms"][contender.name] = profile(contender, batches)
        if arguments.out:
            write_atomic(Path(arguments.out), json.dumps(found, indent=2) + "\n")
    print_rows(found["rows"])
    if in_fp8:
        print("\nfp8 products, MFU against the bf16 peak:")
        print_rows(found["rows_fp8"])
    for contender in dropped:
        print(f"{contender.name}: out of memory beside the others; run it with fewer of them")


if __name__ == "__main__":
    sys.exit(main())
