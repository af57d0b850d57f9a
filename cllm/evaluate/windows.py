"""Strided windows: every token of a long stream is scored once, with a context of at least W - S + 1 tokens.

With window W and stride S, the model is fed the tokens [kS, kS + W) of window k and predicts the token after each. The
first window scores all its predictions. Each later one scores its last S predictions, which no earlier window has
scored. S = W is the cheapest, but a window's first tokens have little context. With S = 1 every token has W tokens of
context, at W times the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cllm.errors import UserError
from cllm.evaluate.texts import TokenSource

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


class Window(NamedTuple):
    """The tokens [start, stop) of a stream are fed; the last `scored` predictions count."""

    start: int
    stop: int
    scored: int


def windows(n_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of `n_tokens`: tokens 1 to n_tokens - 1 are each scored once, in order.

    Raises `UserError` unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride is {stride}; allowed: 1 to the window, {window}: a longer one would skip tokens")
    scored, start = 0, 0
    while scored < n_tokens - 1:
        stop = min(start + window, n_tokens - 1)
        yield Window(start, stop, stop - scored)
        scored, start = stop, start + stride


def batches(spans: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Group up to `size` consecutive windows of one shape, so that no batch needs padding."""
    batch: list[Window] = []
    for span in spans:
        first = batch[0] if batch else span
        if len(batch) == size or (span.stop - span.start, span.scored) != (first.stop - first.start, first.scored):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


class Stream:
    """The tokens of a set as fed to a model: a start token, if there is one, then the first `limit` tokens.

    The start token is the context of the text's first token, as the EOS before it is for every other document. Without
    one (`start_id` None) the first token is context only and is not scored.
    """

    def __init__(self, source: TokenSource, *, start_id: int | None = None, limit: int | None = None):
        self._source, self._start_id = source, start_id
        self._offset = 0 if start_id is None else 1
        self._length = min(len(source), limit or len(source)) + self._offset

    def __len__(self) -> int:
        """The number of tokens, the start token included; one more than can be scored."""
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64 (stop - start,)."""
        tokens = self._source.read(max(start - self._offset, 0), stop - self._offset)
        return tokens if start >= self._offset else np.concatenate([[self._start_id], tokens]).astype(np.int64)

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Document ids and positions of the window, as `TokenStore.documents`; only without a start token."""
        assert self._start_id is None, "a start token belongs to no document"
        return self._source.documents(start, stop)


def pieces(subject: Subject, stream: Stream, window: int) -> Iterator[np.ndarray]:
    """The tokens (window + 1,) of every window; with document masks, only of windows within one document."""
    for start in range(0, len(stream) - window, window + 1):
        if subject.document_mask and len(set(stream.documents(start, start + window + 1)[0])) > 1:
            continue
        yield stream.read(start, start + window + 1)
