"""The grid of a study: its variants, its points, and the config of a point."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cllm.config import Config
from cllm.config.load import merge, validate
from cllm.config.shipped import find_config
from cllm.counts import count_text
from cllm.errors import UserError
from cllm.study.matching import CacheMatch, match_cache, scaled_tokens
from cllm.study.schema import Study
from cllm.uptrain.complete import complete
from cllm.version import config_hash, data_hash
from cllm.yaml_text import read_yaml

Settings = tuple[tuple[str, Any], ...]
_LONGEST_NAME = 180
"""Characters of a point's name before its key. File systems allow 255, and files of a point have longer names."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A design with one value of each further axis: a row of the report."""

    design: str
    settings: Settings = ()

    def __hash__(self) -> int:
        return hash((self.design, tuple(key for key, _ in self.settings)))  # values may be lists and mappings

    @property
    def label(self) -> str:
        """`mha`, or `mha, weight_decay=0.1`."""
        return ", ".join([self.design, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.settings)])


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the grid. Points with the same key are the same run."""

    variant: Variant
    tokens: int
    """Token budget as declared, before designs of equal FLOPs are scaled."""
    seed: int
    rate: float | None
    """Learning rate of a search; None: that of the configs."""
    declared: str
    """Hash of everything that the study declares for the run."""
    code: str
    """Version of the code that trains it."""
    search: bool = field(default=False, compare=False)
    """Whether it belongs to the search of a learning rate only: its budget is not one of the study's `tokens`."""

    @property
    def key(self) -> str:
        """Identifies declaration and code together."""
        return data_hash([self.code, self.declared])[:8]

    @property
    def short_name(self) -> str:
        """The point in words, without its version."""
        rate = "" if self.rate is None else f", lr {self.rate:g}"
        return f"{self.variant.label}{rate}, {count_text(self.tokens)}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The name of its run and files; ends in the key, so that another version has another name."""
        words = [self.variant.label.replace("=", "")]
        words += [] if self.rate is None else [f"lr{self.rate:g}"]
        words += [count_text(self.tokens), f"s{self.seed}", self.key]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words[:-1]))
        return f"{name[:_LONGEST_NAME]}-{self.key}"


