"""The text on which methods calibrate: `--calibration`.

Without it a method calibrates on tokens of the text that is scored, though on none that is scored itself. Text of the
same document favours a method that calibrates over one that does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cllm.data.manifest import MANIFEST
from cllm.errors import UserError
from cllm.evaluate.subjects import Subject
from cllm.evaluate.texts import open_prepared, open_text
from cllm.evaluate.windows import Stream, pieces
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import parse

SPLIT = "train"
"""The split of a prepared folder that methods calibrate on."""


def check_is_used(path: Path | None, specs: Sequence[str], option: str = "--calibration") -> None:
    """Raise `UserError`, naming the option or argument, for a calibration text that none of the methods calibrates
    on."""
    if path is None:
        return
    if not specs:
        raise UserError(f"{option} {path}: needs posthoc methods, which calibrate on it")
    if not any(parse(spec).calibrates for spec in specs):
        raise UserError(f"{option} {path}: none of {', '.join(specs)} calibrates on a text; leave it out")


def calibration_tokens(subject: Subject, path: Path | None, own: Tensor) -> Tensor:
    """The tokens (B, T) on which methods calibrate: `own` without a `path`, else as many of that text.

    They are its first sequences of T tokens: B, or as many as it has. With document masks a sequence lies within a
    document.

    Args:
        path: a prepared folder, whose train split is read, or a text file.
        own: (B, T), of the text that is scored.

    Raises:
        UserError: for a text that cannot be read, or has no T tokens.
    """
    if path is None:
        return own
    try:
        is_prepared = (path / MANIFEST).exists()
        text = open_prepared(path.name, path, SPLIT, subject) if is_prepared else open_text(path.stem, path, subject)
    except UserError as error:
        raise UserError(f"calibration text: {error}") from None
    rows, length = own.shape
    stream = Stream(text.source, start_id=subject.start_id)
    found = list(itertools.islice(pieces(subject, stream, length - 1), rows))
    if not found:
        inside = " inside of one document" if subject.document_mask else ""
        raise UserError(f"calibration text: {path}: too short: it has no {length} tokens{inside}")
    return torch.from_numpy(np.stack(found)).to(own.device)


def calibration_of(path: Path | None, method: Compressor) -> str | None:
    """`calibration` of a record: the text that the method has calibrated on; None for tokens of the scored text, and
    for a method that does not calibrate."""
    return str(path) if path is not None and method.calibrates else None
