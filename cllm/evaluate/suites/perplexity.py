"""Perplexity and bits per byte over windows; the default suite. `cllm/evaluate/perplexity.py` measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cllm.evaluate.suites.suite import RUN, SET, STEP, TOKENS, Job, Number, Record, Suite, perplexity_text
from cllm.tables import Column

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


def _loss_text(loss: float | None) -> str:
    """A mean loss in a table; a slice without tokens has none."""
    return "-" if loss is None else f"{loss:.4f}"


class Perplexity(Suite):
    """Every token of a text scored once, with at least half a window of context by default."""

    name = "perplexity"
    help = "perplexity and bits per byte over windows"
    numbers = (
        Number(key="loss", head="loss", tag="loss"),
        Number(key="perplexity", head="perplexity", form=perplexity_text, tag="ppl"),
        Number(key="bits_per_byte", head="bits/byte", tag="bits_per_byte"),
        Number(key="ar_loss", head="ar loss", form=_loss_text, tag="ar_loss"),
        Number(key="other_loss", head="other loss", form=_loss_text, tag="other_loss"),
    )
    compared = False  # its numbers have columns and rules of their own there
    named_by_number = True

    def check(self, subject: Subject, job: Job) -> None:
        job.settings.resolve(subject, job.device)

    def run(self, subject: Subject, job: Job) -> list[Record]:
        from cllm.evaluate.perplexity import measure

        assert job.text is not None
        return [measure(subject, job.text, job.settings, job.device)]

    def columns(self) -> Sequence[Column[Record]]:
        loss, perplexity, bits, recall, _ = (number.column() for number in self.numbers)
        window = Column[Record]("window/stride", lambda record: f"{record['window']}/{record['stride']}")
        estimated = Column[Record](bits.head, lambda record: ("" if record["bytes_exact"] else "~") + bits.cell(record))
        return (RUN, STEP, SET, TOKENS, loss, perplexity, estimated, recall, window)

    def scalars(self, record: Record) -> dict[str, float]:
        """The numbers above, and the loss of the associative-recall slice by distance: `ar_loss_1_63`, ..."""
        by_distance = {key: value for key, value in record.items() if key.startswith("ar_loss_") and value is not None}
        return super().scalars(record) | by_distance

    def file(self, name: str) -> str:
        return f"{name}.json"
