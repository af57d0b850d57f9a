"""The prepared text and tiny configs of the training tests, and teachers that a test can look into."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm.config import ModelConfig
from cllm.uptrain.decoder import TracedDecoder, build_traced
from cllm.uptrain.teacher import student_model


def _training_fixtures() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "train" / "conftest.py"
    spec = importlib.util.spec_from_file_location("cllm_tests_train_conftest", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_training = _training_fixtures()
prepared, tiny = _training.prepared, _training.tiny


@pytest.fixture(scope="session")
def make_teacher(random_model) -> Callable[..., TracedDecoder]:
    """`make_teacher(config, seed=0)`: a decoder with the weights of `random_model`."""

    def build(config: ModelConfig, seed: int = 0) -> TracedDecoder:
        model = build_traced(config)
        model.load_state_dict(random_model(config, seed).state_dict())
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def new_student() -> Callable[..., TracedDecoder]:
    """`new_student(teacher, {"preset": "cla"})`: of the teacher's shape, with another plan and new weights."""

    def build(teacher: TracedDecoder, kv: dict[str, Any], rope_pairs: str = "high", **options: Any) -> TracedDecoder:
        data = student_model(teacher.config, kv, rope_pairs=rope_pairs)
        torch.manual_seed(7)
        return build_traced(ModelConfig.model_validate(data), **options).eval()

    return build


@pytest.fixture(scope="session")
def text() -> list[dict[str, Tensor]]:
    """Calibration batches for a vocabulary of 32."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (2, 24), generator=generator)} for _ in range(3)]


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """(2, 20) tokens that are not in `text`."""
    return torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(2))
