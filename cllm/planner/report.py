"""Candidates as text, CSV and JSON, with notes on what is measured, what is extrapolated and what is missing."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from cllm import tables
from cllm.config import ModelConfig
from cllm.counts import count_text, rounded_count
from cllm.planner.candidates import Candidate, Request
from cllm.planner.conditions import Conditions
from cllm.planner.measured import Measurements
from cllm.planner.table import NO_SOURCE, LossChange
from cllm.posthoc import UNCOMPRESSED
from cllm.posthoc.registry import methods
from cllm.tables import Column

MISSING = "–"
GB = 1e9
NEAR = 10
"""Rows of a short table for methods that are not on the front."""
Listed = Literal["front", "near", "all"]
"""Which compressions a table lists; see `choose`."""


def _loss(c: Candidate) -> str:
    return MISSING if c.loss_change is None else f"{c.loss_change:+.4f}"


def _gb(n_bytes: float) -> str:
    """Gigabytes: two decimals, and three digits of less than one."""
    return f"{n_bytes / GB:.2f}" if n_bytes >= GB else f"{n_bytes / GB:.3g}"


def _range(c: Candidate) -> str:
    found = c.loss_range
    if c.is_reference and c.spec is None:
        return "reference"
    return MISSING if found is None else f"{found[0]:+.4f} to {found[1]:+.4f}"


def _step(c: Candidate) -> str:
    return MISSING if c.step_s is None else f"{'' if c.factor_is_of_this_plan else '~'}{1e3 * c.step_s:.2f}"


def _heads(c: Candidate) -> str:
    return MISSING if c.n_kv_heads is None else str(c.n_kv_heads)


COLUMNS = (
    Column[Candidate]("", lambda c: "*" if c.front else "" if c.fits else "x", left=True),
    Column[Candidate]("design", lambda c: c.design, left=True),
    Column[Candidate]("KV heads", _heads),
    Column[Candidate]("compression", lambda c: c.spec or MISSING, left=True),
    Column[Candidate]("cache, GB", lambda c: _gb(c.cache_bytes)),
    Column[Candidate]("of mha", lambda c: f"{c.cache_vs_mha:.3f}"),
    Column[Candidate]("total, GB", lambda c: _gb(c.total_bytes)),
    Column[Candidate]("sequences", lambda c: f"{c.most_sequences:,}"),
    Column[Candidate]("bound, ms", lambda c: f"{1e3 * c.bound_s:.2f}"),
    Column[Candidate]("step, ms", _step),
    Column[Candidate]("loss, nats", _loss),
    Column[Candidate]("range", _range),
)


def is_design(c: Candidate) -> bool:
    """Whether a candidate has its design's own number of KV heads."""
    return c.is_reference or "n_kv_heads=" not in c.design


def choose(
    found: Sequence[Candidate], *, compressions: Listed, heads: bool, asked: Collection[str] = ()
) -> list[Candidate]:
    """The candidates of a short table: those that fit and are on the front, uncompressed and measured, or presets.

    Args:
        found: all candidates.
        compressions: those to keep: `front`, those on the front; `near`, also of each other method the one nearest to
            the front, `NEAR` at most; `all`.
        heads: keep every number of KV heads, not only a design's own and measured ones.
        asked: designs that are kept without compression, such as those of `--designs`.
    """
    near = {id(c) for c in nearest_of_methods(found)} if compressions == "near" else set()

    def wanted(c: Candidate) -> bool:
        if c.spec is not None:
            return c.front or compressions == "all" or id(c) in near
        return heads or c.front or c.loss_change is not None or is_design(c) or c.design in asked

    return [c for c in found if c.fits and wanted(c)]


def nearest_of_methods(found: Sequence[Candidate]) -> list[Candidate]:
    """Of each method, or combination of methods, that is not on the front the candidate whose loss exceeds the least
    one at no more cache by the least; the `NEAR` nearest."""
    known = [(c, c.loss_change) for c in found if c.fits and c.loss_change is not None]
    on_front = {_methods(c) for c, _ in known if c.front}
    best: dict[str, tuple[float, Candidate]] = {}
    for c, loss in known:
        if c.spec is None or _methods(c) in on_front:
            continue
        excess = loss - min(other for o, other in known if o.cache_bytes <= c.cache_bytes)
        if excess < best.get(_methods(c), (float("inf"), c))[0]:
            best[_methods(c)] = excess, c
    return [c for _, c in sorted(best.values(), key=lambda pair: pair[0])[:NEAR]]