class Grid:
    """The points of a study for one version of the code.

    Args:
        study: the declaration.
        code: version of the code.
        only: designs to keep; empty: all.
    """

    def __init__(self, study: Study, code: str, only: Sequence[str] = ()):
        self.study, self.code = study, code
        designs = [name for name in study.designs if not only or name in only]
        axes = [[(key, value) for value in values] for key, values in study.settings.items()]
        self.variants = [Variant(name, settings) for name in designs for settings in itertools.product(*axes)]
        self._base: dict[str, Any] = {}
        for name in study.base:
            self._base = merge(self._base, read_yaml(find_config(name)))
        self._base = merge(self._base, dict(study.overrides))
        self._declared = lru_cache(maxsize=None)(self._declare)
        self._configs = lru_cache(maxsize=None)(self._variant_config)

    def baseline_of(self, variant: Variant) -> Variant:
        """The baseline with the settings of a variant."""
        return Variant(self.study.baseline, variant.settings)

    def point(self, variant: Variant, tokens: int, seed: int, rate: float | None, *, search: bool = False) -> Point:
        """One point of the grid; with `search` one of a search, which may be a run of full length as well."""
        study = self.study
        search = search and tokens not in study.tokens
        ratio = study.match.ratio(variant.design, study.baseline)
        match = study.match.model_dump(mode="json") | {"cache_bytes": None if ratio is None else str(ratio)}
        declared: dict[str, Any] = {"config": self._declared(variant), "match": match}
        if study.match.flops:
            declared["baseline"] = self._declared(self.baseline_of(variant))
        declared |= {"tokens": tokens, "seed": seed, "rate": rate, "validations": study.validations}
        return Point(variant, tokens, seed, rate, data_hash(declared), self.code, search)

    def all_points(self) -> Iterator[Point]:
        """Every point that could be asked for, whatever the search finds; those of the search last."""
        study = self.study
        for variant in self.variants:
            rates: list[float | None] = [None]
            if study.rates is not None:
                values = study.rates.search_of(variant.design).reachable
                rates = [*dict.fromkeys([*values, *study.rates.known_of(variant.design)])]
            for tokens, seed, rate in itertools.product(study.tokens, study.seeds_of(variant.design), rates):
                yield self.point(variant, tokens, seed, rate)
        if study.rates is not None:
            for variant in self.variants:
                halving = study.rates.search_of(variant.design)
                for tokens, rate in itertools.product(halving.budgets, halving.reachable):
                    yield self.point(variant, tokens, study.seeds_of(variant.design)[0], rate, search=True)

    def _parts(self, design: str) -> dict[str, Any]:
        """The design's own settings."""
        own: dict[str, Any] = {}
        for part in self.study.designs[design]:
            own = merge(own, read_yaml(find_config(part)) if isinstance(part, str) else dict(part))
        return own

    def _data(self, variant: Variant) -> dict[str, Any]:
        """The merged settings of a variant, as declared."""
        data = merge(self._base, self._parts(variant.design))
        for key, value in variant.settings:
            tree: Any = value
            for part in reversed(key.split(".")):
                tree = {part: tree}
            data = merge(data, tree)
        return data

    def _declare(self, variant: Variant) -> str:
        return config_hash(self._data(variant))

    def cache_match(self, variant: Variant) -> CacheMatch | None:
        """The change of a variant's cache by the rule; None if the rule leaves it as it is."""
        return self._configs(variant)[1]

    def config(self, point: Point, runs_dir: Path) -> Config:
        """The complete config of a point.

        Raises:
            UserError: for settings that are not valid, and for a design that the rule cannot make equal.
        """
        config, _ = self._configs(point.variant)
        per_step = config.train.global_batch * config.data.seq_len
        tokens = point.tokens
        if self.study.match.flops and point.variant.design != self.study.baseline:
            baseline, _ = self._configs(self.baseline_of(point.variant))
            tokens = scaled_tokens(tokens, sized(config), sized(baseline))
        steps = max(1, round(tokens / per_step))
        train = {"steps": steps, "seed": point.seed, "devices": 1, "keep_checkpoints": 1}
        train["validate_every"] = -(-steps // self.study.validations)
        update = {"name": point.name, "runs_dir": str(runs_dir), "train": config.train.model_copy(update=train)}
        if point.rate is not None:  # the end of the schedule keeps its share of the peak
            optim = config.optim
            low = float(f"{optim.min_lr * point.rate / optim.lr:.10g}")
            update["optim"] = optim.model_copy(update={"lr": point.rate, "min_lr": low})
        return config.model_copy(update=update)

    def _variant_config(self, variant: Variant) -> tuple[Config, CacheMatch | None]:
        data = self._data(variant)
        if self.study.match.parameters:
            data = merge(data, {"model": {"match_params": True}})
        try:
            config = validate(Config, complete(data)[0])
            wanted = self.study.match.ratio(variant.design, self.study.baseline)
            if wanted is None:
                return config, None
            given = self._parts(variant.design).get("model", {}).get("kv", {})
            match = match_cache(config.model, wanted, set(given))
            if match.kv:
                kv = {**config.model.kv.model_dump(mode="json"), **match.kv}
                data = config.as_yaml_data()
                config = validate(Config, {**data, "model": {**data["model"], "kv": kv}})
        except UserError as error:
            raise UserError(f"study {self.study.name}, design {variant.label}: {error}") from None
        return config, match


def sized(config: Config) -> Config:
    """`config` with `model.vocab_size`, from its data if it has none.

    Raises:
        UserError: without `model.vocab_size`, for data that are not prepared.
    """
    if config.model.vocab_size is not None:
        return config
    from cllm.train.run import with_vocabulary

    return with_vocabulary(config)
