"""Configs from what a caller gives: paths, names of shipped configs and designs, dicts, and config objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cllm.config import Config, ModelConfig
from cllm.config.designs import parse_plan, plan_names
from cllm.config.load import Origin, merge_settings, parse_overrides
from cllm.config.nested import ARGUMENTS, nest
from cllm.config.shipped import find_config, shipped_configs
from cllm.errors import UserError, nearest
from cllm.section import Section
from cllm.uptrain.complete import complete
from cllm.yaml_text import read_yaml

OneConfig = str | os.PathLike[str] | Mapping[str, Any] | Section
"""A YAML file, the name of a shipped config or of a design, a dict whose keys may be dotted, or a config object."""
AnyConfig = OneConfig | Sequence[OneConfig]
"""One of them, or several, of which later ones win."""
Settings = TypeVar("Settings", bound=Section)
Layer = tuple[str, dict[str, Any]]
"""A name for messages, and settings."""

_SIZES: dict[str, Any] = {"d_model": 512, "n_layers": 8}
"""Sizes of a model of which only the design is given."""
_HEAD_DIM = 64


class _Model(Section):
    """The part of a config that a model needs."""

    model: ModelConfig


def run_config(config: AnyConfig, settings: Mapping[str, Any]) -> Config:
    """The config of a run, `model` completed from `init.from`; `settings` win over `config`.

    Raises:
        UserError: as `load_config` does.
    """
    if isinstance(config, Config) and not settings:
        return config
    return merge_settings(Config, _layers(config, settings), complete=complete, only_file=_only_file(config))


def model_config(config: AnyConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """The `model` section of a config, or of a design alone, whose sizes then have the defaults of `cllm.build`.

    Args:
        config: a run's config, a `ModelConfig`, or a design.
        settings: keys of `model`, which win over `config`.

    Raises:
        UserError: as `load_config` does.
    """
    if isinstance(config, ModelConfig) and not settings:
        return config
    layers = _layers(config, {f"model.{key}": value for key, value in settings.items()})
    if all(is_design(one) for one in each_of(config)):
        sizes = _SIZES | layers[-1][1].get("model", {})
        d_model = sizes["d_model"]
        sizes = {"n_heads": d_model // _HEAD_DIM or 1 if isinstance(d_model, int) else 1} | sizes
        layers.insert(0, (ARGUMENTS, {"model": {key: sizes[key] for key in ("d_model", "n_layers", "n_heads")}}))
    return merge_settings(_Model, layers, complete=_complete_model, only_file=_only_file(config)).model


def settings_of(schema: type[Settings], config: AnyConfig, settings: Mapping[str, Any]) -> Settings:
    """`config` as an instance of `schema`; `settings` win over it. Raises `UserError`."""
    if isinstance(config, schema) and not settings:
        return config
    return merge_settings(schema, _layers(config, settings), only_file=_only_file(config))


def is_design(config: Any) -> bool:
    """Whether `config` is the name of a design, such as `fusedkv` or `gqa:n_kv_heads=4`, and not that of a file."""
    return isinstance(config, str) and config.partition(":")[0] in plan_names() and not Path(config).is_file()


def _complete_model(data: dict[str, Any]) -> tuple[dict[str, Any], Origin]:
    data, origin = complete(data)
    return {key: value for key, value in data.items() if key == "model"}, origin


def each_of(config: AnyConfig, name: str = "config") -> list[OneConfig]:
    """The configs in `config`. Raises `UserError` for an object of another type."""
    single = isinstance(config, str | os.PathLike | Mapping | Section)
    each = [config] if single or not isinstance(config, Sequence) or isinstance(config, bytes) else list(config)
    for one in each:
        if isinstance(one, str | os.PathLike | Mapping | Section):
            continue
        raise UserError(
            f"{name} is a {type(one).__name__}; allowed: a path, the name of a shipped config or a design, a dict, "
            "a config object, or a list of these"
        )
    return each  # type: ignore[return-value]


def _only_file(config: AnyConfig) -> str:
    each = each_of(config)
    return str(each[0]) if len(each) == 1 and isinstance(each[0], str | os.PathLike) else ""


def _layers(config: AnyConfig, settings: Mapping[str, Any]) -> list[Layer]:
    return [layer for one in each_of(config) for layer in _layers_of(one)] + [(ARGUMENTS, nest(settings))]


def _layers_of(config: OneConfig) -> list[Layer]:
    if isinstance(config, ModelConfig):
        return [(ARGUMENTS, {"model": config.model_dump(mode="json")})]
    if isinstance(config, Section):  # a recipe allows only keys of its kind of source, even with their defaults
        return [(ARGUMENTS, config.model_dump(mode="json", exclude_unset=not isinstance(config, Config)))]
    if isinstance(config, Mapping):
        return [(ARGUMENTS, nest(config))]
    name = os.fspath(config)
    if is_design(name):
        file, options = parse_plan(name, label="design ")
        words = [word for key, value in options.items() for word in (f"--model.kv.{key}", value)]
        return [(name, read_yaml(file)), (name, parse_overrides(words))]
    path = find_config(name)
    if not os.path.lexists(path):
        names = [*plan_names(), *shipped_configs()]
        raise UserError(f"{name}: no such config file, shipped config or design; {nearest(name, names)}")
    if os.path.isdir(path):
        found = os.path.join(name, "config.yaml")
        advice = (
            f"give its {found}" if os.path.isfile(found) else "allowed: a file, or the name of a config or a design"
        )
        raise UserError(f"{name}: is a folder; {advice}" if name else "config is ''; allowed: a name or a path")
    return [(name, read_yaml(path))]
