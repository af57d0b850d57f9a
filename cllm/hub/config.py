"""The config of a checkpoint folder: the project's `model:` section, and transformers' names for what it says.

config.json holds the section as it is under the key `model`. The names that transformers knows (`hidden_size`,
`num_hidden_layers`, ...) are written beside it for programs that read the file, but they are views: they are never
stored, cannot be set to something else, and a file in which they contradict the section is refused.
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
from cllm.section import Section


class _File(Section):
    """The part of config.json that is the project's; validated as a whole so that messages say `model.d_model`."""

    model: ModelConfig


class _View:
    """An attribute under transformers' name that reads the `model` section; `writable` ones also write to it."""

    def __init__(self, key: str, read: Callable[[dict[str, Any]], Any] | None = None, *, writable: bool = False):
        self.key, self.writable = key, writable
        self._read = read or (lambda model: model[key])

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: CLLMConfig | None, owner: type | None = None) -> Any:
        # Asked of the class, as dataclasses do, it is a plain attribute.
        return self if config is None else self._read(config.section)

    def __set__(self, config: CLLMConfig, value: Any) -> None:
        if self.writable:
            config.model = _resolved({**config.section, self.key: value})
        else:
            self.check(config, value)

    def check(self, config: CLLMConfig, value: Any) -> None:
        """Raises `UserError` unless `value` is what the section says."""
        found = self._read(config.section)
        if value != found:
            raise UserError(f"config.json: {self.name} is {value!r}, but model.{self.key} makes it {found!r}")


def _head_dim(model: dict[str, Any]) -> int:
    return model["head_dim"] or model["d_model"] // model["n_heads"]


def _kv_heads(model: dict[str, Any]) -> int:
    """The most KV heads of any owner; latents and recurrent states serve all query heads."""
    plan = _validated(model).plan()
    return max(plan.owned(j).kv_heads or model["n_heads"] for j in plan.owners)


class CLLMConfig(PretrainedConfig):
    """`CLLMConfig(model=config.model)`: a decoder as transformers sees it.

    Args:
        model: a `ModelConfig`, or the mapping that YAML has under `model:`. It is kept as plain data with every default
            written out; where `match_params` widens the MLP, as the width that is built.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, or None.
        use_cache: whether a forward pass that is not for training returns a cache.

    `vocab_size`, `max_position_embeddings` and `tie_word_embeddings` may be set, and set the section; the other names
    may not.

    Raises:
        UserError: for a section that is no valid model, without vocab_size, or that another key contradicts; the
            message names the key.
    """

    model_type = "cllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = True
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of code to run from the checkpoint's folder, which libraries look up: none, and none is ever written."""

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
        views = {name: kwargs.pop(name) for name in _VIEWS if name in kwargs}  # a file must not contradict itself
        super().__post_init__(**kwargs)
        for name, value in views.items():
            _VIEWS[name].check(self, value)

    @property
    def section(self) -> dict[str, Any]:
        """What `model` holds, every key of it."""
        assert self.model is not None
        return self.model

    @property
    def model_config(self) -> ModelConfig:
        """The `model` section, validated. Raises `UserError` where it was edited into something invalid."""
        return _validated(self.section)

    @property
    def design(self) -> str:
        """The preset of the KV plan, or `layers` for a plan that is spelled out."""
        return getattr(self.model_config.kv, "preset", "layers")

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
    """`model` as plain data that needs nothing else to be built from.

    `match_params` becomes the width that it leads to: counting the twin's parameters again, from a width that was
    widened already, would widen it twice.
    """
    config = _validated(model)
    if config.vocab_size is None:
        raise UserError(
            "config.json: model.vocab_size: is null; a checkpoint has to say how many rows its embedding has"
        )
    sizes = importlib.import_module("cllm.model.sizes")  # torch
    return config.model_copy(update={"d_ff": sizes.model_d_ff(config), "match_params": False}).model_dump(mode="json")


AutoConfig.register(CLLMConfig.model_type, CLLMConfig)
