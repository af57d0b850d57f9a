"""Similarity of the slots of a model, which cross-layer compression depends on (xKV, arXiv 2503.18893, figure 2).

Everything is computed from the caches of some sequences, with the tokens of all sequences stacked: X (N, C) for each
slot, for keys before RoPE, keys after it, values, and latents.

    cosine           mean over tokens of x·y / (‖x‖ ‖y‖)
    CKA              ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), columns centred (Kornblith et al., arXiv 1905.00414, eq. 3 with linear
                     kernels): similarity up to a rotation, which the cosine does not show
    energy rank      number of singular values with a given share of Σσ², of groups of neighbouring slots side by side
    effective rank   exp(-Σ p log p), p = σ / Σσ (Roy and Vetterli, 2007)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.lowrank import energy_rank
from cllm.posthoc.method import Engine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "keys_before_rope": "keys before RoPE",
    "keys": "keys",
    "values": "values",
    "latents": "latents",
}


def cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of the rows of two (N, C)."""
    return F.cosine_similarity(x, y, dim=-1).mean().item()


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (N, C) and (N, E), in [0, 1]; 0 if one is constant."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    norms = (x.mT @ x).norm() * (y.mT @ y).norm()
    return ((y.mT @ x).square().sum() / norms.clamp(min=1e-300)).item()


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of `values` (m,) / their sum: m if all are equal, 1 if only one is not zero."""
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def spectrum(x: Tensor) -> Tensor:
    """Singular values of `x` (N, C), fp64, descending."""
    return torch.linalg.svdvals(x.double())


@torch.no_grad()
def collect(engine: Engine, batches: Iterable[Tensor], *, heads: bool = False) -> dict[str, dict[int, Tensor]]:
    """For each of `KINDS` that the model has, {slot: (N, C) fp32 on the CPU} of the tokens in `batches` (B, T) each.

    With `heads`, the tensors of slots with KV heads are (N, G, D).

    Raises `UserError` if no slot has full attention.
    """
    rows: dict[str, dict[int, list[Tensor]]] = {}
    for ids in batches:
        cache = engine.new_cache()
        engine.hidden(ids, cache)
        cached = engine.compressible(cache)
        for before in (True, False):
            for keys, values in cached.tensors(before_rope=before):
                kind = "latents" if values is None else "keys_before_rope" if before else "keys"
                named = [(kind, keys)] if before or values is not None else []
                if values is not None and before:
                    named.append(("values", values))
                for name, tensors in named:
                    for slot, data in zip(tensors.slots, tensors.data, strict=True):
                        flat = (data if heads else data.flatten(2)).flatten(0, 1).float().cpu()
                        rows.setdefault(name, {}).setdefault(slot, []).append(flat)
    if not rows:
        raise UserError("nothing to analyse: every slot has a window or is a recurrent state")
    return {kind: {slot: torch.cat(rows[kind][slot]) for slot in sorted(rows[kind])} for kind in KINDS if kind in rows}


def analyze(slots: dict[int, Tensor], *, groups: Sequence[int], energy: float) -> dict[str, Any]:
    """The measurements of one kind as JSON values; the cosine of slots of different widths is None.

    `energy_rank` is {group size: ranks of the groups}; the last group may be smaller, as in `xkv`, and a group that
    mixes widths is left out.
    """
    tensors = list(slots.values())
    same = [[x.shape[1] == y.shape[1] for y in tensors] for x in tensors]
    ranks: dict[str, list[int]] = {}
    for size in groups:
        members = [tensors[i : i + size] for i in range(0, len(tensors), size)]
        equal = [group for group in members if len({x.shape[1] for x in group}) == 1]
        ranks[str(size)] = [energy_rank(spectrum(torch.cat(group, dim=1)), energy) for group in equal]
    return {
        "slots": list(slots),
        "tokens": len(tensors[0]),
        "width": [x.shape[1] for x in tensors],
        "cosine": [
            [cosine(x, y) if same[i][j] else None for j, y in enumerate(tensors)] for i, x in enumerate(tensors)
        ],
        "cka": [[cka(x, y) for y in tensors] for x in tensors],
        "effective_rank": [effective_rank(spectrum(x)) for x in tensors],
        "energy": energy,
        "energy_rank": ranks,
    }


def figure(results: dict[str, dict[str, Any]]) -> Figure:
    """Heat maps of cosine and CKA, and ranks: one row for each kind in `results` of `analyze`."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 3.4 * len(results)), dpi=130, layout="constrained")
    axes = drawing.subplots(len(results), 4, squeeze=False)
    for row, (kind, figures) in zip(axes, results.items(), strict=True):
        slots = figures["slots"]
        for panel, name in zip(row, ("cosine", "cka"), strict=False):
            data = [[float("nan") if x is None else x for x in line] for line in figures[name]]
            image = panel.imshow(data, vmin=-1 if name == "cosine" else 0, vmax=1,
                                 cmap="RdBu_r" if name == "cosine" else "viridis")  # fmt: skip
            drawing.colorbar(image, ax=panel, shrink=0.85)
            ticks = range(0, len(slots), max(1, len(slots) // 8))
            panel.set_xticks(ticks, [slots[i] for i in ticks])
            panel.set_yticks(ticks, [slots[i] for i in ticks])
            panel.set_xlabel("slot")
            panel.set_ylabel(f"{KINDS[kind]}\nslot" if name == "cosine" else "slot")
            panel.set_title({"cosine": "cosine of tokens", "cka": "CKA"}[name], fontsize=10)
        sizes = [size for size in figures["energy_rank"] if figures["energy_rank"][size]]
        each = [sum(figures["energy_rank"][size]) / len(slots) for size in sizes]
        row[2].plot([int(size) for size in sizes], each, "o-")
        row[2].set_xlabel("slots in a group")
        row[2].set_ylim(bottom=0)
        row[2].set_title(f"rank for {100 * figures['energy']:g} % energy, a slot", fontsize=10)
        row[3].bar(range(len(slots)), figures["effective_rank"])
        row[3].set_xticks(ticks, [slots[i] for i in ticks])
        row[3].set_xlabel("slot")
        row[3].set_title("effective rank", fontsize=10)
    return drawing
