"""Plans from measured similarity: which layers share, or which slots a layer fuses, written out as an explicit plan.

    python -m cllm.uptrain.search --config FILE --init.from PATH --owners 12 --out plan.yaml
    python train.py --config FILE --config plan.yaml --init.from PATH

Sharing: pairs of layers are taken by the similarity of their keys and values on a calibration text, the most alike
first, or the least alike (KVSharer, arXiv 2410.18517); the upper layer of a pair then reads the lower one, until so
many owners are left or the cache is small enough. With a threshold a step is taken only while the final hidden states
stay that close to the teacher's. Fusing: for each fusing layer of the config's plan, the sources with the least squared
error (fit.py, weights alone) among the owners below it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from cllm.cache.accounting import kv_bytes
from cllm.config import Config, ModelConfig
from cllm.config.load import config_parser
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.plan.explicit import Explicit, plan_entries
from cllm.plan.plan import Fuse, KVPlan, LayerPlan, Share
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import TracedDecoder, build_traced, owner_of
from cllm.uptrain.init import initialise
from cllm.uptrain.ridge import solve

Measure = Literal["cosine", "cka"]
_SHARING = ("owners", "max_bytes", "measure", "dissimilar_first", "threshold")
"""Arguments that `--fusion` has no use for."""
_CKA_TOKENS = 512
"""Tokens of a batch that CKA compares: its cost grows with their square."""


@torch.no_grad()
def similarity(teacher: TracedDecoder, batches: Batches, measure: Measure) -> Tensor:
    """(L, L) fp64, mean over keys (post-RoPE) and values.

    `cosine`: of all numbers of a layer in one vector. `cka`: linear CKA (arXiv 1905.00414), which does not depend on
    the order of heads or channels, its three sums taken over batches.
    """
    n = len(teacher.plan)
    sums = torch.zeros(2, n, n, dtype=torch.float64)
    for seen in observe(teacher, batches):
        slots = [seen.slot(i, owner_of(teacher, i)) for i in range(n)]
        for part in (0, 1):
            flat = [slot[part].double().flatten(0, 1).T for slot in slots]  # N, G D
            if measure == "cka":
                flat = [x[:: max(len(x) // _CKA_TOKENS, 1)] for x in flat]
                flat = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in flat]
            stacked = torch.stack([x.flatten() for x in flat])
            sums[part] += (stacked @ stacked.T).cpu()
    norms = sums.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
    return (sums / (norms[:, :, None] * norms[:, None, :])).mean(0)


def share_plan(
    teacher: TracedDecoder,
    batches: Batches,
    *,
    owners: int | None = None,
    max_bytes: float | None = None,
    measure: Measure = "cosine",
    dissimilar_first: bool = False,
    threshold: float | None = None,
) -> KVPlan:
    """The teacher's plan with layers sharing.

    Args:
        teacher: every layer owns and reads itself.
        batches: calibration text.
        owners: stop when so many are left.
        max_bytes: stop when a token's resident cache, in bf16 at the model's context, is no larger.
        measure: of similarity.
        dissimilar_first: begin with the pair least alike.
        threshold: least mean cosine of final hidden states to the teacher's, with the weights of `copy`; pairs that
            fall short are passed over.

    Raises:
        UserError: without a goal, for one that the teacher meets as it is, or where no pair is left and the goal is not
            reached.
    """
    if (owners is None) == (max_bytes is None):
        raise UserError("a plan needs one goal: --owners or --max-bytes")
    plan, config = teacher.plan, teacher.config
    check_owning(plan)
    if len(plan) < 2:
        raise UserError(f"init.from has {len(plan)} layer; allowed: 2 or more, of which one reads what another owns")
    if owners is not None and not 1 <= owners < len(plan):
        raise UserError(f"--owners is {owners}; allowed: 1 to {len(plan) - 1}, fewer than the layers of init.from")
    if max_bytes is not None and max_bytes >= kv_bytes(config).resident:
        raise UserError(
            f"--max-bytes is {max_bytes:g}; allowed: less than {kv_bytes(config).resident:g}, the cache of init.from"
        )
    alike = similarity(teacher, batches, measure)
    pairs = sorted(
        ((i, j) for i in range(len(plan)) for j in range(i) if plan.layers[i] == _moved(plan, i, j)),
        key=lambda pair: (float(alike[pair]) * (1 if dissimilar_first else -1), pair),
    )
    target = list(range(len(plan)))

    def reached() -> bool:
        if owners is not None:
            return len(set(target)) <= owners
        return kv_bytes(with_plan(config, _shared(plan, target))).resident <= (max_bytes or 0.0)

    for i, j in pairs:
        if reached():
            break
        if target[i] != i or target[j] != j:
            continue
        tried = [j if t == i else t for t in target]
        if threshold is None or closeness(teacher, _shared(plan, tried), batches) >= threshold:
            target = tried
    if not reached():
        left = len(set(target))
        raise UserError(
            f"no pair of layers is left to share, with {left} owners; lower --threshold or ask for more bytes"
        )
    return _shared(plan, target)


def check_owning(plan: KVPlan) -> None:
    """Raises `UserError` unless every layer owns keys and values and reads itself."""
    for i in range(len(plan)):
        if not plan.reads_itself(i):
            raise UserError(f"init.from: layer {i} does not read keys and values of its own; allowed: mha, gqa, mqa")


def _moved(plan: KVPlan, i: int, j: int) -> LayerPlan:
    """Layer `j` as it would stand at `i`: layers share only with their like."""
    return LayerPlan(own=plan.layers[j].own, keys=Share(i), values=Share(i), window=plan.layers[j].window)


def _shared(plan: KVPlan, target: Sequence[int]) -> KVPlan:
    return KVPlan.of(
        LayerPlan(own=layer.own if t == i else None, keys=Share(t), values=Share(t), window=layer.window)
        for i, (t, layer) in enumerate(zip(target, plan.layers, strict=True))
    )


def with_plan(config: ModelConfig, plan: KVPlan) -> ModelConfig:
    """`config` with `plan` written out."""
    return config.model_copy(update={"kv": Explicit.model_validate({"layers": plan_entries(plan)})})


@torch.no_grad()
def closeness(teacher: TracedDecoder, plan: KVPlan, batches: Batches) -> float:
    """Mean cosine between final hidden states of the teacher and of a copy of it with `plan`."""
    device = teacher.embed.weight.device
    student = build_traced(with_plan(teacher.config, plan), backend=teacher.backend).to(device).eval()
    initialise(student, teacher, InitFrom.model_validate({"method": "copy"}))
    total = count = 0.0
    for batch in batches:
        inputs = [
            None if (t := batch.get(n)) is None else t.to(device) for n in ("input_ids", "positions", "document_ids")
        ]
        close = F.cosine_similarity(student.hidden(*inputs).float(), teacher.hidden(*inputs).float(), dim=-1)
        total, count = total + float(close.sum()), count + close.numel()
    return total / count


# ---- sources of fusion -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fusion_plan(teacher: TracedDecoder, plan: KVPlan, batches: Batches, *, ridge: float) -> KVPlan:
    """`plan` with each fused read over as many sources as it has now, those of least squared error.

    Raises:
        UserError: for a plan that fuses nothing, or a teacher in which a layer does not own.
    """
    check_owning(teacher.plan)
    if not plan.reads_by(Fuse):
        raise UserError("model.kv fuses nothing; give --owners or --max-bytes for a plan that shares")
    n = len(plan)
    sums = [torch.zeros(()), torch.zeros(())]
    for seen in observe(teacher, batches):
        slots = [seen.slot(i, owner_of(teacher, i)) for i in range(n)]
        for part in (0, 1):
            x = torch.stack([slot[part].double() for slot in slots])  # L, G, D, N
            sums[part] = sums[part] + torch.einsum("igdn,jgdn->ijgd", x, x)
    layers, fused = [], plan.reads_by(Fuse)
    for i, layer in enumerate(plan.layers):
        keys, values = plan.keys(i), plan.values(i)
        if (i, "keys") in fused:
            keys = _best_sources(plan, i, fused[i, "keys"], sums[0], ridge, tied=True)
        if (i, "values") in fused:
            values = _best_sources(plan, i, fused[i, "values"], sums[1], ridge, tied=False)
        layers.append(LayerPlan(own=layer.own, keys=keys, values=values, window=layer.window))
    return KVPlan.of(layers, plan.iterations)


def _best_sources(plan: KVPlan, i: int, read: Fuse, sums: Tensor, ridge: float, *, tied: bool) -> Fuse:
    if read.granularity == "scalar":
        sums = sums.sum(-1, keepdim=True)
    elif tied:
        sums = sums.unflatten(-1, (2, -1)).sum(-2)
    if not read.per_head:
        sums = sums.sum(2, keepdim=True)
    grams = sums.permute(2, 3, 0, 1)  # G or 1, channels, L, L
    kind = plan.layers[read.layers[0]]
    below = [
        j for j in plan.owners if j < i and plan.layers[j].own == kind.own and plan.layers[j].window == kind.window
    ]

    def error(layers: tuple[int, ...]) -> float:
        index = list(layers)
        a, b = grams[..., index, :][..., index], grams[..., index, i][..., None]
        w = solve(a, b, torch.zeros_like(b), ridge)
        return float((w.mT @ a @ w - 2 * w.mT @ b).sum())

    best = min(itertools.combinations(below, len(read.layers)), key=error)
    return read.with_layers(best)


@one_line
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = config_parser(Config, __doc__ or "")
    add = parser.add_argument
    add("--owners", type=int, help="layers that keep keys and values of their own")
    add("--max-bytes", type=float, help="resident cache bytes a token in bf16, at the model's context, to stay within")
    add("--fusion", action="store_true", help="choose the sources of the config's fusing layers instead")
    add("--measure", choices=("cosine", "cka"), help="of similarity (default: cosine)")
    add("--dissimilar-first", action="store_true", help="share the layers least alike first (KVSharer)")
    add("--threshold", type=float, help="least cosine of final hidden states to the teacher's; default: none")
    add("--out", type=Path, metavar="FILE", help="write the plan there; default: standard output")
    arguments, overrides = parser.parse_settings(argv)
    config = load_config(arguments.config, overrides)
    text = yaml.safe_dump(
        {"model": {"kv": {"layers": _search(config, arguments)}}}, sort_keys=False, default_flow_style=None
    )
    if arguments.out is None:
        print(text, end="")
    else:
        write_atomic(arguments.out, text)
        print(f"written: {arguments.out}", file=sys.stderr)


def _search(config: Config, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from cllm.data.module import DataModule
    from cllm.uptrain.start import calibration_batches, open_teacher

    if config.init.path is None:
        raise UserError("init.from is null; it names the model whose layers are compared")
    if not config.init.calibration_sequences:
        raise UserError("init.calibration_sequences is 0, but layers are compared on a text; allowed: 1 or more")
    ignored = [name for name in _SHARING if arguments.fusion and getattr(arguments, name) not in (None, False)]
    if ignored:
        raise UserError(f"--fusion chooses sources and no owners; leave out --{ignored[0].replace('_', '-')}")
    teacher = open_teacher(config).decoder
    if torch.cuda.is_available() and config.train.accelerator != "cpu":
        teacher.cuda()
    data = DataModule.of(
        config, validation=None, global_batch=config.train.micro_batch, num_workers=0, validation_sequences=None
    )
    batches = calibration_batches(config, data)
    if arguments.fusion:
        plan = fusion_plan(teacher, config.model.plan(), batches, ridge=config.init.ridge)
    else:
        plan = share_plan(
            teacher,
            batches,
            owners=arguments.owners,
            max_bytes=arguments.max_bytes,
            measure=arguments.measure or "cosine",
            dissimilar_first=arguments.dissimilar_first,
            threshold=arguments.threshold,
        )
    return plan_entries(plan)


if __name__ == "__main__":
    sys.exit(main())
