"""Tiny exported folders, and vLLM engines. Tests of engines run only with CLLM_VLLM=1, in an environment with vLLM."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import ModelConfig
from cllm.hub.export import _to_bf16, as_pretrained, save
from cllm.hub.model import CLLMForCausalLM

NEW_TOKENS = 12
VOCABULARY = 512
_VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes are on the cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process, which reads its cache's config
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Exported:
    """A folder, its model in transformers, and the greedy continuations of prompts."""

    folder: Path
    model: CLLMForCausalLM

    @property
    def config(self) -> ModelConfig:
        """The `model` section."""
        return self.model.config.model_config

    @torch.no_grad()
    def greedy(self, prompts: list[list[int]], n: int = NEW_TOKENS) -> list[list[int]]:
        """The tokens with which transformers continues each prompt, one at a time."""
        options: dict[str, Any] = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return [self.model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


@pytest.fixture(scope="session")
def export_tiny(random_model, tmp_path_factory) -> Callable[..., Exported]:
    """`export_tiny({"preset": "cla"}, qk_norm=True)`: a folder with random weights; heads of 32, a context of 256."""

    def export(kv: dict[str, Any], *, dtype: torch.dtype = torch.float32, **model: Any) -> Exported:
        sizes = {"vocab_size": VOCABULARY, "d_model": 128, "n_layers": 8, "n_heads": 4, "d_ff": 160}
        config = ModelConfig(**{**sizes, "max_seq_len": 256, "kv": kv, **model})
        pretrained = as_pretrained(random_model(config)).eval()
        folder = tmp_path_factory.mktemp("served") / "model"
        if dtype != torch.float32:
            _to_bf16(pretrained.model)
            pretrained.config.dtype = dtype
        save(pretrained, folder, "5GB")
        return Exported(folder, pretrained)

    return export


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """1, 7, 17, 40 and 90 tokens, and two prompts whose first 50 are the same."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    common = draw(50)
    return [draw(1), draw(7), draw(17), draw(40), draw(90), common + draw(3), common + draw(21)]


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """`engine(folder, num_gpu_blocks_override=8)`: a `vllm.LLM` in fp32 with blocks of 32 tokens, at most 64 tokens a
    step, and 64 MiB of cache."""
    os.environ.update(_VARIABLES)
    from vllm import LLM

    def start(folder: Path, **options: Any) -> Any:
        return LLM(
            str(folder),
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": 32,
                "max_model_len": 256,
                "max_num_batched_tokens": 64,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": 64 * 2**20,
                "skip_tokenizer_init": True,
                "disable_log_stats": False,
                **options,
            },
        )

    yield start
    gc.collect()
