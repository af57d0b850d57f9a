"""Every file of configs/uptrain against a folder of the family that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from cllm.cache.accounting import kv_bytes
from cllm.errors import UserError
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import build_traced
from cllm.uptrain.project import check_plans
from cllm.uptrain.svd import check_latents
from cllm.uptrain.teacher import teacher_config
from cllm.uptrain.trainable import make_trainable

FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "uptrain").glob("*.yaml"))
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "qwen3": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
RESIDENT = {
    "fusedkv": 1 / 2,
    "fusedkv_lite": 1 / 2,
    "cla2": 1 / 2,
    "mla": 576 / 2048,
    "acrosskv": 1 / 2,
    "kv_tie": 1 / 2,
    "xmla": 1 / 2,
}
"""Of the checkpoint's own cache."""


def test_families_have_their_plans() -> None:
    large = {"fusedkv", "fusedkv_lite", "cla2", "mla", "yoco"}
    plans = {"llama": large, "qwen3": large, "smollm2": {"fusedkv", "cla2", "acrosskv", "kv_tie", "xmla"}}
    assert {path.stem for path in FILES} == {f"{family}_to_{plan}" for family in FAMILIES for plan in plans[family]}


def test_a_file_alone_asks_for_the_model_to_start_from() -> None:
    with pytest.raises(UserError, match=r"init.from is null, but init: is set and model.d_model is missing"):
        load_config(FILES[:1])


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_file_fits_its_family_and_says_how_much_is_trained(file: Path, tmp_path: Path) -> None:
    family, plan = file.stem.split("_to_")
    FAMILIES[family].save_pretrained(tmp_path)
    config = load_config([file], ["--init.from", str(tmp_path)])
    with torch.device("meta"):
        student, teacher = build_traced(config.model), build_traced(teacher_config(tmp_path))
        make_trainable(student, config)
    check_plans(student.plan, teacher.plan)
    check_latents(student, teacher, calibrated=config.init.calibration_sequences > 0)
    own, theirs = kv_bytes(config.model), kv_bytes(teacher.config)
    if plan in RESIDENT:
        assert own.resident == pytest.approx(RESIDENT[plan] * theirs.resident)
    else:
        assert own.resident < theirs.resident / 4
    stated = re.search(r"AdamW on ([\d.]+) B weights", file.read_text(encoding="utf-8"))
    assert stated is not None
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trained / 1e9 == pytest.approx(float(stated[1]), abs=0.05)
    assert config.uptrain.needs_teacher
