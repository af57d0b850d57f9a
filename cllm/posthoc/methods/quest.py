"""Quest (arXiv 2406.10774): an exact cache of which a decode step reads the pages that may matter to its query."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from pydantic import Field, model_validator

from cllm.errors import UserError
from cllm.posthoc.code import Codes
from cllm.posthoc.method import Compressor
from cllm.posthoc.pages import make_pages
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register("quest", summary="the exact cache, of which a decode step reads selected pages")
class Quest(Compressor):
    """Pages selected by bounds on their keys. No byte is saved: the bounds add 2 / `page` of the keys. Steps read less.

    In the paper each query head selects its pages. Here the query heads of a KV head share a selection, by the largest
    bound, because they share keys.
    """

    joins_by_encoding: ClassVar[bool] = True

    select: int = Field(1024, ge=1)
    """Tokens per KV head that a decode step reads besides sinks and later tokens, a multiple of `page`."""
    page: int = Field(16, ge=1)
    """Tokens that are selected together."""
    dense: int = Field(2, ge=0)
    """First slots of which steps read all tokens, as in the paper."""

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if self.select % self.page:
            raise ValueError(f"select={self.select} is no multiple of page={self.page}")
        return self

    @property
    def selects_tokens(self) -> bool:
        return True

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise UserError(f"{self.name}: the slots are latents, whose keys are not stored; allowed: keys and values")
        budget = self.select // self.page
        codes: Codes = [None] * min(self.dense, len(keys.slots))
        paged = dataclasses.replace(keys, slots=keys.slots[self.dense :], data=keys.data[self.dense :])
        codes += paged.code_stacks(
            lambda stack: make_pages(stack.data[0], stack.is_text, page=self.page, budget=budget)
        )
        return codes, [None] * len(values.slots)
