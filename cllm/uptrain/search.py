"""Plans from measured similarity: which layers share, or which slots a layer fuses, as an explicit plan.

    python -m cllm.uptrain.search --config FILE --init.from PATH --owners 12 --out plan.yaml
    python train.py --config FILE --config plan.yaml --init.from PATH

Sharing: pairs of layers are taken by the similarity of their keys and values on a calibration text, the most similar
first, or the least similar (KVSharer, arXiv 2410.18517). The upper layer of a pair then reads the lower one's slot.
This ends when `--owners` are left, or the cache is small enough. With `--threshold`, pairs that move the final hidden
states too far from the teacher's are skipped.

Fusing: each fusing layer of the config's plan reads the owners below it whose sum has the least squared error (fit.py,
weights alone).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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
from cllm.plan.describe import origin_text
from cllm.plan.explicit import Explicit, plan_entries
from cllm.plan.plan import Fuse, KVPlan, LayerPlan, Share
from cllm.signals import stoppable
from cllm.uptrain.calibrate import Batches, inputs_of, observe
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import OWN_KV, TracedDecoder, build_traced, owner_of
from cllm.uptrain.heads import to_pairs
from cllm.uptrain.init import init_student
from cllm.uptrain.project import check_no_loop
from cllm.uptrain.ridge import solve

Measure = Literal["cosine", "cka"]
_CKA_TOKENS = 512
"""Tokens of a batch that CKA compares: its cost grows with their square."""


@torch.no_grad()
def similarity(teacher: TracedDecoder, batches: Batches, measure: Measure) -> Tensor:
    """(L, L) fp64 similarities between layers, the mean over keys (post-RoPE) and values.

    `cosine`: of each layer's keys (or values) as one vector. `cka`: linear CKA (arXiv 1905.00414), which does not
    depend on the order of heads or channels; its three sums are taken over all batches.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """The goal of `share_plan`, either `owners` or `max_bytes`, and the order in which it takes pairs of layers."""

    owners: int | None = None
    """Stop at this many owners."""
    max_bytes: float | None = None
    """Stop when a token's resident cache, in bf16 at the model's context, is no larger."""
    measure: Measure = "cosine"
    dissimilar_first: bool = False
    """Take the least similar pairs first."""
    threshold: float | None = None
    """Least mean cosine of final hidden states to the teacher's, with `copy` weights. Pairs below it are skipped."""

    def check(self, config: ModelConfig) -> None:
        """Raises `UserError` unless there is one goal, and the model of `config` does not meet it yet."""
        layers = config.n_layers
        if (self.owners is None) == (self.max_bytes is None):
            raise UserError("a plan needs one goal: --owners or --max-bytes")
        check_owning(config.plan())
        if layers < 2:
            raise UserError(f"init.from has {layers} layer; allowed: 2 or more, of which one reads what another owns")
        if self.owners is not None and not 1 <= self.owners < layers:
            raise UserError(
                f"--owners is {self.owners}; allowed: 1 to {layers - 1}, fewer than the layers of init.from"
            )
        if self.max_bytes is not None and self.max_bytes >= kv_bytes(config).resident:
            raise UserError(
                f"--max-bytes is {self.max_bytes:g}; allowed: less than {kv_bytes(config).resident:g}, the cache of "
                "init.from"
            )

    def is_reached(self, config: ModelConfig, plan: KVPlan) -> bool:
        """Whether the model of `config` meets the goal with `plan`."""
        if self.owners is not None:
            return len(plan.owners) <= self.owners
        return kv_bytes(with_plan(config, plan)).resident <= (self.max_bytes or 0.0)


def share_plan(teacher: TracedDecoder, batches: Batches, sharing: Sharing) -> KVPlan:
    """Let layers of the teacher's plan share, a pair at a time, until the goal is reached.

    Args:
        teacher: every layer owns and reads its own slot.
        batches: calibration text.
        sharing: the goal, and the order of pairs.

    Raises:
        UserError: as `Sharing.check` does, and if no pair is left before the goal is reached.
    """
    plan, config = teacher.plan, teacher.config
    sharing.check(config)
    alike = similarity(teacher, batches, sharing.measure)
    pairs = sorted(
        ((i, j) for i in range(len(plan)) for j in range(i) if plan.layers[i] == _moved(plan, i, j)),
        key=lambda pair: (float(alike[pair]) * (1 if sharing.dissimilar_first else -1), pair),
    )
    target = list(range(len(plan)))
    shared = plan
    for i, j in pairs:
        if sharing.is_reached(config, shared):
            break
        if target[i] != i or target[j] != j:
            continue
        tried = [j if t == i else t for t in target]
        candidate = _shared(plan, tried)
        if sharing.threshold is None or closeness(teacher, candidate, batches) >= sharing.threshold:
            target, shared = tried, candidate
    if not sharing.is_reached(config, shared):
        raise UserError(
            f"no pair of layers is left to share, with {len(shared.owners)} owners; lower --threshold or ask for more "
            "bytes"
        )
    return shared


def check_owning(plan: KVPlan) -> None:
    """Raises `UserError` unless every layer owns keys and values of one shape and reads itself."""
    for i in range(len(plan)):
        if not plan.reads_itself(i):
            raise UserError(f"init.from: layer {i} {origin_text(plan, i)}; allowed: models in which {OWN_KV}")
        own, first = plan.owned(i), plan.owned(0)
        if (own.kv_heads, own.head_dim) != (first.kv_heads, first.head_dim):
            raise UserError(
                f"init.from: layer {i} has {own.text} and layer 0 {first.text}; allowed: keys and values of one shape"
            )


