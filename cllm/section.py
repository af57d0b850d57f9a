"""The base of every part of a config and of every record in a file, and the bounds of its numbers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Bounds that no research needs to exceed, and with which no config can exhaust the process that reads it.
MAX_HEADS = 2**16
MAX_WIDTH = 2**20
"""Channels: of the stream, a head, a hidden layer, a latent."""
MAX_TOKENS = 2**31 - 1
"""Tokens of a context, a window, a vocabulary."""
MAX_COUNT = 10**9
"""Steps, sequences, processes."""
MAX_WORKERS = 1024
"""Loader processes of one training process: each takes hundreds of MiB, and a machine that runs out kills others."""
MAX_PASSES = 65536
MAX_SEED = 2**32 - 1
"""Of numpy's generator."""


class Section(BaseModel):
    """A part of a config: unknown keys are errors, types are strict, numbers finite; a docstring under a field is its
    description."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
