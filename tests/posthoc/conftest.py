"""Filled caches of tiny models, and the evaluation tests' prepared text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.posthoc.engine import engine_of
from cllm.posthoc.slots import SlotTensors
from cllm.runs import RunFolder
from experiments import sweep_posthoc

_path = Path(__file__).resolve().parents[1] / "evaluate" / "conftest.py"
_spec = importlib.util.spec_from_file_location("cllm_tests_evaluate_fixtures", _path)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
evaluate, prepared, texts = _shared.evaluate, _shared.prepared, _shared.texts
_script = _shared._script
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sweep():
    """`main` of experiments.sweep_posthoc."""
    return lambda *words: sweep_posthoc.main([str(word) for word in words])


@pytest.fixture(scope="session")
def analyze_command():
    """scripts/analyze.py's `main`."""
    return _script(REPO / "scripts" / "analyze.py")


@pytest.fixture(scope="session")
def tokens():
    """`tokens(2, 40)`: random ids of the tiny vocabulary."""

    def draw(batch: int, length: int, seed: int = 0):
        return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def decoder(tiny_config, random_model):
    """`decoder(kv={"preset": "mha"})`: a tiny model without gradients."""

    def build(kv=None, **model):
        config = tiny_config(kv=kv or {"preset": "mha"}, max_seq_len=256, **model)
        return random_model(config).eval().requires_grad_(False)

    return build


@pytest.fixture
def design(preset_config, random_model):
    """`design("lckv")`: a model of a preset, cyclic plans with as many passes as 28 tokens take."""

    def build(name):
        config = preset_config(name)
        if config.plan().iterations is not None:
            iterations = config.kv.iterations.model_copy(update={"forward": 27, "backward": 1})
            config = config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": iterations})})
        return random_model(config).eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def llama():
    """`llama("qwen3")`: a tiny random transformers model of a family."""
    import transformers

    families = {
        "llama": ("Llama", {}),
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {"head_dim": 8}),
        "mistral": ("Mistral", {"sliding_window": None}),
        "deepseek_v2": ("DeepseekV2", {"first_k_dense_replace": 9}),
        "deepseek_v3": ("DeepseekV3", {"first_k_dense_replace": 9}),
    }

    def build(family: str = "llama"):
        name, more = families[family]
        options: dict[str, Any] = {
            "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.2, **more,
        }  # fmt: skip
        if family.startswith("deepseek"):
            mla = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
            options |= {**mla, "v_head_dim": 8, "num_key_value_heads": 4}
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def filled():
    """`filled(model, ids)`: the model's engine and a cache of `ids`."""

    def fill(model, ids, **options):
        engine = engine_of(model)
        cache = engine.new_cache()
        if options:
            model.hidden(ids, cache=cache, **options)
        else:
            engine.hidden(ids, cache)
        return engine, cache

    return fill


@pytest.fixture(scope="session")
def slot_tensors():
    """`slot_tensors("k", [tensors])`: an argument of a method's `encode`."""

    def build(kind, data, text=None):
        return SlotTensors(kind, tuple(range(len(data))), tuple(data), data[0].dtype, text)

    return build


@pytest.fixture
def run(tmp_path, prepared, random_model):
    """`run("a", kv={"preset": "cla"})`: a run of random weights with 4 layers."""

    def build(name="a", kv=None, data=None):
        folder = prepared(300)
        model = {
            "d_model": 16,
            "n_layers": 4,
            "n_heads": 2,
            "d_ff": 24,
            "max_seq_len": 64,
            "kv": kv or {"preset": "mha"},
        }
        config = Config.model_validate(
            {
                "name": name,
                "runs_dir": str(tmp_path / "runs"),
                "model": {**model, "vocab_size": Manifest.read(folder).vocab_size},
                "data": {"path": str(folder), "seq_len": 48, **(data or {})},
            }
        )
        made, model = RunFolder(tmp_path / "runs" / name), random_model(config.model).eval()
        made.write_config(config)
        made.checkpoint_folder.mkdir()
        state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        torch.save({"state_dict": state}, made.checkpoint_path(20))
        return made, model

    return build
