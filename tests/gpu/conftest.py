"""Everything in this folder needs a CUDA device, and is skipped with that reason where there is none."""

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
def made_up_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 400 short documents, with a tokenizer of 280 tokens."""
    from cllm import cli
    from cllm.data.prepare.build import prepare
    from cllm.data.prepare.recipe import Recipe

    folder = tmp_path_factory.mktemp("made-up")
    (folder / "text").mkdir()
    for n in range(400):
        text = " ".join(TEXT[(n * 7 + i * i) % len(TEXT)] for i in range(20 + n % 150))
        (folder / "text" / f"{n}.txt").write_text(text, encoding="utf-8")
    recipe = {
        "name": "tiny",
        "out": str(folder / "prepared"),
        "source": {"kind": "files", "paths": [str(folder / "text")]},
        "tokenizer": {"train": {"vocab_size": 280}},
        "validation": {"fraction": 0.05},
        "workers": 1,
    }
    prepare(cli.validate(Recipe, recipe))
    return folder / "prepared"
