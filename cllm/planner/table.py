"""Tables of measured changes of the loss and measured decode steps.

A table is a JSON file:

    {"format": 1,
     "losses": [{"kv": {"preset": "cla"}, "query_heads_per_kv_head": 1, "spec": null, "loss_change": -0.03,
                 "standard_error": null, "seeds": null, "ratio": null, "parameters": 47000000, "tokens": 490000000,
                 "context": 4096, "text": "validation 592c6512044d", "base_model": null,
                 "n_layers": 12, "n_heads": 8, "head_dim": 64, "source": "study.json"}],
     "decode": [{"kv": {"preset": "mha"}, "query_heads_per_kv_head": 1, "gpu": "NVIDIA H200", "bytes_read": 28e9,
                 "step_s": 0.0074, "parameters": 1.3e9, "source": "decode.json"}]}
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cllm.errors import UserError
from cllm.plan.plan import MAX_LAYERS
from cllm.planner.keys import Size, plan_key
from cllm.section import MAX_HEADS, MAX_WIDTH, Section
from cllm.statistics import Mean
from cllm.trust import parse_json

SHIPPED = Path(__file__).with_name("measured.json")
FORMAT = 1
NO_SOURCE = "a table without sources"


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
    seeds: int | None = Field(None, ge=2)
    """How many seeds `standard_error` is from; None: not known."""
    ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Bytes of the uncompressed cache over those of the compressed one, both with 16-bit numbers."""
    tokens: float | None = Field(None, gt=0)
    """Training tokens."""
    context: int | None = Field(None, ge=1, le=2**50)
    """Tokens of the windows that were scored."""
    text: str | None = Field(None, min_length=1)
    """The text that was scored; None: not known."""
    base_model: str | None = Field(None, min_length=1)
    """The model that was compressed, such as one of Hugging Face; None: one that its training tokens describe."""

    @property
    def reach(self) -> float:
        """Half of the 95 % confidence interval of `loss_change`, by Student's t; 2 standard errors if the number of
        seeds is not known, 0 without a standard error."""
        if self.standard_error is None:
            return 0.0
        if self.seeds is None:
            return 2 * self.standard_error
        return Mean(self.seeds, self.loss_change, self.standard_error).reach or 0.0

    @property
    def text_name(self) -> str:
        """`text`; of a loss that does not say it, a name for the text of its source."""
        return self.text or f"text of {self.source or NO_SOURCE}"

    @property
    def model_name(self) -> str:
        """`base_model`, empty for a model that its training tokens describe; of a loss that says neither, a name for
        the models of its source."""
        return self.base_model or ("" if self.tokens is not None else f"models of {self.source or NO_SOURCE}")


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
