"""Normalised effective ranks of cached keys and values, and their correlation with what methods lose.

The normalised effective rank of X (N, C) is exp(-Σ p log p) / min(N, C), p = σ / Σσ, in (0, 1]. KV-CoRE (arXiv
2602.05929) uses it as a measure of how compressible a cache is. It depends on the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm import tables
from cllm.errors import UserError
from cllm.posthoc.analysis import effective_rank, spectrum
from cllm.posthoc.compress import encode, mean_errors
from cllm.posthoc.method import Engine
from cllm.posthoc.registry import parse
from cllm.tables import Column

CLAIMED_COSINE = (0.72, 0.87)
"""The cosine of adjacent layers' caches that the literature reports."""
PARTS = {"keys_before_rope": "k", "keys": "k", "values": "v", "latents": "k"}
"""The part of a slot, as `Outcome.errors` calls it, that each kind of tensor belongs to."""


def normalised_rank(x: Tensor) -> float:
    """Effective rank of (N, C) / min(N, C); 0 for zeros."""
    return effective_rank(spectrum(x)) / min(x.shape) if bool(x.any()) else 0.0


def ranks(slots: Mapping[int, Tensor]) -> dict[str, Any]:
    """Normalised effective ranks of slots (N, *width): `layer` for each slot, `head` for each of its heads.

    A layer's rank is that of all heads side by side. `head` is None for latents, which have no heads.
    """
    tensors = list(slots.values())
    heads = [[normalised_rank(x[:, g]) for g in range(x.shape[1])] if x.ndim > 2 else None for x in tensors]
    return {"layer": [normalised_rank(x.flatten(1)) for x in tensors], "head": heads}


def adjacent_cosines(cosines: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The cosine of each slot and the next, from `analyze`'s matrix."""
    return [cosines[i][i + 1] for i in range(len(cosines) - 1)]


@torch.no_grad()
def layer_errors(
    engine: Engine, batches: Sequence[Tensor], spec: str, calibration: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Relative errors that a method makes in each slot: {slot: {"k": ..., "v": ...}}, means over the sequences of
    `batches` (B, T).

    Args:
        calibration: tokens (B', T') on which a method may calibrate; None: the first batch.

    Raises:
        UserError: if the method does not fit.
    """
    method, errors, sequences = parse(spec), [], []
    method.prepare(engine, batches[0] if calibration is None else calibration)
    for ids in batches:
        cache = engine.new_cache()
        with method.watch(engine):
            engine.hidden(ids, cache)
        errors.append(encode(method, engine.compressible(cache))[1].errors)
        sequences.append(len(ids))
        method.release()
    return mean_errors(errors, sequences)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation; None with fewer than three pairs or where either does not vary."""
    x, y = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def losses(
    kinds: Mapping[str, Mapping[str, Any]],
    engine: Engine,
    batches: Sequence[Tensor],
    specs: Sequence[str],
    calibration: Tensor | None = None,
) -> dict[str, Any]:
    """For each method the errors of the slots, and their correlation with ranks and with cosines of adjacent slots.

    A method that does not fit the model has `refused`, the reason, instead.
    """
    found: dict[str, Any] = {}
    for spec in specs:
        parse(spec)  # a mistake in a spec is an error, not a reason
        try:
            errors = layer_errors(engine, batches, spec, calibration)
        except UserError as error:
            found[spec] = {"refused": str(error)}
            continue
        related = {}
        for kind, figures in kinds.items():
            of_kind = [errors[str(slot)][PARTS[kind]] for slot in figures["slots"]]
            related[kind] = correlation(figures["normalised_effective_rank"]["layer"], of_kind)
        found[spec] = {"relative_errors": errors, "correlation_with_rank": related}
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "–"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """For every text and kind of tensor: mean and range of ranks over layers and heads, and of adjacent cosines."""
    rows = [(record["set"], kind, figures) for record in records for kind, figures in record["kinds"].items()]
    key = "normalised_effective_rank"
    columns = [
        Column[Any]("text", lambda r: r[0], left=True),
        Column[Any]("tensor", lambda r: r[1], left=True),
        Column[Any]("rank, layers", lambda r: _range(r[2][key]["layer"])),
        Column[Any]("rank, heads", lambda r: _range(x for heads in r[2][key]["head"] for x in heads or ())),
        Column[Any]("cosine of adjacent slots", lambda r: _range(r[2]["adjacent_cosine"])),
    ]
    claim = f"claimed in the literature for adjacent layers: {CLAIMED_COSINE[0]} to {CLAIMED_COSINE[1]}"
    lines = [tables.aligned(columns, rows), f"mean (least to largest); rank: normalised effective rank; cosine {claim}"]
    return "\n".join([*lines, *_loss_lines(records)])


def _loss_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows, refused = [], []
    for record in records:
        for spec, found in record.get("posthoc", {}).items():
            if "refused" in found:
                refused.append(f"{record['set']}, {spec}: {found['refused']}")
                continue
            for kind, value in found["correlation_with_rank"].items():
                errors = [error[PARTS[kind]] for error in found["relative_errors"].values()]
                rows.append((record["set"], spec, kind, errors, value))
    if not rows:
        return refused
    columns = [
        Column[Any]("text", lambda r: r[0], left=True),
        Column[Any]("compression", lambda r: r[1], left=True),
        Column[Any]("tensor", lambda r: r[2], left=True),
        Column[Any]("relative error of layers", lambda r: _range(r[3])),
        Column[Any]("correlation with rank", lambda r: "–" if r[4] is None else f"{r[4]:+.2f}"),
    ]
    return ["", tables.aligned(columns, rows), *refused]
