"""No compression: what every method is compared with."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cllm.posthoc import UNCOMPRESSED
from cllm.posthoc.code import Codes
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register(UNCOMPRESSED, summary="every tensor as it is: what the others are compared with")
class Uncompressed(Compressor):
    """Stores every tensor as it is."""

    no_every: ClassVar[str | None] = "every token is stored exactly"
    no_sinks: ClassVar[str | None] = "every token is stored exactly"

    sinks: int = Field(0, ge=0)
    """No other value is allowed."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return [None] * len(keys.slots), [None] * len(keys.slots)
