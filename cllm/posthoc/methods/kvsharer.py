"""KVSharer (arXiv 2410.18517): layers that read another layer's slot, chosen without training."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Codes
from cllm.posthoc.method import Compressor, Engine
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors

log = logging.getLogger(__name__)


@register("kvsharer", summary="some slots not stored: their layers read another slot", sweep=("kvsharer",))
class KVSharer(Compressor):
    """KVSharer: pairs of layers are tried in order of decreasing **dissimilarity** of their caches. The upper layer of
    a pair then reads the lower layer's slot, if the model's last hidden states stay similar,

        d_ij = ‖(K_i, V_i) - (K_j, V_j)‖ of caches averaged over calibration,    cos(h, h_shared) > threshold

    until `share` layers do. Their slots are not stored, for later tokens neither.
    """

    no_every: ClassVar[str | None] = "slots are dropped or stored exactly, later tokens too"
    no_sinks: ClassVar[str | None] = "slots are dropped or stored exactly, and no token is approximated"

    sinks: int = Field(0, ge=0)
    """Only 0: no token is approximated."""
    share: int = Field(1, ge=1)
    """Slots to drop."""
    threshold: float = Field(0.5, ge=-1, le=1)
    """The cosine similarity of the last hidden states that sharing a pair must exceed."""

    _shares: dict[int, int] | None = PrivateAttr(None)

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        cache = engine.new_cache()
        exact = engine.hidden(ids, cache).float().flatten(1)
        slots = engine.compressible(cache).slots
        mean = {owner: [t.float().mean(0) for t in (slot.k, slot.v)] for owner, slot in slots.items()}

        def distance(i: int, j: int) -> float:
            return sum((a - b).square().sum() for a, b in zip(mean[i], mean[j], strict=True)).sqrt().item()  # type: ignore[union-attr]

        pairs = [(i, j) for i in mean for j in mean if j < i and mean[i][0].shape == mean[j][0].shape]
        if not pairs:
            raise UserError(
                f"{self.name}: no two of {len(mean)} slots have one shape; allowed: models with two such slots"
            )
        shares: dict[int, int] = {}
        for upper, lower in sorted(pairs, key=lambda pair: -distance(*pair)):
            if len(shares) == self.share:
                break
            if upper in shares or lower in shares or upper in shares.values():
                continue
            tried = shares | {upper: lower}
            hidden = engine.hidden(ids, engine.new_cache(tried)).float().flatten(1)
            if F.cosine_similarity(exact, hidden).mean().item() > self.threshold:
                shares = tried
        if len(shares) < self.share:
            raise UserError(
                f"{self.name}: only {len(shares)} of share={self.share} slots can be dropped with threshold="
                f"{self.threshold:g}; allowed: fewer, or a lower threshold"
            )
        log.info("%s: %s", self.name, ", ".join(f"slot {i} reads slot {j}" for i, j in sorted(shares.items())))
        self._shares = shares

    def facts(self) -> dict[str, Any]:
        if self._shares is None:
            return {}
        return {"reads": {str(slot): source for slot, source in sorted(self._shares.items())}}

    def shares(self) -> dict[int, int]:
        if self._shares is None:
            raise UserError(f"{self.name}: not calibrated: call prepare(engine, ids) first")
        return self._shares

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return [None] * len(keys.slots), [None] * len(keys.slots)
