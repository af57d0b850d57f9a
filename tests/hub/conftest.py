"""Tiny transformers models of every design, and runs with random weights to export."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cllm.config import Config, ModelConfig
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.hub.export import as_pretrained
from cllm.hub.families.write import export_family
from cllm.hub.model import CLLMForCausalLM
from cllm.model.decoder import Decoder
from cllm.runs import RunFolder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def hub_model(tiny_config, random_model) -> Callable[..., CLLMForCausalLM]:
    """`hub_model({"preset": "cla"}, n_layers=4)`: a model whose every weight matters, in evaluation mode."""

    def build(kv: dict[str, Any] | None = None, *, config: ModelConfig | None = None, **model: Any) -> CLLMForCausalLM:
        decoder = random_model(config or tiny_config(kv=kv or {"preset": "fusedkv", "n_kv_heads": 2}, **model))
        return as_pretrained(decoder).eval()

    return build


@pytest.fixture(scope="session")
def llama_twin(hub_model, tmp_path_factory) -> Callable[..., tuple[CLLMForCausalLM, LlamaForCausalLM]]:
    """`llama_twin(vocab_size=8)`: a model of ours with the mha plan, and transformers' Llama with the same weights."""

    def build(**model: Any) -> tuple[CLLMForCausalLM, LlamaForCausalLM]:
        ours = hub_model({"preset": "mha"}, **{"n_layers": 2, **model})
        folder = tmp_path_factory.mktemp("llama") / "twin"
        export_family(ours.model.config, ours.model.state_dict(), folder, "llama")
        return ours, LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    return build


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared folder of a few sentences, with a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [f"the {word} number {i} is naïve, 日本 and {i * i}" for i in range(40) for word in ("first", "second")]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    recipe = {
        "name": "small",
        "out": str(folder / "small"),
        "source": {"kind": "files", "paths": [str(folder / "corpus.jsonl")]},
        "tokenizer": {"train": {"vocab_size": 300}},
        "validation": {"fraction": 0.3},
        "workers": 1,
    }
    return prepare(Recipe.model_validate(recipe)).folder


@pytest.fixture
def make_run(tmp_path, prepared, random_model) -> Callable[..., tuple[RunFolder, Decoder]]:
    """`make_run(tie_embeddings=True)`: a run of random weights with checkpoints at the steps 10 and 20."""

    def build(**model: Any) -> tuple[RunFolder, Decoder]:
        tiny = {"vocab_size": 320, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 64}
        config = Config.model_validate(
            {
                "name": "a",
                "runs_dir": str(tmp_path / "runs"),
                "model": {**tiny, "kv": {"preset": "fusedkv", "n_storage": 1, "sources": [0]}, **model},
                "data": {"path": str(prepared), "seq_len": 16},
            }
        )
        run = RunFolder(tmp_path / "runs" / "a")
        run.write_config(config)
        run.checkpoint_folder.mkdir()
        for step in (10, 20):
            decoder = random_model(config.model, seed=step)
            state = {f"model.{key}": tensor for key, tensor in decoder.state_dict().items()}
            torch.save({"state_dict": state}, run.checkpoint_path(step))
        return run, decoder

    return build


@pytest.fixture(scope="session")
def convert() -> Callable[..., int]:
    """scripts/convert.py's `main`, taking words and returning the exit status."""
    spec = importlib.util.spec_from_file_location("convert_script", REPO / "scripts" / "convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture
def chat_llama(tmp_path, prepared) -> Path:
    """A tiny Llama folder with the tokenizer of `prepared`, two chat templates, and a generation config of its own.

    Beside them lie a licence, a model card, Python code, and pickled weights.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    folder = tmp_path / "chat-llama"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=0)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "TOOLS"}
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(CHAT))
    for name in ("LICENSE.txt", "README.md", "modeling.py", "pytorch_model.bin", "training_args.pt", "notes.pkl"):
        (folder / name).write_text(name)
    return folder


CHAT = {"eos_token_id": [1, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
"""The generation config of `chat_llama`."""
