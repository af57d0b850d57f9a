"""Compute the cost of a model on more GPUs and longer contexts. Nothing is trained.

    python -m benchmarks.cuts --config configs/model/4b.yaml --gpus 64 --data.seq_len 32768

The first table has the bytes that a pipeline cut carries for the model's own plan and for each preset: the residual
stream, and the keys and values that cross it. The second has memory and traffic of each GPU for data, tensor and
context parallelism. Both are explained in docs/distributed.md.
"""

from __future__ import annotations

import math
import statistics
import sys

from cllm.cache.accounting import Cut, cuts, slot_bytes
from cllm.config import Config, ModelConfig
from cllm.config.load import config_parser, validate
from cllm.errors import UserError, one_line
from cllm.model.sizes import count_parameters, meta_decoder, training_flops_per_token
from cllm.plan.presets import preset_names
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config

WEIGHT, MASTER_AND_MOMENTS = 2, 12
"""Bytes of a bf16 weight or gradient, and of an fp32 weight with AdamW's two moments."""
SPLIT = 8
"""GPUs of one machine, over which layers or tokens are split."""
PEAK, MFU = 989e12, 0.45
"""FLOP/s of an H100 or H200 in bf16, and the share of it that is assumed."""
NVLINK, NETWORK = 450e9, 50e9
"""Nominal bytes a second that a GPU sends within a machine, and between machines with 400 Gbit/s for each GPU."""


def best_and_worst(candidates: list[Cut]) -> tuple[Cut, Cut] | None:
    """The cheapest and the most expensive cut outside of cyclic layers; of equal ones the nearest to the middle.

    None if every cut is inside of cyclic layers.
    """
    middle = (len(candidates) - 1) / 2
    usable = sorted((cut for cut in candidates if not cut.cyclic), key=lambda cut: abs(cut.after - middle))
    return (min(usable, key=lambda c: c.total), max(usable, key=lambda c: c.total)) if usable else None


def cut_table(model: ModelConfig, tokens: int) -> list[str]:
    """A line for the model's own plan and one per preset: KiB a token of the middle, the best and the worst cut, and
    MiB of the middle one. `loop` marks presets in which layers on both sides of the middle have the same weights."""
    lines = [f"{'preset':<24}{'middle cut':>11}{'best':>14}{'worst':>14}{'mean':>8}{'MiB in the middle':>19}"]
    lines.append(cut_line("(this model)", model, tokens))
    for name in preset_names():
        try:
            other = validate(ModelConfig, model.model_dump() | {"kv": {"preset": name}})
        except UserError as error:
            lines.append(f"{name:<24} not possible here: {error}")
            continue
        lines.append(cut_line(name, other, tokens))
    return lines


