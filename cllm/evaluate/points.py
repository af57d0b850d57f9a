"""A point of a sweep: a run compressed by one method, or as it was trained."""

from __future__ import annotations

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
    front: bool

    @property
    def method(self) -> str:
        """The method without its options; `xkv+kivi` for two in a row."""
        return "+".join(part.partition(":")[0] for part in self.spec.split("+"))
