"""Load tests of servers: models of several designs with equal parameters, requests, and the table of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cllm.cache.accounting import kv_bytes
from cllm.config import ModelConfig
from cllm.config.load import validate

DESIGNS: dict[str, dict[str, Any]] = {
    "mha": {"preset": "mha"},
    "gqa": {"preset": "gqa"},
    "cla": {"preset": "cla"},
    "yoco": {"preset": "yoco", "window": 64},
    "fusedkv_lite": {"preset": "fusedkv_lite"},
    "fusedkv": {"preset": "fusedkv"},
}
"""Sections `kv`. All but `mha` and `yoco` cache half as much as `mha`; `yoco` less, besides its windows."""
DTYPES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class Load:
    """The requests that a server gets, and the cache that it has for them."""

    requests: int
    concurrency: int
    """Requests that are under way or waiting at any time."""
    prompt: int
    """Tokens of a prompt."""
    new: int
    """Tokens of an answer."""
    cache_bytes: int
    """Of the server's KV cache."""
    chunk: int
    """Tokens that the server computes in a pass at most."""

    @property
    def context(self) -> int:
        """Tokens of a request at its end."""
        return self.prompt + self.new

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Different token ids for each request."""
        ids = range(self.prompt)
        return [[(7 * n + 13 * t + n * t) % (vocabulary - 3) + 1 for t in ids] for n in range(self.requests)]


@dataclass
class Timing:
    """When the tokens of an answer came, in seconds since the request."""

    tokens: list[float]

    @property
    def between(self) -> list[float]:
        """Seconds between one token and the next."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass
class Most:
    """The largest numbers during a load test."""

    requests: int = 0
    """That ran at once."""
    tokens: int = 0
    """In the cache at once."""
    used: float | None = None
    """Share of the cache's blocks in use, as the engine reports; None if it reports none."""

    def add(self, requests: int, tokens: int, used: float | None = None) -> None:
        """Count a sample."""
        self.requests, self.tokens = max(self.requests, requests), max(self.tokens, tokens)
        if used is not None:
            self.used = max(self.used or 0.0, used)


@dataclass
class Result:
    """The measurements of one design."""

    design: str
    parameters: int
    tokens_per_second: float
    first: float
    """Median seconds to the first token."""
    between: float
    """Median seconds from one token to the next."""
    cached: int
    """Tokens that the cache has room for, as the engine reports."""
    nbytes: float
    """Bytes of the cache, divided by those tokens."""
    predicted: float
    """Bytes a token of the plan at the context of the requests."""
    most: Most
    preemptions: int


COLUMNS = ("design", "parameters", "tokens/s", "first token", "between tokens", "bytes a token", "predicted",
           "tokens in the cache", "of mha", "tokens at once", "of mha", "cache in use", "requests at once",
           "preemptions")  # fmt: skip


def make_result(
    design: str, model: tuple[ModelConfig, int], load: Load, timings: Sequence[Timing], seconds: float, dtype: str,
    *, cached: int, most: Most, preemptions: int,
) -> Result:  # fmt: skip
    """The result of a design from the times of its requests.

    Args:
        design: its name.
        model: its config and the number of its parameters.
        load: the requests.
        timings: of each request.
        seconds: from the first request to the last answer.
        dtype: of the cache.
        cached: tokens that the cache has room for.
        most: the largest samples.
        preemptions: requests that were evicted and computed again.
    """
    config, parameters = model
    return Result(
        design=design,
        parameters=parameters,
        tokens_per_second=load.requests * load.new / seconds,
        first=median(t.tokens[0] for t in timings),
        between=median(gap for t in timings for gap in t.between),
        cached=cached,
        nbytes=load.cache_bytes / cached,
        predicted=kv_bytes(config, context=load.context, bytes_per_element=DTYPES[dtype]).resident,
        most=most,
        preemptions=preemptions,
    )


def export(design: str, sizes: dict[str, Any], folder: Path) -> tuple[ModelConfig, int]:
    """Write a model of a design with random weights; returns its config and the number of its parameters.

    Args:
        design: of `DESIGNS`.
        sizes: the other keys of the section `model`.
        folder: the new folder.
    """
    import torch

    from cllm.hub.export import as_pretrained, save
    from cllm.model.sizes import build_decoder, count_parameters

    torch.manual_seed(0)
    config = validate(ModelConfig, {**sizes, "match_params": True, "kv": DESIGNS[design]})
    decoder = build_decoder(config)
    save(as_pretrained(decoder), folder, "5GB")
    return config, count_parameters(decoder)


def table(results: Sequence[Result]) -> str:
    """Markdown. The columns `of mha` are empty if mha was not measured."""
    mha = next((result for result in results if result.design == "mha"), None)
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(_cells(result, mha) for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(result: Result, mha: Result | None) -> list[str]:
    return [
        result.design,
        f"{result.parameters:,}",
        f"{result.tokens_per_second:.0f}",
        f"{1000 * result.first:.0f} ms",
        f"{1000 * result.between:.0f} ms",
        f"{result.nbytes:,.0f}",
        f"{result.predicted:,.0f}",
        f"{result.cached:,}",
        "" if mha is None else f"{result.cached / mha.cached:.2f}",
        f"{result.most.tokens:,}",
        "" if mha is None else f"{result.most.tokens / mha.most.tokens:.2f}",
        "" if result.most.used is None else f"{result.most.used:.0%}",
        str(result.most.requests),
        str(result.preemptions),
    ]
