"""KVSharer (arXiv 2410.18517): layers that read the slot of another, chosen without training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Compressor, Part

if TYPE_CHECKING:
    from cllm.posthoc.engine import Engine

log = logging.getLogger(__name__)


class KVSharer(Compressor):
    """KVSharer: pairs of layers are tried from the most **dissimilar** caches down, and the upper layer
    of a pair reads the lower one's slot where the model's last hidden states stay similar,

        d_ij = ‖(K_i, V_i) - (K_j, V_j)‖ of caches averaged over calibration,    cos(h, h_shared) > threshold

    until `share` layers do. Their slots, tokens to come included, are dropped.
    """

    name: ClassVar[str] = "kvsharer"
    no_sinks: ClassVar[str | None] = "slots are dropped or stored exactly, and no token is approximated"

    sinks: int = Field(0, ge=0)
    """0."""
    share: int = Field(1, ge=1)
    """Slots to drop."""
    threshold: float = Field(0.5, ge=-1, le=1)
    """The least cosine similarity of the last hidden states that a pair must leave."""

    _map: dict[int, int] | None = PrivateAttr(None)

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        cache = engine.new_cache()
        exact = engine.hidden(ids, cache).float().flatten(1)
        mean = {
            slot: [t.float().mean(0) for t in (held.k, held.v)] for slot, held in engine.filled(cache).slots.items()
        }

        def distance(i: int, j: int) -> float:
            return sum((a - b).square().sum() for a, b in zip(mean[i], mean[j], strict=True)).sqrt().item()  # type: ignore[union-attr]

        pairs = [(i, j) for i in mean for j in mean if j < i and mean[i][0].shape == mean[j][0].shape]
        found: dict[int, int] = {}
        for upper, lower in sorted(pairs, key=lambda pair: -distance(*pair)):
            if len(found) == self.share:
                break
            if upper in found or lower in found or upper in found.values():
                continue
            tried = found | {upper: lower}
            hidden = engine.hidden(ids, engine.new_cache(tried)).float().flatten(1)
            if F.cosine_similarity(exact, hidden).mean().item() > self.threshold:
                found = tried
        if len(found) < self.share:
            raise UserError(
                f"{self.name}: only {len(found)} of share={self.share} slots can be dropped with threshold="
                f"{self.threshold:g}; allowed: fewer, or a lower threshold"
            )
        log.info("%s: %s", self.name, ", ".join(f"slot {i} reads slot {j}" for i, j in sorted(found.items())))
        self._map = found

    def facts(self) -> dict[str, Any]:
        return {} if self._map is None else {"reads": {str(slot): source for slot, source in sorted(self._map.items())}}

    def follows(self) -> dict[int, int]:
        if self._map is None:
            raise UserError(f"{self.name}: not calibrated: call prepare(engine, ids) first")
        return self._map

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        return [None] * len(keys.slots), [None] * len(keys.slots)