def _methods(c: Candidate) -> str:
    return "+".join(part.partition(":")[0] for part in (c.spec or "").split("+"))


def text(found: Sequence[Candidate], shown: Sequence[Candidate], model: ModelConfig, request: Request,
         measured: Measurements, *, compressions: Listed = "all") -> str:  # fmt: skip
    """The table of `shown`, with its notes on them and on the rest of `found`; `compressions` as `choose` had it."""
    lines = [_head(found, request, measured), ""]
    lines += [tables.aligned(COLUMNS, shown)] if shown else [_nothing_fits(found, request)]
    if compressions == "near" and any(c.spec is not None and not c.front for c in shown):
        lines += ["", "compressions without *: of each method that is not on the front, the one whose loss exceeds the "
                      f"least loss at no more cache by the least; at most {NEAR}."]  # fmt: skip
    return "\n".join([*lines, "", *notes(found, shown, model, request, measured)])


def _head(found: Sequence[Candidate], request: Request, measured: Measurements) -> str:
    gpu, losses = (
        request.gpu,
        measured.conditions.description if _used(found) else "none were measured on these designs",
    )
    return (
        f"GPU          {gpu.name}: {gpu.memory / GB:,.4g} GB, {gpu.bandwidth / 1e12:.4g} TB/s ({gpu.source})\n"
        f"use          {request.text}, weights and caches in 16 bits\n"
        f"budget       {request.budget / GB:,.4g} GB for weights and caches ({request.headroom:.0%} of memory is left "
        "for the rest)\n"
        f"losses       {losses}"
    )


def _nothing_fits(found: Sequence[Candidate], request: Request) -> str:
    if not found:
        return "no candidate"
    least = min(found, key=lambda c: c.total_bytes)
    return (
        f"nothing fits: the smallest candidate, {least.name}, needs {least.total_bytes / GB:,.4g} GB of "
        f"{request.budget / GB:,.4g} GB; lower --context or --concurrency, or choose another --gpu"
    )


def notes(found: Sequence[Candidate], shown: Sequence[Candidate], model: ModelConfig, request: Request,
          measured: Measurements) -> list[str]:  # fmt: skip
    """Lines under the table of `shown`."""
    return [
        "*: on the front, no other candidate with a measured loss has at most its cache and at most its loss. "
        "sequences: the most that fit.",
        "bound: bytes that a decode step reads / the data sheet's bandwidth. step: bound x a measured factor; ~: the "
        "factor is of another plan or GPU.",
        *_loss_notes(found, shown, model, request, measured),
    ]


def _loss_notes(found: Sequence[Candidate], shown: Sequence[Candidate], model: ModelConfig, request: Request,
                measured: Measurements) -> list[str]:  # fmt: skip
    """Those of `notes` that do not explain columns of the table."""
    lines = [
        f"loss: measured change against {reference_name(found)} without compression, nats a token, of the models "
        f"above; {MISSING}: none.",
        "range: of all measurements of this design and compression on such models, with the 95 % confidence interval "
        f"of those with several seeds; {MISSING}: one measurement of one seed, so its uncertainty is not known.",
    ]
    if any(c.spec is not None for c in shown):
        lines.append(
            "A compressed cache can keep the loss and lose what was to be found in it; suites measure that: evaluate "
            "--suite copying --posthoc SPEC."
        )
    unfit = sum(not c.fits for c in found)
    hidden = len(found) - len(shown)
    if hidden or unfit:
        lines.append(f"{len(found)} candidates, of which {unfit} do not fit; {hidden} are not listed"
                     + (": --all lists them." if hidden else "."))  # fmt: skip
    if hidden and (large := [c for c in found if not c.fits and c.spec is None and is_design(c)]):
        sizes = ", ".join(f"{c.design} ({c.total_bytes / GB:,.4g} GB)" for c in large)
        lines.append(f"do not fit without compression: {sizes}.")
    lines += _factor_notes(shown)
    lines += _extrapolations(shown, model, request)
    lines += _conditions_notes(found, measured)
    without = sum(c.loss_change is None for c in shown if c.spec is None)
    if without:
        lines.append(f"no measured loss: {without} of {sum(c.spec is None for c in shown)} designs.")
    if missing := _unmeasured_methods(found, measured):
        lines.append(
            f"no measurement on these designs and such models of the post-hoc methods {', '.join(missing)}: neither "
            "bytes nor loss is known."
        )
    return lines


def reference_name(found: Sequence[Candidate]) -> str:
    """The design that losses are changes against."""
    return next((c.design for c in found if c.is_reference), "mha")


