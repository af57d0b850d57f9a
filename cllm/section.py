"""The base of all settings and of the records in files, and the bounds of numbers in them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Larger than any research needs, and small enough that no config can exhaust the process that reads it.
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
"""The largest seed that numpy's generator takes."""


class Section(BaseModel):
    """Settings, or a record in a file: unknown keys are errors, types are strict, numbers are finite.

    A docstring under a field is its description.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
