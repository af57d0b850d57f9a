"""What a benchmark of decoding is asked to measure: designs, and points of context x batch.

NAME[:KEY=VALUE,...][@CONTEXTxBATCH,...] is a file of configs/kv/, settings under `model.kv` on top of it, and points of
its own instead of everybody's: `gqa:n_kv_heads=4@1024x1,32768x16`. The key `storage` says what slots are stored in:
`model` (bf16) or `fp8`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cllm.cache.accounting import Storage, mha_twin
from cllm.config import Config, ModelConfig
from cllm.errors import UserError, nearest
from cllm.uptrain.complete import load_config

PLANS = Path(__file__).resolve().parents[2] / "configs" / "kv"
SHORTEST = 16
"""Tokens of the shortest context: decoding is checked on a prompt and a few tokens inside of it."""


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """Sequences of a batch, each with `context` tokens, the one being decoded included."""

    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.context}x{self.batch}"


@dataclass(frozen=True, slots=True)
class Design:
    """A KV plan on the shape that is measured."""

    label: str
    config: Config
    storage: Storage
    points: tuple[Point, ...]
    """Those with the fewest tokens first."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def is_baseline(self) -> bool:
        """Whether it is what others are compared with: full attention of all heads in every layer, in bf16."""
        return self.storage == "model" and self.model.plan() == mha_twin(self.model).plan()


def parse_point(word: str, where: str) -> Point:
    """`32768x4` as a `Point`. Raises `UserError` naming `where`."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", word)
    if match is None:
        raise UserError(f"{where}: {word!r} is not of the form CONTEXTxBATCH, as in 32768x4")
    point = Point(int(match[1]), int(match[2]))
    if point.context < SHORTEST:
        raise UserError(f"{where}: the context of {word} is {point.context}; allowed: {SHORTEST} or more")
    return point


def parse_points(words: Sequence[str], where: str) -> tuple[Point, ...]:
    """Each point once, those with the fewest tokens first."""
    points = {parse_point(word, where) for word in words}
    return tuple(sorted(points, key=lambda p: (p.context * p.batch, p)))


def parse_plan(word: str) -> tuple[Path, dict[str, str]]:
    """`NAME[:KEY=VALUE,...]` as a file of configs/kv/ and settings of `model.kv`.

    Raises:
        UserError: for a word of another form, or a name that is no file of configs/kv/.
    """
    name, colon, text = word.partition(":")
    known = sorted(file.stem for file in PLANS.glob("*.yaml"))
    if name not in known:
        raise UserError(f"--designs {word}: configs/kv/ has no {name}.yaml; {nearest(name, known)}")
    settings: dict[str, str] = {}
    for part in re.split(r",(?![^\[]*\])", text) if colon else []:  # a comma inside brackets belongs to a list
        key, equals, value = part.partition("=")
        if not key or not equals:
            raise UserError(f"--designs {word}: {part!r} is not of the form KEY=VALUE")
        settings[key] = value
    return PLANS / f"{name}.yaml", settings


def parse_design(word: str, files: Sequence[str], overrides: Sequence[str], points: tuple[Point, ...]) -> Design:
    """One word of --designs on top of the config that `files` and `overrides` spell.

    Raises:
        UserError: as `parse_plan`, and for a storage or a setting that does not exist.
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
