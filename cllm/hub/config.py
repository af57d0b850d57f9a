"""The config of a checkpoint folder: the `model:` section, and transformers' names for its keys.

config.json holds the section unchanged under the key `model`. transformers' names (`hidden_size`, `num_hidden_layers`,
...) are written next to it for programs that read the file. They are views of the section: most cannot be set, and a
file in which they contradict the section is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.kind import MODEL_TYPE
from cllm.section import Section


class _File(Section):
    """The cllm part of config.json. It includes the key `model`, so messages name `model.d_model`."""

    model: ModelConfig


class _View:
    """An attribute with transformers' name that reads the `model` section; `writable` ones also write to it."""

    def __init__(self, key: str, read: Callable[[dict[str, Any]], Any] | None = None, *, writable: bool = False):
        self.key, self.writable = key, writable
        self._read = read or (lambda model: model[key])

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: CLLMConfig | None, owner: type | None = None) -> Any:
        # Read from the class, as dataclasses do, it is the view itself.
        return self if config is None else self._read(config.section)

    def __set__(self, config: CLLMConfig, value: Any) -> None:
        if self.writable:
            config.model = _resolved({**config.section, self.key: value})
        else:
            self.check(config, value)

    def check(self, config: CLLMConfig, value: Any) -> None:
        """Raises `UserError` unless `value` equals that of the section."""
        expected = self._read(config.section)
        if value != expected:
            raise UserError(f"config.json: {self.name} is {value!r}, but model.{self.key} makes it {expected!r}")


def _head_dim(model: dict[str, Any]) -> int:
    return model["head_dim"] or model["d_model"] // model["n_heads"]


def _kv_heads(model: dict[str, Any]) -> int:
    """The largest number of KV heads of an owner; latents and recurrent states serve all query heads."""
    plan = _validated(model).plan()
    return max(plan.owned(j).kv_heads or model["n_heads"] for j in plan.owners)


class CLLMConfig(PretrainedConfig):
    """`CLLMConfig(model=config.model)`: a decoder as transformers sees it.

    Keyword Args:
        model: a `ModelConfig`, or the mapping under `model:` in YAML. It is stored as plain data with all defaults, and
            with the width that `match_params` gives the MLP.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, or None.
        use_cache: whether forward passes return a cache, except in training.

    Setting `vocab_size`, `max_position_embeddings` or `tie_word_embeddings` changes the section; other names cannot be
    set.

    Raises:
        UserError: naming the key, for an invalid section, a missing vocab_size, and a key that contradicts the section.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = True
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of code to run from the checkpoint's folder: empty, and never written."""

    model: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    vocab_size = _View("vocab_size", writable=True)
    hidden_size = _View("d_model")
    intermediate_size = _View("d_ff")
    num_hidden_layers = _View("n_layers")
    num_attention_heads = _View("n_heads")
    num_key_value_heads = _View("kv", _kv_heads)
    head_dim = _View("head_dim", _head_dim)
    max_position_embeddings = _View("max_seq_len", writable=True)
    tie_word_embeddings = _View("tie_embeddings", writable=True)
    initializer_range = _View("init.std", lambda model: model["init"]["std"])

    def __post_init__(self, **kwargs: Any) -> None:
        self.model = _resolved(self.model)
        views = {name: kwargs.pop(name) for name in _VIEWS if name in kwargs}
        super().__post_init__(**kwargs)
        for name, value in views.items():  # a file must not contradict itself
            _VIEWS[name].check(self, value)

    @property
    def section(self) -> dict[str, Any]:
        """The `model` section with all its keys."""
        assert self.model is not None
        return self.model

    @property
    def model_config(self) -> ModelConfig:
        """The `model` section, validated. Raises `UserError` if it was edited and is invalid."""
        return _validated(self.section)

    @property
    def design(self) -> str:
        """The name of the KV plan: its preset, or `layers` for a plan without one."""
        return self.model_config.design

    def to_dict(self) -> dict[str, Any]:
        """Plain data, views included."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in _VIEWS}}


_VIEWS = {name: view for name, view in vars(CLLMConfig).items() if isinstance(view, _View)}


def _validated(model: Any) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if model is None:
        raise UserError("config.json: model: is required and missing; it holds what a YAML file has under model:")
    try:
        return validate(_File, {"model": model}).model
    except UserError as error:
        raise UserError(f"config.json: {error}") from None


def _resolved(model: Any) -> dict[str, Any]:
    """`model` as plain data, with all defaults.

    `match_params` is replaced by the width that it gives; applied again to that width, it would widen it twice.
    """
    config = _validated(model)
    if config.vocab_size is None:
        raise UserError(
            "config.json: model.vocab_size: is null; a checkpoint has to say how many rows its embedding has"
        )
    sizes = importlib.import_module("cllm.model.sizes")  # torch
    return config.model_copy(update={"d_ff": sizes.model_d_ff(config), "match_params": False}).model_dump(mode="json")


AutoConfig.register(CLLMConfig.model_type, CLLMConfig)
