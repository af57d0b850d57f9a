"""A folder of another family: on a GPU samples are read by cllm's decoder with the folder's tensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cllm.data.manifest import Manifest
from cllm.evaluate.subjects import HuggingFaceSubject
from cllm.evaluate.tasks.run import run_samples
from cllm.evaluate.tasks.sample import Question, Sample
from cllm.posthoc.engine import DecoderEngine, TransformersEngine

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.3}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **SHAPE))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    options = {"first_k_dense_replace": 9, "num_key_value_heads": 2, **LATENT}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE, **options))


@pytest.fixture
def folder(tmp_path: Path, prepared: Any) -> Any:
    """`folder("llama")`: a checkpoint with random weights, and a subject of it."""

    def build(family: str) -> HuggingFaceSubject:
        path = tmp_path / family
        _model(family).eval().save_pretrained(path)
        Manifest.read(prepared(300)).tokenizer().save_pretrained(path)
        return HuggingFaceSubject(path, CPU)

    return build


def _samples() -> list[Sample]:
    draw = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, 300) for _ in range(n))

    return [
        Sample(
            task="t",
            context=tokens(length),
            questions=(Question(prompt=tokens(3), options=(tokens(4), tokens(2)), generate=4),),
        )
        for length in (20, 20, 24)
    ]


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_answers_of_the_decoder_are_those_of_transformers(family: str, folder: Any, monkeypatch: Any) -> None:
    subject, samples = folder(family), _samples()
    assert isinstance(subject.sample_engine(), TransformersEngine), "on a CPU"
    specs = ["none", "svd:rank_k=4,rank_v=4,sinks=1" if family == "llama" else "xkv:group=2,rank_k=6,sinks=1"]
    theirs = run_samples(subject, samples, specs[:1] if family != "llama" else specs, CPU)
    engine = subject._decoder_engine
    assert isinstance(engine, DecoderEngine)
    monkeypatch.setattr(subject, "sample_engine", lambda: engine)
    ours = run_samples(subject, samples, specs, CPU, batch=2)
    for one, other in zip(ours, theirs, strict=False):
        for found, expected in zip(one.answers, other.answers, strict=True):
            assert found is not None
            assert expected is not None
            assert found[0].generated == expected[0].generated
            for a, b in zip(found[0].losses, expected[0].losses, strict=True):
                assert a == pytest.approx(b, abs=2e-3)
    if family == "deepseek_v2":
        none, latents = ours
        assert not latents.left_out
        assert latents.nbytes < none.nbytes
        assert latents.answers != none.answers
    embedding = subject.model.get_input_embeddings().weight
    assert engine.model.embed.weight.data_ptr() == embedding.data_ptr(), "no second copy of the weights"


def test_a_family_that_the_decoder_cannot_compute_stays_with_transformers(folder: Any, monkeypatch: Any) -> None:
    subject = folder("gpt2")
    assert subject._decoder_engine is None
    assert len(run_samples(subject, _samples()[:1], (), CPU)) == 1