def _factor_notes(found: Iterable[Candidate]) -> list[str]:
    steps = {c.factor_from.model_dump_json(): c for c in found if c.factor_from is not None}
    by_source: dict[str, list[float]] = {}
    for c in steps.values():
        assert c.factor_from is not None
        assert c.step_s is not None
        by_source.setdefault(f"{c.factor_from.source} ({c.factor_from.gpu})", []).append(c.step_s / c.bound_s)
    ends = {source: dict.fromkeys(f"{v:.2f}" for v in (min(all_), max(all_))) for source, all_ in by_source.items()}
    return [f"factor {' to '.join(values)} from {source}" for source, values in sorted(ends.items())]


def _used(found: Iterable[Candidate]) -> list[LossChange]:
    parts = [part for c in found for part in (c.design_loss, c.spec_loss) if part is not None]
    return list({id(m): m for part in parts for m in part.measurements}.values())


def _span(values: Iterable[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "an unknown number of"
    ends = list(dict.fromkeys(map(_amount, (known[0], known[-1]))))
    return " to ".join(ends)


def _amount(value: float) -> str:
    return rounded_count(value) if value >= 1e6 else f"{value:,.0f}"


def _extrapolations(found: Sequence[Candidate], model: ModelConfig, request: Request) -> list[str]:
    used = _used(found)
    lines = []
    if used:
        sources = sorted({change.source or NO_SOURCE for change in used})
        wanted = _span(c.parameters for c in found)
        beyond = [] if _span(m.parameters for m in used) == wanted else [f"{wanted} parameters"]
        beyond += ["any number of training tokens"]
        beyond += [] if {m.context for m in used} == {request.context} else [f"{request.context:,} tokens of context"]
        listed = " and ".join(filter(None, (", ".join(beyond[:-1]), beyond[-1])))
        lines += [f"losses from {', '.join(sources)}.", f"losses are extrapolated to {listed}."]
    if any(c.spec is not None for c in found):
        lines.append(
            "bytes under compression: the ratio measured at that window, extrapolated to this context; a loss of "
            "design and compression is the sum of both."
        )
    if request.context > model.max_seq_len:
        lines.append(f"context {request.context:,} is longer than the model's max_seq_len {model.max_seq_len:,}.")
    return lines


def _conditions_notes(found: Iterable[Candidate], measured: Measurements) -> list[str]:
    """Measurements that are left out because of their conditions, and those that do not say theirs."""
    lines, chosen = [], measured.conditions
    others = measured.others({c.key for c in found})
    texts = collections.Counter(m.text_name for m in others if chosen.first_other(m) == "text")
    reasons = collections.Counter(_reason(chosen, m) for m in others if chosen.first_other(m) != "text")
    if others:
        parts = [f"{n} {reason}" for (*_, reason), n in sorted(reasons.items())]
        if texts:
            listed = ", ".join(f'"{name}" ({n})' for name, n in sorted(texts.items()))
            parts.append(f"{texts.total()} on other texts (--text NAME): {listed}")
        lines.append(f"not compared with these: {len(others)} losses of the same designs, {', '.join(parts)}.")
    used = list(_used(found))
    for what, silent, compared in (
        ("after how many training tokens", lambda m: not m.base_model and m.tokens is None, _ALONE),
        ("on which text", lambda m: m.text is None, _ALONE),
        ("with which windows", lambda m: m.context is None and chosen.context is not None, "are compared as if alike"),
    ):
        sources = dict.fromkeys(m.source or NO_SOURCE for m in used if silent(m))
        lines += [f"{source} does not say {what} its losses were measured; they {compared}." for source in sources]
    return lines


_ALONE = "are compared with one another only"


def _reason(chosen: Conditions, m: LossChange) -> tuple[int, float, str]:
    """Why a loss on the same text is not compared with those under `chosen`, after two numbers to sort by."""
    other = chosen.first_other(m)
    if other == "base_model" and (m.model_name or m.tokens is None):
        return 0, 0, f'of {m.model_name} (--base-model "{m.model_name}")'
    if m.tokens is not None and other in ("base_model", "tokens"):
        return 1, m.tokens, f"after {rounded_count(m.tokens)} training tokens (--tokens {count_text(m.tokens)})"
    if other == "context" and m.context is not None:
        return 2, m.context, f"with windows of {m.context:,.0f} tokens (--window {m.context})"
    return 3, 0, "of models of another size"


def _unmeasured_methods(found: Iterable[Candidate], measured: Measurements) -> list[str]:
    specs = {spec for key in {c.key for c in found} for spec in measured.compressions(key)}
    seen = {part.partition(":")[0] for spec in specs for part in spec.split("+")}
    return [name for name in methods() if name not in seen and name != UNCOMPRESSED]


# ---- machine-readable ------------------------------------------------------------------------------------------------

FIELDS = (
    "design", "n_kv_heads", "spec", "fits", "front", "parameters", "weight_bytes", "cache_bytes", "cache_vs_mha",
    "total_bytes", "most_sequences", "read_bytes", "bound_s", "step_s", "factor_is_of_this_plan", "loss_change",
)  # fmt: skip
"""Columns of the CSV that are attributes of a candidate; `loss_low`, `loss_high` and the conditions follow."""


def row(c: Candidate) -> dict[str, Any]:
    """A candidate with full precision; None where nothing was measured."""
    low, high = c.loss_range or (None, None)
    own = None if c.factor_from is None else c.factor_is_of_this_plan
    values = {name: getattr(c, name) for name in FIELDS}
    return {**values, "factor_is_of_this_plan": own, "loss_low": low, "loss_high": high}


def csv_text(found: Sequence[Candidate], measured: Measurements) -> str:
    """All candidates, with the conditions of their losses; an empty cell where nothing was measured."""
    conditions = {f"measured_{name}": value for name, value in dataclasses.asdict(measured.conditions).items()}
    rows = (row(c) | (conditions if c.loss_change is not None else {}) for c in found)
    return tables.csv_text([*FIELDS, "loss_low", "loss_high", *conditions], rows)


def json_text(found: Sequence[Candidate], model: ModelConfig, request: Request, measured: Measurements) -> str:
    """All candidates with the measurements that they rest on, the request, and the notes."""
    gpu = request.gpu
    return json.dumps(
        {
            "gpu": {"name": gpu.name, "memory": gpu.memory, "bandwidth": gpu.bandwidth, "source": gpu.source},
            "context": request.context,
            "concurrency": request.concurrency,
            "headroom": request.headroom,
            "budget_bytes": request.budget,
            "conditions": dataclasses.asdict(measured.conditions),
            "candidates": [
                row(c)
                | {
                    "factor_source": c.factor_from.source if c.factor_from else None,
                    "factor_gpu": c.factor_from.gpu if c.factor_from else None,
                    "measurements": [m.model_dump(exclude={"kv"}) for m in _used([c])],
                }
                for c in found
            ],
            "notes": notes(found, found, model, request, measured),
        },
        indent=1,
    )


# ---- heads x sharing -------------------------------------------------------------------------------------------------


def grid(found: Sequence[Candidate]) -> tuple[list[str], list[int], dict[tuple[str, int], Candidate]]:
    """Designs without their KV heads, numbers of KV heads, and the uncompressed candidate of each pair.

    `gqa` and `mqa` are mha with fewer heads, and appear in its row.
    """
    cells: dict[tuple[str, int], Candidate] = {}
    for c in found:
        if c.spec is None and c.n_kv_heads is not None:
            cells.setdefault((c.sharing, c.n_kv_heads), c)
    heads = sorted({n for _, n in cells}, reverse=True)
    most = {name: max(c.cache_bytes / n for (other, n), c in cells.items() if other == name) for name, _ in cells}
    return sorted(most, key=lambda name: (-most[name], name)), heads, cells


def heads_text(found: Sequence[Candidate], model: ModelConfig, request: Request, measured: Measurements) -> str:
    """Cache in GB by sharing (rows) and KV heads (columns), with the change of the loss, and notes."""
    names, heads, cells = grid(found)

    def cell(name: str, n: int) -> str:
        c = cells.get((name, n))
        if c is None:
            return ""
        mark = "*" if c.front else "" if c.fits else "x"
        return f"{mark}{_gb(c.cache_bytes)} ({_loss(c)})"

    columns = [Column[str]("sharing", lambda name: name, left=True)]
    columns += [Column[str](f"{n} KV heads", lambda name, n=n: cell(name, n)) for n in heads]  # type: ignore[misc]
    legend = (
        f"cache in GB (change of the loss in nats; {MISSING}: not measured). *: on the front, x: does not fit. Rows: "
        "which layers share, without compression; the least cache of a row is at its right end."
    )
    lines = [_head(found, request, measured), "", tables.aligned(columns, names), "", legend]
    return "\n".join([*lines, *_loss_notes(found, found, model, request, measured)])
