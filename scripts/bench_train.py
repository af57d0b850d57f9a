#!/usr/bin/env python
"""Time training steps on random tokens: designs of this project and, with --peers, other trainers at the same shape.

    python scripts/bench_train.py --config configs/bench/374m.yaml --designs mha fusedkv --peers --out bench.json

All contenders live on one GPU and take turns, round after round, so that clocks and heat are the same for all. Each
does the same work: bf16 autocast over fp32 weights, forward, backward, clipping at norm 1, fused AdamW. A step's time
is read from device events. Prints a table (median, spread over rounds, tokens a second, MFU, peak memory, against the
first contender) and writes JSON with versions, commit and clocks. --fp8 adds the first design with fp8 products, which
is other arithmetic and so a table of its own; its MFU, too, counts against the bf16 peak.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm import cli
from cllm.config import Config
from cllm.errors import UserError, one_line
from cllm.model.sizes import build_decoder, count_parameters, training_flops_per_token
from cllm.runs import write_atomic
from cllm.train.environment import environment
from cllm.train.float8 import check_float8, convert_blocks
from cllm.train.optim import make_optimizer
from cllm.train.throughput import peak_flops

ROOT = Path(__file__).resolve().parents[1]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Contender:
    """A model, its loss, and the times of its steps in ms, a list for each round."""

    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    flops_per_token: float
    rounds: list[list[float]] = field(default_factory=list)
    peak_gib: float = 0.0
    last_loss: float = float("nan")

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.loss(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def drop(self) -> None:
        """Give the memory back."""
        self.model, self.loss = nn.Module(), lambda ids, labels: ids
        self.optimizer = torch.optim.SGD([torch.zeros(1)])
        gc.collect()
        torch.cuda.empty_cache()


def design(name: str, config: Config) -> Contender:
    """This project's model with a plan, as train.py would build it."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build_decoder(config.model, backend=config.attention.backend)
    model.init_weights()
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.fp32_residual = config.train.fp32_residual
    if config.train.fp8 is not None:
        convert_blocks(model, config.train.fp8)
    if config.train.compile:
        model.compile_blocks()
    flops = training_flops_per_token(model, config.data.seq_len)
    return Contender(name, model, model.loss, make_optimizer(model, config.optim), flops)


def with_documents(plain: Contender, batch: int, seq_len: int, mean: int) -> Contender:
    """The same model on packed documents of random lengths, attention inside documents, positions restarting."""
    draw = torch.Generator("cuda").manual_seed(1)
    begins = torch.rand(batch, seq_len, device="cuda", generator=draw) < 1 / mean
    begins[:, 0] = True
    ids = begins.long().cumsum(1) - 1
    place = torch.arange(seq_len, device="cuda").expand(batch, -1)
    positions = place - torch.where(begins, place, 0).cummax(1).values

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return plain.loss(tokens, labels, positions, ids)  # type: ignore[call-arg]

    return Contender(f"{plain.name}, documents", plain.model, loss, plain.optimizer, plain.flops_per_token)


