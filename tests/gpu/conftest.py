"""Everything in this folder needs a CUDA device, and is skipped with that reason where there is none."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The device under test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())
