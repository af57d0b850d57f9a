"""A loss as a perplexity, and names of sets in file names. Comparing runs needs no more, and so no torch."""

from __future__ import annotations

import math
import re


def perplexity(loss: float) -> float:
    """e^loss for a loss in nats; infinity where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def set_label(name: str) -> str:
    """The name of a validation set, a folder or a file as a part of file names: other characters become `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "set"
