"""A loss as a perplexity, and names of sets in file names; without torch, for comparisons."""

from __future__ import annotations

import hashlib
import math
import re


def perplexity(loss: float) -> float:
    """e^loss for a loss in nats; infinity if that exceeds a float."""
    return math.exp(loss) if loss < 709 else math.inf


def set_label(name: str) -> str:
    """A set's name as part of file names: characters other than letters, digits, `.`, `_` and `-` become `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "set"


def calibration_slug(path: str | None) -> str:
    """A part of the name of a record's file, for the text that its method calibrates on. Two texts never have the
    same."""
    return "" if path is None else f"-calibration-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