def _hf_llama(config: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config.model
    shape = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.resolved_d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads,
        head_dim=c.resolved_head_dim,
        max_position_embeddings=c.max_seq_len,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(shape).train()


def hf_liger(config: Config, flops: float) -> Contender:
    """Hugging Face's Llama with Liger's kernels."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    model = _hf_llama(config)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

    return Contender("HF Llama + Liger", model, loss, _adamw(model), flops)


def litgpt_compiled(config: Config, flops: float) -> Contender:
    """litgpt's GPT, compiled whole together with its loss."""
    from litgpt import GPT
    from litgpt.config import Config as GPTConfig

    c = config.model
    shape = GPTConfig(
        block_size=c.max_seq_len,
        vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        n_embd=c.d_model,
        head_size=c.resolved_head_dim,
        n_query_groups=c.n_heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=c.resolved_d_ff,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(shape).train()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return Contender("litgpt compiled", model, torch.compile(loss), _adamw(model), flops)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def clocks() -> str:
    """Clocks, temperature and power of the GPU as nvidia-smi tells them."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def measure(contender: Contender, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """One round: `steps` timed steps."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    loss = None
    for n in range(steps):
        loss = contender.step(*batches[n % len(batches)])
        marks[n + 1].record()
    torch.cuda.synchronize()
    assert loss is not None
    contender.last_loss = float(loss)
    contender.rounds.append([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    own = 12 * count_parameters(contender.model)  # weights and two moments, part of what was there before
    contender.peak_gib = (torch.cuda.max_memory_allocated() - before + own) / 2**30


def profile(contender: Contender, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Kernel ms of one step by kind, and the ten longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        contender.step(*batches[0])
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


def warm_up(contender: Contender, batches: list[tuple[Tensor, Tensor]], steps: int) -> bool:
    """Untimed steps; False, with its memory given back, for a contender that does not fit beside the others."""
    try:
        for n in range(steps):
            contender.step(*batches[n % len(batches)])
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        print(f"out of memory: {contender.name}", file=sys.stderr, flush=True)
        contender.drop()
        return False
    print(f"warm: {contender.name}", file=sys.stderr, flush=True)
    return True


def rows_of(contenders: list[Contender], first: Contender, tokens: int) -> list[dict[str, Any]]:
    """Rows of a table, times against those of `first`."""
    peak = peak_flops(torch.device("cuda"))
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
            f"{row['peak_gib']:>7.1f}{row['time_vs_first']:>7.3f}"
        )


@one_line
def main(argv: list[str] | None = None) -> None:
    parser = cli.config_parser(Config, __doc__ or "")
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
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contender (default 4)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn (default 6)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first turn (default 4)")
    parser.add_argument("--profile", action="store_true", help="print where the kernel time of each contender goes")
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    arguments, overrides = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        raise UserError("scripts/bench_train.py times a GPU, and torch sees none here")
    files = arguments.config or ["configs/bench/374m.yaml"]
    configs = {
        name: cli.load(Config, [*files, ROOT / "configs" / "kv" / f"{name}.yaml"], overrides)
        for name in arguments.designs
    }
    narrow: dict[str, Config] = {}
    if arguments.fp8:
        name = arguments.designs[0]
        plan = ROOT / "configs" / "kv" / f"{name}.yaml"
        narrow[f"{name}, fp8"] = cli.load(Config, [*files, plan], [*overrides, "--train.fp8", arguments.fp8])
    for config in (*configs.values(), *narrow.values()):
        check_float8(config, "gpu")
    contenders = [design(name, config) for name, config in configs.items()]
    first = next(iter(configs.values()))
    if arguments.peers:
        flops = contenders[0].flops_per_token
        contenders += [litgpt_compiled(first, flops), hf_liger(first, flops)]
    seq_len, batch = first.data.seq_len, first.train.micro_batch
    if arguments.documents:
        contenders.insert(1, with_documents(contenders[0], batch, seq_len, arguments.documents))
    in_fp8 = [design(name, config) for name, config in narrow.items()]
    everyone = contenders + in_fp8
    draw = torch.Generator("cuda").manual_seed(0)
    vocab = first.model.vocab_size or 0
    batches = [
        (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        for ids in (torch.randint(vocab, (batch, seq_len + 1), device="cuda", generator=draw) for _ in range(4))
    ]
    dropped = [c for c in everyone if not warm_up(c, batches, arguments.warmup)]
    contenders, in_fp8 = ([c for c in group if c not in dropped] for group in (contenders, in_fp8))
    everyone = contenders + in_fp8
    if not contenders:
        raise UserError("no contender fits in the GPU's memory; try fewer --designs or a smaller --train.micro_batch")
    found: dict[str, Any] = {"environment": environment(), "tokens_per_step": batch * seq_len}
    found["configs"] = {name: config.as_yaml_data() for name, config in (configs | narrow).items()}
    found["out_of_memory"] = [c.name for c in dropped]
    before = clocks()
    for turn in range(arguments.rounds):
        for contender in everyone:
            measure(contender, batches, arguments.steps)
        found["clocks"] = [before, clocks()]
        found["rows"] = rows_of(contenders, contenders[0], batch * seq_len)
        found["rows_fp8"] = rows_of(in_fp8, contenders[0], batch * seq_len)
        if arguments.out:  # after every turn: what is measured stays if the rest is cut off
            write_atomic(Path(arguments.out), json.dumps(found, indent=2) + "\n")
        print(f"turn {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    if arguments.profile:
        found["profile_ms"] = {}
        for contender in everyone:
            print(contender.name)
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