def _moved(plan: KVPlan, i: int, j: int) -> LayerPlan:
    """Layer `j` moved to `i`: a layer shares only with one that it equals after the move."""
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
    init_student(student, teacher, InitFrom.model_validate({"method": "copy"}))
    total = count = 0.0
    for batch in batches:
        inputs = inputs_of(batch, device)
        close = F.cosine_similarity(student.hidden(*inputs).float(), teacher.hidden(*inputs).float(), dim=-1)
        total, count = total + float(close.sum()), count + close.numel()
    return total / count


# ---- sources of fusion -----------------------------------------------------------------------------------------------


@torch.no_grad()
def fusion_plan(teacher: TracedDecoder, plan: KVPlan, batches: Batches, *, ridge: float) -> KVPlan:
    """`plan` with the sources of each fused read replaced by as many others, those of least squared error.

    Raises:
        UserError: for a plan that fuses nothing or has a loop, or a teacher in which a layer does not own a slot.
    """
    check_owning(teacher.plan)
    check_no_loop(plan)
    if not plan.reads_by(Fuse):
        raise UserError("model.kv fuses nothing; give --owners or --max-bytes for a plan that shares")
    n, fused = len(plan), plan.reads_by(Fuse)
    matrices = any(read.granularity == "matrix" for read in fused.values())
    sums = [torch.zeros(()), torch.zeros(())]
    for seen in observe(teacher, batches):
        slots = [seen.slot(i, owner_of(teacher, i)) for i in range(n)]
        z = torch.stack([to_pairs(slot[0]) for slot in slots])  # L, G, P, N
        sums[0] = sums[0] + torch.einsum("igpn,jgpn->ijgp", z.conj(), z)
        x = torch.stack([slot[1].double() for slot in slots])  # L, G, D, N
        sums[1] = sums[1] + torch.einsum("igdn,jgen->ijgde" if matrices else "igdn,jgdn->ijgd", x, x)
    layers = []
    for i, layer in enumerate(plan.layers):
        keys, values = plan.keys(i), plan.values(i)
        if (i, "keys") in fused:
            keys = _best_sources(plan, i, fused[i, "keys"], sums[0], ridge)
        if (i, "values") in fused:
            values = _best_sources(plan, i, fused[i, "values"], sums[1], ridge)
        layers.append(replace(layer, keys=keys, values=values))
    return KVPlan.of(layers, plan.iterations)


def _best_sources(plan: KVPlan, i: int, read: Fuse, sums: Tensor, ridge: float) -> Fuse:
    """The sources of least squared error, from the sums over tokens of products of layers: keys (L, L, G, P) complex,
    values (L, L, G, D), or (L, L, G, D, D) if any read of the plan fuses by matrices."""
    if read.granularity != "complex":
        sums = sums.real
    if sums.ndim == 4:
        sums = sums[..., None, None]
    elif read.granularity == "matrix":
        sums = sums[:, :, :, None]
    else:
        sums = sums.diagonal(dim1=-2, dim2=-1)[..., None, None]
    if read.granularity == "scalar":
        sums = sums.sum(3, keepdim=True)
    if not read.per_head:
        sums = sums.sum(2, keepdim=True)
    grams = sums.flatten(2, 3).permute(2, 0, 1, 3, 4)  # weights, L, L, and the size of a matrix weight, else 1, twice
    kind = plan.layers[read.layers[0]]
    below = [
        j for j in plan.owners if j < i and plan.layers[j].own == kind.own and plan.layers[j].window == kind.window
    ]
    if i in read.layers or len(below) < len(read.layers):
        return read  # its own slot, which must be read, has no error already; or there is no choice

    def error(layers: tuple[int, ...]) -> float:
        index = list(layers)
        a = grams[:, index][:, :, index].transpose(2, 3).flatten(3, 4).flatten(1, 2)
        b = grams[:, index, i].flatten(1, 2)
        w = solve(a, b, torch.zeros_like(b), ridge)
        return float((w.conj() * (a @ w - 2 * b)).real.sum())

    best = min(itertools.combinations(below, len(read.layers)), key=error)
    return read.with_layers(best)


@one_line
@stoppable()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see the module."""
    parser = config_parser(Config, __doc__ or "")
    add = parser.add_argument
    add("--owners", type=int, help="number of layers that keep their own keys and values")
    add("--max-bytes", type=float, help="limit on resident cache bytes a token, in bf16 at the model's context")
    add("--fusion", action="store_true", help="choose the sources of the config's fusing layers instead")
    add("--measure", choices=("cosine", "cka"), help="of similarity (default: cosine)")
    add("--dissimilar-first", action="store_true", help="share the least similar layers first (KVSharer)")
    add("--threshold", type=float, help="least cosine of final hidden states to the teacher's (default: none)")
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
    names = [field.name for field in fields(Sharing)]
    ignored = [name for name in names if arguments.fusion and getattr(arguments, name) not in (None, False)]
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
        sharing = Sharing(
            owners=arguments.owners,
            max_bytes=arguments.max_bytes,
            measure=arguments.measure or "cosine",
            dissimilar_first=arguments.dissimilar_first,
            threshold=arguments.threshold,
        )
        plan = share_plan(teacher, batches, sharing)
    return plan_entries(plan)


if __name__ == "__main__":
    sys.exit(main())
