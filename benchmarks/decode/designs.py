"""Designs and points of a decoding benchmark, as given on the command line.

NAME[:KEY=VALUE,...][@CONTEXTxBATCH,...] is a file of configs/kv/, settings under `model.kv` on top of it, and points
that replace those of --points: `gqa:n_kv_heads=4@1024x1,32768x16`. The key `storage` is the format of the cache:
`model` (bf16) or `fp8`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from cllm.cache.accounting import Storage, mha_twin
from cllm.config import Config, ModelConfig
from cllm.config.designs import parse_plan
from cllm.errors import UserError
from cllm.uptrain.complete import load_config

SHORTEST = 16
"""Tokens of the shortest context; the check of decoding needs room for a prompt and a few tokens."""


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A batch of sequences with `context` tokens each, the token being decoded included."""

    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.context}x{self.batch}"


@dataclass(frozen=True, slots=True)
class Design:
    """A KV plan with the config and the points that it is measured at."""

    label: str
    config: Config
    storage: Storage
    points: tuple[Point, ...]
    """Sorted by number of tokens."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def is_baseline(self) -> bool:
        """Whether other designs are compared with this one: full attention of all heads in every layer, in bf16."""
        return self.storage == "model" and self.model.plan() == mha_twin(self.model).plan()


def parse_point(word: str, option: str) -> Point:
    """`32768x4` as a `Point`. Raises `UserError` naming `option`."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", word)
    if match is None:
        raise UserError(f"{option}: {word!r} is not of the form CONTEXTxBATCH, as in 32768x4")
    point = Point(int(match[1]), int(match[2]))
    if point.context < SHORTEST:
        raise UserError(f"{option}: the context of {word} is {point.context}; allowed: {SHORTEST} or more")
    return point


def parse_points(words: Sequence[str], option: str) -> tuple[Point, ...]:
    """The points without duplicates, sorted by number of tokens."""
    points = {parse_point(word, option) for word in words}
    return tuple(sorted(points, key=lambda p: (p.context * p.batch, p)))


def parse_design(word: str, files: Sequence[str], overrides: Sequence[str], points: tuple[Point, ...]) -> Design:
    """One word of --designs, on top of the config given by `files` and `overrides`.

    Raises:
        UserError: as `parse_plan`, and for an unknown storage or setting.
    """
    label, at, own_points = word.partition("@")
    file, settings = parse_plan(label)
    storage: Any = settings.pop("storage", "model")
    if storage not in get_args(Storage):
        raise UserError(f"--designs {word}: storage is {storage}; allowed: {', '.join(get_args(Storage))}")
    words = [word for key, value in settings.items() for word in (f"--model.kv.{key}", value)]
    config = load_config([*files, file], [*overrides, *words])
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is null, and random tokens are drawn from it; allowed here: a number")
    if at:
        points = parse_points(own_points.split(","), f"--designs {word}")
    return Design(label, config, storage, points)
