"""The base of methods that weight errors of keys and values by what they change in attention's output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from pydantic import PrivateAttr, model_validator

from cllm.errors import UserError
from cllm.posthoc.method import Compressor, Engine, naming
from cllm.posthoc.readers import RecordedQueries, SlotReader, not_recorded
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.weighting import ErrorWeights


class Weighted(Compressor):
    """A method with an option that needs the weights of errors (`weighting.py`), for which it records queries."""

    _queries: RecordedQueries = PrivateAttr(default_factory=RecordedQueries)
    _readers: dict[int, list[SlotReader]] = PrivateAttr(default_factory=dict)

    @property
    @abstractmethod
    def weighting(self) -> str | None:
        """The option that needs the weights, such as `weight=queries`, for errors; None: it is not given."""

    @property
    def unweighted(self) -> str:
        """The option to use where there are no weights, for errors."""
        return "weight=none"

    @model_validator(mode="after")
    def _check_weighting(self) -> Self:
        if self.weighting is not None and self.recompress is not None:
            raise ValueError(
                f"recompress={self.recompress}: {self.weighting} needs the queries of all tokens, and those of later "
                "tokens are not recorded; allowed: one of the two"
            )
        return self

    @property
    def watches(self) -> bool:
        return self.weighting is not None

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Record queries while the cache is filled, if errors are weighted by them."""
        if self.weighting is None:
            yield
            return
        with naming(f"{self.name}: {self.weighting}"):
            self._readers = {slot: engine.readers(slot) for slot in engine.slots()}
        self._queries = RecordedQueries(user=self.weighting)
        with engine.all_tokens(), self._queries.record(self._readers):
            yield

    def release(self) -> None:
        self._queries, self._readers = RecordedQueries(), {}

    def error_weights(self, keys: SlotTensors, values: SlotTensors | None) -> ErrorWeights:
        """The weights of errors in `keys`, before RoPE, and `values`.

        Raises:
            UserError: for latents, or if no queries were recorded.
        """
        assert self.weighting is not None
        if values is None or keys.rope is None:
            raise UserError(
                f"{self.name}: {self.weighting}: the slots are latents; allowed: keys and values, or {self.unweighted}"
            )
        if not self._readers:
            raise UserError(not_recorded(self.weighting))
        return ErrorWeights(keys, values, self._readers, self._queries)
