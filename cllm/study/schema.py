"""`Study`: the settings of a study's YAML file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from cllm.config.load import merge, parse_overrides, validate
from cllm.config.shipped import find_config
from cllm.counts import parse_count
from cllm.errors import UserError, nearest
from cllm.section import MAX_SEED, Section
from cllm.study.halving import Halving
from cllm.yaml_text import read_yaml

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_LONGEST_NAME = 100
_NAMED = 4
"""Most designs of one share that the rule names; of more it has the number."""
_GIVEN = {"name": "name", "runs_dir": "--runs", "train.steps": "tokens", "train.seed": "seeds"}
_GIVEN |= {"train.validate_every": "validations"}
"""Settings of runs that a study sets, and by what."""
DEFAULT = "default"
"""The key of a mapping by design that is valid for all designs it does not name."""


def _ratio(value: Any) -> str:
    try:
        ratio = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise ValueError(f"is {value!r}; allowed: a share of mha's cache such as 1/2, above 0 and at most 1")
    return str(ratio)


def _words(line: str) -> list[str]:
    """The words of a command line. Raises `ValueError` if a quotation does not end."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"is {line!r}: {str(error).lower()}; allowed: words as in a shell") from None


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Tokens = Annotated[int, BeforeValidator(parse_count)]
Ratio = Annotated[str, BeforeValidator(_ratio)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Part = str | dict[str, JsonValue]
"""A config file, or settings as in one."""


class Match(Section):
    """The rule by which designs are made equal. Several may be combined."""

    parameters: bool = False
    """Widen or narrow the feed-forward layers until all designs have as many parameters as mha."""
    cache_bytes: Ratio | dict[str, Ratio] | None = None
    """Share of mha's resident cache that designs have, by KV heads, sharing factor or rank: for all designs but the
    baseline, or as design: share, with `default` for the others."""
    flops: bool = False
    """Scale the tokens of a design so that its training takes as many FLOPs as the baseline's."""

    def ratio(self, design: str, baseline: str) -> Fraction | None:
        """The share of mha's cache that a design shall have; None: as declared."""
        if isinstance(self.cache_bytes, dict):
            others = None if design == baseline else self.cache_bytes.get(DEFAULT)
            found = self.cache_bytes.get(design, others)
            return None if found is None else Fraction(found)
        return None if self.cache_bytes is None or design == baseline else Fraction(self.cache_bytes)

    @property
    def rule(self) -> str:
        """The rule in words, for tables."""
        words = []
        if self.parameters:
            words.append("equal parameters")
        if isinstance(self.cache_bytes, dict):
            by_ratio: dict[str, list[str]] = {}
            for design, ratio in self.cache_bytes.items():
                by_ratio.setdefault(ratio, []).append("other designs" if design == DEFAULT else design)
            for ratio, names in by_ratio.items():
                named = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} designs"
                words.append(f"{named}: {ratio} of mha's cache bytes")
        elif self.cache_bytes is not None:
            words.append(f"{self.cache_bytes} of mha's cache bytes")
        words.append("equal training FLOPs" if self.flops else "equal tokens")
        return ", ".join(words)


def _match(value: Any) -> Any:
    rules = [name for name, field in Match.model_fields.items() if field.annotation is bool]
    if isinstance(value, str) and value not in rules:
        mapping = ", ".join(Match.model_fields)
        raise ValueError(f"is {value!r}, and no mapping of {mapping}; {nearest(value, rules)}")
    return {value: True} if isinstance(value, str) else value


class Rates(Section):
    """The search of each design's learning rate, see `Halving`, on runs that are shorter than the others."""

    values: Annotated[list[Rate] | dict[str, list[Rate]], Field(min_length=1)]
    """Learning rates of the first round: a list, or design: list with `default` for the others."""
    tokens: Tokens
    """Tokens of a run in the last round."""
    keep: int = Field(1, ge=1)
    """Number of rates that the long runs use."""
    extend: int = Field(0, ge=0, le=10)
    """Most rates that are added beyond the values, one by one, while the best rate is the smallest or largest."""
    known: Rate | dict[str, Rate] | None = None
    """The best rate known so far, for all designs or as design: rate. The first seed is trained with it before the
    search begins, so that there is a table early."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        by_name = self.values if isinstance(self.values, dict) else {"": self.values}
        for design, values in by_name.items():
            of = f" of {design}" if design else ""
            if len(set(values)) < len(values):
                raise ValueError(f"values{of} {values} has a rate twice")
            if self.keep > len(values):
                raise ValueError(f"keep is {self.keep}, and there are {len(values)} values{of}")
        return self

    def search_of(self, design: str) -> Halving:
        """The search of a design's rate. Raises `ValueError` if it has no values."""
        return Halving(_needed(self.values, design, "rates.values"), self.tokens, self.keep, self.extend)

    def known_of(self, design: str) -> list[float]:
        """The known rate of a design, if it has one."""
        known = _by_design(self.known, design)
        return [] if known is None else [known]


