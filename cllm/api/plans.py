"""A design as a table, a drawing and bytes, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.api.settings import AnyConfig, model_config
from cllm.cache.accounting import KVBytes, describe_bytes, kv_bytes, mha_twin
from cllm.config import ModelConfig
from cllm.plan.describe import plan_drawing, plan_table
from cllm.plan.plan import KVPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, repr=False)
class PlanView:
    """The KV plan of a model. `print` it for a table, a drawing and bytes; a notebook shows its picture."""

    config: ModelConfig
    """The model."""

    @property
    def plan(self) -> KVPlan:
        """The plan: for each layer, what it caches and what it reads."""
        return self.config.plan()

    @property
    def kv_bytes(self) -> KVBytes:
        """Bytes in bf16 for each token of the longest context: `resident`, `written` and `read`."""
        return kv_bytes(self.config)

    @property
    def mha_kv_bytes(self) -> KVBytes:
        """The same for mha at the same sizes."""
        return kv_bytes(mha_twin(self.config))

    def figure(self, title: str = "") -> Figure:
        """Draw the plan: layers as boxes, cached keys and values as lines beside them, reads as arrows."""
        from cllm.plan.picture import plan_figure

        return plan_figure(self.plan, title or self.config.design)

    def __str__(self) -> str:
        return "\n".join([plan_table(self.plan), "", plan_drawing(self.plan), "", *describe_bytes(self.config)])

    __repr__ = __str__

    def _repr_png_(self) -> bytes:
        """The picture, for notebooks."""
        from cllm.plan.picture import plan_png

        return plan_png(self.plan, self.config.design)


def plan(design: AnyConfig, *, layers: int | None = None, **settings: Any) -> PlanView:
    """Expand a design into its plan, to look at before training; torch is not loaded.

    Args:
        design: as for `build`.
        layers: number of layers, the same as `n_layers=`.
        settings: keys of the config's `model` section, as for `build`.

    Raises:
        UserError: for a design that is unknown, or does not fit the number of layers.

    Examples:
        >>> import cllm
        >>> cla = cllm.plan("cla", layers=24)
        >>> cla.kv_bytes.resident / cla.mha_kv_bytes.resident
        0.5
        >>> cla.plan.owners[:4]
        (0, 2, 4, 6)
        >>> print(cllm.plan("yoco", layers=24, max_seq_len=32768))  # doctest: +ELLIPSIS
        layer  owns                  keys  values  sees
        0-11   8 KV heads            own   own     last 1024
        12     8 KV heads, own norm  own   own     all
        13-23  -                     12    12      all
        ...
    """
    if layers is not None:
        settings = {"n_layers": layers} | settings
    return PlanView(model_config(design, settings))
