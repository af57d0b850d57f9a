"""Strided windows: every token once, with the context that is promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cllm.errors import UserError
from cllm.evaluate.windows import Stream, batches, windows

SHAPES = [(w, s) for w in (1, 2, 3, 5, 8, 13) for s in range(1, w + 1)]


@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_each_token_is_scored_once_in_order_with_enough_context(window: int, stride: int) -> None:
    for n_tokens in range(30):
        scored: list[int] = []
        for span in windows(n_tokens, window, stride):
            assert 0 <= span.start < span.stop <= span.start + window
            targets = range(span.stop - span.scored + 1, span.stop + 1)
            assert span.start == 0 or all(t - span.start >= window - stride + 1 for t in targets)
            scored += targets
        assert scored == list(range(1, n_tokens))


def test_stride_of_the_window_feeds_each_token_once() -> None:
    assert [(span.start, span.stop) for span in windows(10, 4, 4)] == [(0, 4), (4, 8), (8, 9)]


@pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (4, -1)])
def test_a_stride_that_would_skip_or_stand_still_is_refused(window: int, stride: int) -> None:
    with pytest.raises(UserError, match=f"stride is {stride}; allowed: 1 to the window, {window}"):
        list(windows(10, window, stride))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batches_hold_windows_of_one_shape_and_keep_their_order(size: int) -> None:
    spans = list(windows(43, 8, 3))
    grouped = list(batches(iter(spans), size))
    assert list(itertools.chain(*grouped)) == spans
    for batch in grouped:
        assert len(batch) <= size
        assert len({(span.stop - span.start, span.scored) for span in batch}) == 1


class _Counting:
    def __len__(self) -> int:
        return 7

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= 7
        return np.arange(100 + start, 100 + stop)

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


def test_a_stream_starts_with_its_start_token_and_ends_at_its_limit() -> None:
    with_start, cut = Stream(_Counting(), start_id=5), Stream(_Counting(), limit=3)
    assert len(with_start) == 8
    assert with_start.read(0, 3).tolist() == [5, 100, 101]
    assert with_start.read(0, 1).tolist() == [5]
    assert with_start.read(6, 8).tolist() == [105, 106]
    assert len(cut) == 3
    assert cut.read(0, 3).tolist() == [100, 101, 102]
    assert len(Stream(_Counting(), limit=100)) == 7
