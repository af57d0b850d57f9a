"""All tests in this folder need a CUDA device, and are skipped without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TEXT = ("the", "plan", "says", "where", "keys", "and", "values", "come", "from", "for", "every", "layer", "of", "it")


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def made_up_text(prepare_texts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 400 short documents, with a tokenizer of 280 tokens."""
    texts = (" ".join(TEXT[(n * 7 + i * i) % len(TEXT)] for i in range(20 + n % 150)) for n in range(400))
    return prepare_texts(tmp_path_factory.mktemp("made-up"), texts, 0.05)
