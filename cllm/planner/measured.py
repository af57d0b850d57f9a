"""Measured changes of the loss and measured decode steps: tables, look-ups, uncertainty.

A table is a JSON file:

    {"format": 1,
     "losses": [{"kv": {"preset": "cla"}, "query_heads_per_kv_head": 1, "spec": null, "loss_change": -0.03,
                 "standard_error": null, "ratio": null, "parameters": 47000000, "tokens": 490000000, "context": 4096,
                 "n_layers": 12, "n_heads": 8, "head_dim": 64, "source": "study.json"}],
     "decode": [{"kv": {"preset": "mha"}, "query_heads_per_kv_head": 1, "gpu": "NVIDIA H200", "bytes_read": 28e9,
                 "step_s": 0.0074, "parameters": 1.3e9, "source": "decode.json"}]}
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cllm.errors import UserError
from cllm.plan.plan import MAX_LAYERS
from cllm.planner.gpus import GPUS
from cllm.planner.keys import Size, plan_key
from cllm.section import MAX_HEADS, MAX_WIDTH, Section
from cllm.trust import parse_json

SHIPPED = Path(__file__).with_name("measured.json")
FORMAT = 1
_ERRORS = 2.0
"""Standard errors on either side that a range covers."""
_EQUAL_RATIOS = 0.1
"""Measurements of one compression belong together if their ratios differ by at most this share."""


class _Measured(Section):
    kv: dict[str, Any]
    """Settings of `model.kv`."""
    query_heads_per_kv_head: int | None = Field(None, ge=1)
    n_layers: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """Depth of the measured model; needed if `kv` counts or names layers."""
    n_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """Its query heads; needed, as `head_dim` is, for latents and for different numbers of KV heads."""
    head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH)
    parameters: float | None = Field(None, gt=0)
    source: str = ""

    @property
    def key(self) -> str | None:
        """The design's (keys.py). Raises `UserError` for a size that is needed and missing."""
        size = Size(n_layers=self.n_layers, n_heads=self.n_heads, head_dim=self.head_dim)
        return plan_key(self.kv, self.query_heads_per_kv_head, size)


class LossChange(_Measured):
    """A change of the loss in nats a token: of a design against mha, or of a compression against the same model."""

    spec: str | None = None
    """The compression; None: a design as trained."""
    loss_change: float = Field(allow_inf_nan=False)
    standard_error: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Standard error of `loss_change`, from several seeds; None: not measured."""
    ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Bytes of the uncompressed cache over those of the compressed one, both with 16-bit numbers."""
    tokens: float | None = Field(None, gt=0)
    """Training tokens."""
    context: int | None = Field(None, ge=1, le=2**50)
    """Tokens of the windows that were scored."""


class DecodeStep(_Measured):
    """A measured decode step."""

    gpu: str
    """The name that the driver reports."""
    bytes_read: float = Field(gt=0)
    step_s: float = Field(gt=0)
    """Seconds of a step."""


class Table(Section):
    """Measurements."""

    format: int = FORMAT
    losses: list[LossChange] = Field(default_factory=list)
    decode: list[DecodeStep] = Field(default_factory=list)


def read_table(path: Path, label: str = "--losses") -> Table:
    """The table in a JSON file. Raises `UserError`, naming the option, the file and the key."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{label} {path}: cannot be read as JSON: {error}") from None
    try:
        table = Table.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{label} {path}: {key}: {first['msg']}") from None
    if table.format != FORMAT:
        raise UserError(f"{label} {path}: format is {table.format}; allowed: {FORMAT}")
    return table


@functools.cache
def shipped_table() -> Table:
    """The table that comes with cllm."""
    return read_table(SHIPPED, "the shipped table")


class Estimate(Section):
    """A loss change and how far it can be trusted."""

    value: float
    low: float | None
    """Least value over all measurements, 2 standard errors included; None with one measurement without seeds."""
    high: float | None
    measurements: list[LossChange]
    """Those of the design or compression; the first one gave `value`."""


def estimate(found: Sequence[LossChange]) -> Estimate | None:
    """The measurement of the largest model, then of the most tokens and the longest windows, then the first one, with
    the range over all at about its ratio of bytes; None without any."""
    if not found:
        return None
    ordered = sorted(found, key=lambda m: (m.parameters or 0, m.tokens or 0, m.context or 0), reverse=True)
    ordered = [m for m in ordered if _have_equal_bytes(m, ordered[0])]
    alone = len(ordered) == 1 and ordered[0].standard_error is None
    low = None if alone else min(m.loss_change - _ERRORS * (m.standard_error or 0) for m in ordered)
    high = None if alone else max(m.loss_change + _ERRORS * (m.standard_error or 0) for m in ordered)
    return Estimate(value=ordered[0].loss_change, low=low, high=high, measurements=ordered)


def _have_equal_bytes(one: LossChange, other: LossChange) -> bool:
    if one.ratio is None or other.ratio is None:
        return True
    return math.isclose(one.ratio, other.ratio, rel_tol=_EQUAL_RATIOS)


class Measurements:
    """Tables, by plan."""

    def __init__(self, tables: Sequence[Table]):
        self._losses: dict[str, dict[str | None, list[LossChange]]] = {}
        for change in (change for table in tables for change in table.losses):
            if (key := change.key) is not None:
                self._losses.setdefault(key, {}).setdefault(change.spec, []).append(change)
        self._steps = [(step.key, step) for table in tables for step in table.decode]

    def design(self, key: str | None) -> Estimate | None:
        """The change of a design's loss against mha."""
        return estimate(self._losses.get(key, {}).get(None, [])) if key else None

    def compressions(self, key: str | None) -> dict[str, Estimate]:
        """The changes by compression, measured on this design."""
        found = self._losses.get(key, {}) if key else {}
        return {spec: e for spec, m in found.items() if spec is not None and (e := estimate(m)) is not None}

    def specs(self) -> set[str]:
        """Every compression with a measurement, whatever the design."""
        return {spec for found in self._losses.values() for spec in found if spec is not None}

    def decode_factor(
        self, key: str | None, gpu: Sequence[str], bound_s: float
    ) -> tuple[float, DecodeStep, bool] | None:
        """Measured seconds of a step over bytes / the data sheet's bandwidth, of the step with the nearest bound.

        Steps of the same GPU come before others, and then steps of the same plan. Bounds are compared in seconds,
        because what a step takes beyond its bound is mostly a constant time.

        Args:
            key: of the plan.
            gpu: the names that its driver reports; empty: not known.
            bound_s: the seconds that reading takes at the data sheet's bandwidth.

        Returns:
            The factor, the step it is from, and whether GPU and plan are those asked for; None without any steps.
        """
        bandwidth = {name: g.bandwidth for g in GPUS.values() for name in g.reported}
        known = [(k, step) for k, step in self._steps if step.gpu in bandwidth]
        if not known:
            return None

        def distance(pair: tuple[str | None, DecodeStep]) -> tuple[bool, bool, float]:
            other, step = pair
            return (
                step.gpu not in gpu,
                key is None or other != key,
                abs(math.log(step.bytes_read / bandwidth[step.gpu] / bound_s)),
            )

        other, step = min(known, key=distance)
        exact = step.gpu in gpu and key is not None and other == key
        return step.step_s * bandwidth[step.gpu] / step.bytes_read, step, exact
