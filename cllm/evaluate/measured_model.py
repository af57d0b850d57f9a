"""`Measured`: a trained model with the records of its measurements."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cllm.evaluate.points import TRAINED
from cllm.evaluate.suites.suite import Record
from cllm.evaluate.tasks.suite import AS_IS
from cllm.posthoc import UNCOMPRESSED

EXACT = ""
"""The spec of the uncompressed cache, whatever its record calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A trained model, and the records of its measurements."""

    name: str
    """The run's."""
    label: str
    """The design, or the run's name."""
    alike: str
    """Equal for runs that differ in their seed only."""
    kv_bytes: float | None = None
    """Resident cache in bf16, bytes for each token of context; None: unknown."""
    kv_vs_mha: float | None = None
    """The same relative to full attention."""
    loss: float | None = None
    """The last validation in training, nats per token."""
    text: str = ""
    """The text of `loss`; losses on one text only are compared."""
    folder: str | None = None
    """Folder of a Hugging Face checkpoint. Many have one base name; other runs have a name of their own."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By which runs of one label can differ: token budget, learning rate and code of a study's run, a folder."""
    records: tuple[Record, ...] = ()

    def joined(self, other: Measured) -> Measured:
        """The facts of both, those of the source that knows the cache first, and all records."""
        first, second = (self, other) if self.kv_bytes is not None else (other, self)
        return dataclasses.replace(
            first,
            kv_bytes=second.kv_bytes if first.kv_bytes is None else first.kv_bytes,
            kv_vs_mha=second.kv_vs_mha if first.kv_vs_mha is None else first.kv_vs_mha,
            loss=second.loss if first.loss is None else first.loss,
            text=second.text if first.loss is None else first.text,
            folder=first.folder or second.folder,
            records=(*self.records, *other.records),
        )


def spec_of(record: Record) -> str:
    """The spec of a record; `EXACT` for an uncompressed cache."""
    spec = record.get("spec") or EXACT
    return EXACT if spec in (AS_IS, TRAINED, UNCOMPRESSED) else spec
