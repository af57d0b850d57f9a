"""A loss as a perplexity; here, apart from what measures it, so that comparing runs does without torch."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """e^loss for a loss in nats; infinity where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf
