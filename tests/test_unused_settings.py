"""Settings without effect: those that a plan or another setting leaves nothing to change have a line, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from cllm.config import Config, ModelConfig
from cllm.config.load import validate
from cllm.config.unused import unused_settings
from cllm.model.parts import has_fusion_weights
from cllm.model.sizes import meta_decoder
from cllm.plan.presets import preset_names

MODEL = {"vocab_size": 64, "d_model": 64, "n_layers": 12, "n_heads": 8, "max_seq_len": 4096}


def unused(**sections: Any) -> list[str]:
    """The keys without effect."""
    data = {**sections, "model": {**MODEL, "kv": {"preset": "mha"}, **sections.get("model", {})}}
    config = validate(Config, {"data": {"seq_len": 64}, **data})
    lines = unused_settings(config, fusion_weights=has_fusion_weights(meta_decoder(config.model)))
    assert all(", without effect: it needs " in line for line in lines)
    return [line.partition(" is ")[0] for line in lines]


@pytest.mark.parametrize("preset", preset_names())
def test_settings_that_add_no_weight_to_a_plan_have_no_effect(preset: str) -> None:
    def names(**more: bool) -> set[str]:
        model = ModelConfig.model_validate({**MODEL, "kv": {"preset": preset}, **more})
        return {name for name, _ in meta_decoder(model).named_parameters()}

    for key in ("qk_norm", "q_bias", "kv_bias"):
        adds = names(**{key: True}) > names()
        assert unused(model={"kv": {"preset": preset}, key: True}) == ([] if adds else [f"model.{key}"])


def test_windows_as_long_as_the_context() -> None:
    def lines(window: int) -> list[str]:
        model = {**MODEL, "kv": {"preset": "yoco", "window": window}}
        return unused_settings(validate(Config, {"data": {"seq_len": 64}, "model": model}), fusion_weights=False)

    assert lines(4095) == []
    assert lines(4096) == [
        "a window of 4096 tokens in model.kv is without effect: it needs model.max_seq_len above 4096"
    ]


def test_other_settings() -> None:
    scaling = {"factor": 2, "original_max_seq_len": 64}
    fused: dict[str, Any] = {"kv": {"preset": "fusedkv"}}
    start = {"from": "runs/teacher", "method": "copy"}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("optim.decay_fraction", {"optim": {"decay_fraction": 0.5}},
         {"optim": {"decay_fraction": 0.5, "schedule": "wsd"}}),
        ("optim.min_lr", {"optim": {"min_lr": 1e-5, "schedule": "constant"}}, {"optim": {"min_lr": 1e-5}}),
        ("data.validation_sequences",
         {"data": {"seq_len": 64, "validation_sequences": 8}, "train": {"validate_every": None}},
         {"data": {"seq_len": 64, "validation_sequences": 8}}),
        ("train.fp32_residual", {"train": {"fp32_residual": True, "precision": "fp32"}},
         {"train": {"fp32_residual": True}}),
        ("optim.fusion_lr_multiplier", {"optim": {"fusion_lr_multiplier": 3}},
         {"optim": {"fusion_lr_multiplier": 3}, "model": fused}),
        ("train.recompute_fusion", {"train": {"recompute_fusion": True}},
         {"train": {"recompute_fusion": True}, "model": fused}),
        ("train.keep_checkpoints", {"train": {"keep_checkpoints": 5, "checkpoint_every": None}},
         {"train": {"keep_checkpoints": 5}}),
        ("model.rope.scaling.beta_fast",
         {"model": {"rope": {"scaling": {"type": "llama3", "beta_fast": 9, **scaling}}}},
         {"model": {"rope": {"scaling": {"type": "yarn", "beta_fast": 9, **scaling}}}}),
        ("model.rope.scaling.low_freq_factor",
         {"model": {"rope": {"scaling": {"type": "linear", "low_freq_factor": 2, **scaling}}}},
         {"model": {"rope": {"scaling": {"type": "llama3", "low_freq_factor": 2, **scaling}}}}),
        ("model.rope.windowed_theta", {"model": {"rope": {"windowed_theta": 100}}},
         {"model": {"rope": {"windowed_theta": 100}, "kv": {"preset": "mha", "window": 9}}}),
        ("init.align", {"init": {**start, "align": "turn"}}, {"init": {**start, "method": "fit", "align": "turn"}}),
        ("init.ridge", {"init": {**start, "ridge": 0.1}}, {"init": {**start, "method": "svd", "ridge": 0.1}}),
        ("init.rope_pairs", {"init": {**start, "rope_pairs": "uniform"}},
         {"init": {**start, "method": "svd", "rope_pairs": "uniform"}}),
        ("init.calibration_sequences", {"init": {**start, "calibration_sequences": 8}},
         {"init": {**start, "heads": "merge", "calibration_sequences": 8}}),
        ("uptrain.lora.rank", {"init": start, "uptrain": {"lora": {"rank": 2}}},
         {"init": start, "uptrain": {"lora": {"rank": 2}, "trainable": "lora"}}),
        ("uptrain.loss.temperature", {"init": start, "uptrain": {"loss": {"temperature": 1}}},
         {"init": start, "uptrain": {"loss": {"temperature": 1, "kl": 1}}}),
        ("uptrain.loss.hidden_layers", {"init": start, "uptrain": {"loss": {"hidden_layers": "all"}}},
         {"init": start, "uptrain": {"loss": {"hidden_layers": "all", "hidden": 1}}}),
    ]  # fmt: skip
    for key, without, used in cases:
        assert unused(**without) == [key]
        assert unused(**used) == []
    assert unused() == []
