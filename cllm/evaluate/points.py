"""A point of a sweep: a run compressed by one method, or as it was trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TRAINED = "as trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run, compressed by one method or not at all."""

    run: str
    design: str
    spec: str
    """The method and its options; `as trained`: not compressed."""
    bytes_per_token: float
    """Bytes of cache per token of the prefix, with keys and values in bf16."""
    ratio_to_own: float
    """The run's uncompressed cache relative to this one."""
    ratio_to_mha: float
    """The cache of full attention, with a KV head for every query head, relative to this one."""
    perplexity: float
    increase_percent: float
    """Increase of the perplexity over the baseline's."""
    compression_share_of_prefill: float | None
    """Seconds of compression / seconds of prefill."""
    weight_bytes: int
    """Bytes that the method stores besides the model's weights, once for all caches."""
    host_bytes_per_token: float = 0.0
    """Bytes in host memory, which are not in `bytes_per_token`, with keys and values in bf16."""
    front: bool
    """Whether no other point has at most its bytes, is at least as good, and is better in one of the two."""
    window: int | None = None
    """Tokens of the windows that were scored; None: not recorded, as of the next three."""
    trained_tokens: int | None = None
    """Tokens that the run was trained on."""
    parameters: int | None = None
    text: str | None = None
    """The text that was scored, with its digest."""
    score: float | None = None
    """The number of a suite by which the points are compared in place of perplexity; None: not measured."""

    @property
    def method(self) -> str:
        """The method without its options; `xkv+kivi` for two in a row."""
        return "+".join(part.partition(":")[0] for part in self.spec.split("+"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A number of a suite for runs and ways to compress them."""

    head: str
    """Above its column, and at the axis of the figure."""
    form: Callable[[float], str]
    """The number in a table."""
    higher_is_better: bool
    values: Mapping[tuple[str, str], float]
    """By run and `Point.spec`."""

    def apply(self, points: Sequence[Point]) -> list[Point]:
        """The points with their scores, and with the front of bytes and score. Points without a score are not on it."""

        def cost(point: Point) -> float:
            if point.score is None:
                return math.inf
            return -point.score if self.higher_is_better else point.score

        scored = [dataclasses.replace(p, score=self.values.get((p.run, p.spec))) for p in points]
        places = [(point.bytes_per_token, cost(point)) for point in scored]
        return [
            dataclasses.replace(
                point,
                front=point.score is not None
                and not any(x <= place[0] and y <= place[1] and (x, y) != place for x, y in places),
            )
            for point, place in zip(scored, places, strict=True)
        ]