ShareGPU = bool | Literal["trainings", "evaluations"]
"""Values of `share_gpu`."""


class Evaluate(Section):
    """Measurements of every trained point, as by `cllm evaluate`."""

    data: list[str] = Field(default_factory=list)
    """Prepared folders and text files; empty: the run's validation sets."""
    suites: list[str] = Field(default_factory=list)
    """Suites with their options, such as "perplexity --max-tokens 100000"."""
    posthoc: list[str] = Field(default_factory=list)
    """Specs of --posthoc."""
    options: str = ""
    """Further options of every command, such as "--batch 8"."""

    def commands(self) -> list[list[str]]:
        """The words of each `cllm evaluate`, without `--run`."""
        common = [*(["--data", *self.data] if self.data else []), *shlex.split(self.options)]
        found = []
        for line in self.suites:
            name, *options = shlex.split(line)
            found.append(["--suite", name, *options, *(common if self.data else shlex.split(self.options))])
        if self.posthoc:
            found.append([*(word for spec in self.posthoc for word in ("--posthoc", spec)), *common])
        return [[*words, "--skip-refused"] if "--posthoc" in words else words for words in found]

    @field_validator("suites")
    @classmethod
    def _check_suites(cls, lines: list[str]) -> list[str]:
        for line in lines:
            if not _words(line):
                raise ValueError("has an empty line; allowed: the name of a suite and its options")
        return lines

    @field_validator("options")
    @classmethod
    def _check_options(cls, line: str) -> str:
        _words(line)
        return line


class Beside(Section):
    """Other models in one table of the report with the designs, as by `cllm compare`."""

    results: list[str] = Field(default_factory=list)
    """Result files, runs and folders of records, relative to the study's file."""
    scores: list[str] = Field(default_factory=list)
    """Columns, as of --score: copying:distance=512."""
    posthoc: list[str] = Field(default_factory=list)
    """Patterns of the specs to show, such as "xkv*"; empty: uncompressed caches only."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.results and (given := [key for key in ("scores", "posthoc") if getattr(self, key)]):
            raise ValueError(f"{given[0]} has no effect without results; allowed: results, the files of other models")
        return self


class Slurm(Section):
    """The array script that `--slurm` prints."""

    tasks: int = Field(4, ge=1, le=10_000)
    """Tasks of the array, one GPU each; all take points from the same queue."""
    time: str = Field("04:00:00", pattern=r"^([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}$")
    """Time limit of a task."""
    cpus: int = Field(8, ge=1, le=1024)
    """CPUs of a task."""
    options: list[str] = Field(default_factory=list)
    """Further lines of #SBATCH, such as --partition=gpu."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before the study, such as "source .venv/bin/activate"."""


