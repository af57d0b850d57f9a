"""The base of all settings and of the records in files, and the bounds of numbers in them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

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


def create_section(name: str, base: type[Section], fields: dict[str, Any], doc: str | None = None) -> Any:
    """Create a subclass of `base` whose fields are computed.

    Args:
        name: of the class.
        base: its base class.
        fields: name: (annotation, default or `Field`), as for `pydantic.create_model`. Descriptions are in the fields.
        doc: the docstring.
    """
    # pydantic would look for docstrings of the fields in every frame of the stack, and for the module of each frame in
    # all modules: seconds if torch and transformers are loaded.
    cls = create_model(name, __base__=base, __doc__=doc, __cls_kwargs__={"use_attribute_docstrings": False}, **fields)
    cls.model_config["use_attribute_docstrings"] = True  # of subclasses
    return cls
