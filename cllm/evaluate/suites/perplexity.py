"""Perplexity and bits per byte over windows; the default suite. `cllm/evaluate/perplexity.py` measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cllm.evaluate.suites.suite import RUN, SET, STEP, TOKENS, Job, Number, Record, Suite, perplexity_text
from cllm.tables import Column

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class Perplexity(Suite):
    """Every token of a text scored once, with at least half a window of context by default."""

    name = "perplexity"
    help = "perplexity and bits per byte over windows"
    numbers = (
        Number(key="loss", head="loss", tag="loss"),
        Number(key="perplexity", head="perplexity", form=perplexity_text, tag="ppl"),
        Number(key="bits_per_byte", head="bits/byte", tag="bits_per_byte"),
    )
    compared = False  # its numbers have columns and rules of their own there

    def check(self, subject: Subject, job: Job) -> None:
        job.settings.resolve(subject, job.device)

    def run(self, subject: Subject, job: Job) -> list[Record]:
        from cllm.evaluate.perplexity import measure

        assert job.text is not None
        return [measure(subject, job.text, job.settings, job.device)]

    def columns(self) -> Sequence[Column[Record]]:
        loss, perplexity, bits = (number.column() for number in self.numbers)
        window = Column[Record]("window/stride", lambda record: f"{record['window']}/{record['stride']}")
        estimated = Column[Record](bits.head, lambda record: ("" if record["bytes_exact"] else "~") + bits.cell(record))
        return (RUN, STEP, SET, TOKENS, loss, perplexity, estimated, window)

    def file(self, name: str) -> str:
        return f"{name}.json"