class Study(Section):
    """A study: every design with every setting, seed and token budget."""

    name: str = Field(max_length=_LONGEST_NAME, pattern=_NAME)
    """Name of the study; by default its files are in studies/NAME."""
    base: Annotated[list[str], BeforeValidator(_list)] = Field(min_length=1)
    """Config files of every run, later ones win."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of every run on top of `base`."""
    designs: dict[str, Annotated[list[Part], BeforeValidator(_list)]] = Field(min_length=1)
    """Designs, name: settings, a config file, or a list of both."""
    baseline: str = ""
    """The design that others are compared with; empty: the first."""
    settings: dict[str, list[JsonValue]] = Field(default_factory=dict)
    """Further axes of the grid, such as optim.weight_decay: [0.1, 0.01]."""
    seeds: Annotated[list[Seed] | dict[str, list[Seed]], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of weights and data order: a list, or design: list with `default` for the others."""
    tokens: Annotated[list[Tokens], BeforeValidator(_list)] = Field(min_length=1)
    """Token budgets of the runs."""
    rates: Rates | None = None
    """The search of learning rates; null: those of the configs."""
    match: Annotated[Match, BeforeValidator(_match)] = Field(default_factory=Match)
    """The rule by which designs are made equal: parameters, flops, or a mapping."""
    evaluate: Evaluate = Field(default_factory=Evaluate)
    """Measurements at the end of each run of a full budget."""
    beside: Beside = Field(default_factory=Beside)
    """Other models in one table of the report with the designs."""
    validations: int = Field(20, ge=1, le=10_000)
    """Number of validations in a run, of a learning curve's points."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Expected speed of one run, until one was measured."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint of finished runs; otherwise it is deleted once a point is measured."""
    share_gpu: ShareGPU = True
    """Processes that may run on one GPU at the same time, if there is memory for both. `trainings`: the last steps of
    one run and the start of the next; `evaluations`: an evaluation and a training; true: both; false: neither."""
    slurm: Slurm = Field(default_factory=Slurm)
    """The array script that --slurm prints."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        names = list(self.designs)
        if bad := [name for name in names if not re.fullmatch(_NAME, name) or name == DEFAULT]:
            raise ValueError(f"designs: is named {bad[0]!r}; allowed: letters, digits, `.`, `_`, `-`; not default")
        if long := [name for name in names if len(name) > _LONGEST_NAME]:
            raise ValueError(f"designs: {long[0]} has {len(long[0])} characters; allowed: at most {_LONGEST_NAME}")
        self.baseline = self.baseline or names[0]
        if self.baseline not in names:
            raise ValueError(f"baseline is {self.baseline!r}; {nearest(self.baseline, names)}")
        for key, value in (
            ("seeds", self.seeds),
            ("rates.values", self.rates.values if self.rates else None),
            ("rates.known", self.rates.known if self.rates else None),
            ("match.cache_bytes", self.match.cache_bytes),
        ):
            given = list(value) if isinstance(value, dict) else []
            if unknown := [name for name in given if name not in (*names, DEFAULT)]:
                raise ValueError(f"{key} names the design {unknown[0]!r}; {nearest(unknown[0], names)}")
        for name in names:
            seeds = self.seeds_of(name)
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"seeds of {name} are {seeds}, one of them twice")
            if self.rates is not None:
                self.rates.search_of(name)
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens {self.tokens} has a budget twice")
        for key, values in self.settings.items():
            if not values:
                raise ValueError(f"settings.{key} has no value; allowed: a list of values")
            if any(value in values[:n] for n, value in enumerate(values)):
                raise ValueError(f"settings.{key} {values} has a value twice")
        axes = [_keys({key: value}) for key, values in self.settings.items() for value in values]
        _check_keys([key for keys in axes for key in keys], "settings", searched=self.rates is not None)
        _check_keys(_keys(self.overrides), "overrides")
        return self

    def seeds_of(self, design: str) -> list[int]:
        """The seeds of a design. Raises `ValueError` if it has none."""
        found: list[int] = _needed(self.seeds, design, "seeds")
        if not found:
            raise ValueError(f"seeds of {design} are []; allowed: at least one")
        return found


def _keys(tree: dict[str, Any]) -> list[str]:
    """The keys of a tree of settings: `train.steps`."""
    found = []
    for key, value in tree.items():
        found += [f"{key}.{below}" for below in _keys(value)] if isinstance(value, dict) and value else [key]
    return found


def _check_keys(keys: Sequence[str], where: str, *, searched: bool = False) -> None:
    """Refuse settings that a study gives each run. Raises `ValueError`."""
    given = _GIVEN | ({"optim.lr": "rates"} if searched else {})
    for key in keys:
        if key in given:
            raise ValueError(f"{where}: {key} has no effect: a study sets it, see its `{given[key]}`")


def _by_design(values: Any, design: str) -> Any:
    """The value of a design in a mapping, or that of `default`; None if it has neither. Others are for all designs."""
    return values.get(design, values.get(DEFAULT)) if isinstance(values, dict) else values


def _needed(values: Any, design: str, key: str) -> Any:
    """`_by_design`. Raises `ValueError` with the key of the values if there is none."""
    found = _by_design(values, design)
    if found is None:
        raise ValueError(f"{key} has neither {design} nor default")
    return found


def load_study(file: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study, with settings of runs such as `--data.path P` on top of its `overrides`.

    Args:
        file: path of a YAML file, or the name of a shipped one such as `studies/cpu`.
        overrides: words of a command line.

    Raises:
        UserError: for a file that cannot be read and for the first mistake in it.
    """
    found = find_config(file)
    data = read_yaml(found)
    study = validate(Study, data, {(key,): str(found) for key in data}, only_file=str(found))
    others = [str(found.parent / path) for path in study.beside.results]
    study = study.model_copy(update={"beside": study.beside.model_copy(update={"results": others})})
    if words := parse_overrides(overrides):
        try:
            _check_keys(_keys(words), "command line")
        except ValueError as error:
            raise UserError(str(error)) from None
        study = study.model_copy(update={"overrides": merge(study.overrides, words)})
    return study


def parse_duration(text: str) -> float:
    """Seconds of `25m`, `1h30m`, `90s` or a number of seconds.

    Raises:
        UserError: for another form.
    """
    match = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s?)?", text.strip())
    try:
        if match is None or not text.strip():
            raise ValueError
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except ValueError:
        raise UserError(f"--stop-after is {text!r}; allowed: a time such as 25m, 1h30m or 90s") from None
    if (total := 3600 * hours + 60 * minutes + seconds) <= 0:
        raise UserError(f"--stop-after is {text!r}, in which nothing could run; allowed: a time above 0, such as 25m")
    return total
