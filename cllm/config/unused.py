"""Settings that have no effect, because another setting or the KV plan leaves nothing for them to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cllm.config.run import Config


@dataclass(frozen=True, slots=True)
class _Need:
    """Settings that only matter if the config has something."""

    keys: tuple[str, ...]
    used: Callable[[Config], bool]
    """Whether they matter."""
    text: str
    """The setting without which they do nothing, such as `optim.schedule wsd`."""


def _plain(config: Config) -> bool:
    plan = config.model.plan()
    return any(plan.source(i).is_plain for i in range(len(plan)))


def _keeps_window(config: Config) -> bool:
    plan = config.model.plan()
    return any(plan.kept(slot) is not None for slot in plan.slots)


def _fuses(config: Config) -> bool:
    plan = config.model.plan()
    return any(map(plan.fuses, range(len(plan))))


def _scaling(kind: str) -> Callable[[Config], bool]:
    return lambda c: c.model.rope.scaling is not None and c.model.rope.scaling.type == kind


_SCALING = "model.rope.scaling"
_NEEDS = (
    _Need(
        ("model.qk_norm", "model.q_bias", "model.kv_bias"), _plain, "a layer that reads keys and values, not latents"
    ),
    _Need(
        (f"{_SCALING}.low_freq_factor", f"{_SCALING}.high_freq_factor"), _scaling("llama3"), f"{_SCALING}.type llama3"
    ),
    _Need(
        tuple(f"{_SCALING}.{key}" for key in ("beta_fast", "beta_slow", "attention_factor")),
        _scaling("yarn"),
        f"{_SCALING}.type yarn",
    ),
    _Need(("model.rope.windowed_theta",), _keeps_window, "a slot that keeps a window"),
    _Need(("optim.decay_fraction",), lambda c: c.optim.schedule == "wsd", "optim.schedule wsd"),
    _Need(("optim.min_lr",), lambda c: c.optim.schedule != "constant", "a schedule that decays, not constant"),
    _Need(("data.validation_sequences",), lambda c: c.train.validate_every is not None, "train.validate_every"),
    _Need(("train.fp32_residual",), lambda c: c.train.precision != "fp32", "train.precision bf16 or auto"),
    _Need(("train.recompute_fusion",), _fuses, "a layer that fuses slots"),
    _Need(("train.keep_checkpoints",), lambda c: c.train.checkpoint_every is not None, "train.checkpoint_every"),
    _Need(("init.align",), lambda c: c.init.method in ("aligned", "ridge", "fit"), "init.method aligned, ridge or fit"),
    _Need(("init.ridge",), lambda c: c.init.method in ("ridge", "fit", "svd"), "init.method ridge, fit or svd"),
    _Need(("init.rope_pairs",), lambda c: c.init.method == "svd", "init.method svd"),
    _Need(
        ("init.calibration_sequences",),
        lambda c: c.init.reads_text,
        "init.method ridge, fit or svd, or init.heads merge",
    ),
    _Need(
        ("uptrain.lora.rank", "uptrain.lora.alpha"), lambda c: c.uptrain.trainable == "lora", "uptrain.trainable lora"
    ),
    _Need(("uptrain.loss.temperature",), lambda c: c.uptrain.loss.kl > 0, "a weight uptrain.loss.kl"),
    _Need(("uptrain.loss.hidden_layers",), lambda c: c.uptrain.loss.hidden > 0, "a weight uptrain.loss.hidden"),
)


def unused_settings(config: Config, *, fusion_weights: bool) -> list[str]:
    """A line for each setting that differs from its default and has no effect, with what it needs to have one.

    Args:
        config: one run.
        fusion_weights: whether the model has weights of fused, gated or mixed reads.
    """
    longest = config.model.max_seq_len
    windows = {layer.window for layer in config.model.plan().layers if layer.window is not None}
    lines = [
        f"a window of {window} tokens in model.kv is without effect: it needs model.max_seq_len above {window}"
        for window in sorted(windows)
        if window >= longest
    ]
    fusion = _Need(("optim.fusion_lr_multiplier",), lambda _: fusion_weights, "a plan with fusion weights")
    for need in (*_NEEDS, fusion):
        given = [(key, value) for key in need.keys if (value := _given(config, key)) is not None]
        if given and not need.used(config):
            lines += [f"{key} is {str(value).lower()}, without effect: it needs {need.text}" for key, value in given]
    return lines


def _given(config: Config, key: str) -> Any:
    """The value at a dotted key, if it differs from its default, else None."""
    section: Any = config
    *parents, name = key.split(".")
    for parent in parents:
        if (section := getattr(section, parent)) is None:
            return None
    assert isinstance(section, BaseModel)
    value = getattr(section, name)
    return None if value == type(section).model_fields[name].get_default(call_default_factory=True) else value