def cut_line(name: str, model: ModelConfig, tokens: int) -> str:
    """The line of one plan."""
    candidates = cuts(model)
    if not candidates:
        return f"{name:<24} a single layer cannot be cut"
    middle, ends = candidates[(len(candidates) - 1) // 2], best_and_worst(candidates)
    if ends is None or middle.cyclic:
        return f"{name:<24} cyclic: layers on both sides of the middle are computed together"
    best, worst = [f"{cut.total / 1024:.2f} ({cut.after})" for cut in ends]
    mean = statistics.mean(cut.total for cut in candidates if not cut.cyclic) / 1024
    return (
        f"{name:<24}{middle.total / 1024:>11.2f}{best:>14}{worst:>14}{mean:>8.2f}"
        f"{middle.total * tokens / 2**20:>19,.0f}{'  loop' if middle.looped else ''}"
    )


def traffic(parameters: int, gpus: int, micro_batches: int) -> dict[str, tuple[float, float]]:
    """For each kind of data parallelism: GiB of weights, gradients and optimizer on a GPU, and GiB it sends in a step.

    Gradients are in bf16. With several micro-batches they are summed in fp32, to which ZeRO-1 adds those of one
    micro-batch. Memory agrees with the dry run, `state_bytes`, without its buffers. A ring sends (N - 1) / N of what it
    gathers or reduces.
    """
    gib, part = parameters / 2**30, (gpus - 1) / gpus
    gradient, both = (WEIGHT, WEIGHT) if micro_batches == 1 else (2 * WEIGHT, 3 * WEIGHT)
    reduce_and_gather = (WEIGHT + WEIGHT) * gib * part
    sharded = (WEIGHT + gradient + MASTER_AND_MOMENTS) * gib / gpus
    return {
        "zero1": ((WEIGHT + both) * gib + MASTER_AND_MOMENTS * gib / gpus, reduce_and_gather),
        "zero2": (
            WEIGHT * gib + (gradient + MASTER_AND_MOMENTS) * gib / gpus,
            reduce_and_gather + WEIGHT * gib * part * (micro_batches - 1),
        ),
        "zero3, FSDP2": (sharded, micro_batches * 3 * WEIGHT * gib * part),
    }


def parallel_table(config: Config, gpus: int) -> list[str]:
    """Memory and traffic of data parallelism over all GPUs, and traffic of tensor and context parallelism over 8."""
    model, tokens = config.model, config.data.seq_len
    parameters = count_parameters(meta_decoder(model))
    micro_batches = config.train.global_batch // (config.train.micro_batch * gpus)
    if micro_batches * config.train.micro_batch * gpus != config.train.global_batch:
        raise UserError(
            f"train.global_batch {config.train.global_batch} is not a multiple of train.micro_batch "
            f"{config.train.micro_batch} x {gpus} GPUs"
        )
    lines = [f"{parameters / 1e6:,.0f} M parameters, {gpus} GPUs, {micro_batches} micro-batch(es) a step on each"]
    lines += [f"{'':<30}{'GiB a GPU':>10}{'GiB sent':>10}{'seconds':>9}"]
    for name, (memory, sent) in traffic(parameters, gpus, micro_batches).items():
        lines.append(f"{name + ', a step':<30}{memory:>10.1f}{sent:>10.1f}{sent * 2**30 / NETWORK:>9.2f}")
    for name, sent in split_traffic(model, config.train.micro_batch * tokens).items():
        lines.append(f"{f'{name} over {SPLIT}, a micro-batch':<40}{sent:>10.1f}{sent * 2**30 / NVLINK:>9.2f}")
    flops = training_flops_per_token(meta_decoder(model), tokens) * config.train.micro_batch * tokens
    lines.append(
        f"computing a micro-batch takes {flops / PEAK / MFU:.2f} s on one GPU, "
        f"{flops / PEAK / MFU / SPLIT:.2f} s on {SPLIT}"
    )
    return lines


def split_traffic(model: ModelConfig, tokens: int) -> dict[str, float]:
    """GiB that each of `SPLIT` GPUs sends for a micro-batch, if layers or tokens are split between them.

    Tensor parallelism all-reduces the residual stream two times in a layer's forward and two times in its backward; an
    all-reduce sends 2 (N - 1) / N of it. Context parallelism gathers every slot one time in the forward, however many
    layers read it, and reduces its gradient in the backward, (N - 1) / N each. Of a slot with a window only the tokens
    of the window are gathered. Recurrent states, one for each sequence, are left out.
    """
    part, plan = (SPLIT - 1) / SPLIT, model.plan()
    gathered = sum(
        sum(slot_bytes(plan.owned(j), model.resolved_head_dim)) * min(part * tokens, plan.kept(j) or math.inf)
        for j in plan.slots
        if not plan.owned(j).is_state
    )
    return {
        "tensor parallel": 4 * model.n_layers * tokens * model.d_model * WEIGHT * 2 * part / 2**30,
        "context parallel": 2 * gathered / 2**30,
    }


@one_line
@stoppable()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = config_parser(Config, __doc__ or "")
    parser.prog = "python -m benchmarks.cuts"
    parser.add_argument("--gpus", type=int, default=64, help="GPUs of all machines (default 64)")
    arguments, overrides = parser.parse_settings(argv)
    if not arguments.config:
        raise UserError("give at least one --config FILE; configs/model/4b.yaml is a good one")
    if arguments.gpus < 8:
        raise UserError(f"--gpus is {arguments.gpus}; allowed: 8 or more")
    config = load_config(arguments.config, overrides)
    tokens = config.train.micro_batch * config.data.seq_len
    print(f"KiB a token that a cut carries in bf16 (after which layer); MiB for a micro-batch of {tokens:,} tokens")
    print("\n".join(cut_table(config.model, tokens)))
    print()
    print("\n".join(parallel_table(config, arguments.gpus)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
