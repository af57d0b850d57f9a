"""A run with random weights and a context long enough for questions, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.evaluate.subjects import Subject, load_subject
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.runs import RunFolder

CONTEXT = 384


@pytest.fixture(scope="session")
def long_run(tmp_path_factory, prepared, random_model) -> Callable[..., Path]:
    """`long_run(kv={"preset": "mla"})`: a run of two layers with random weights and a context of 384 tokens."""

    def build(**model: Any) -> Path:
        folder, data = tmp_path_factory.mktemp("long"), prepared(300)
        shape = {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 2,
            "d_ff": 32,
            "max_seq_len": CONTEXT,
            "kv": {"preset": "mha"},
        }
        config = Config.model_validate(
            {
                "name": "long",
                "runs_dir": str(folder),
                "model": {**shape, **model, "vocab_size": Manifest.read(data).vocab_size},
                "data": {"path": str(data), "seq_len": 64},
            }
        )
        run = RunFolder(folder / "long")
        run.write_config(config)
        run.checkpoint_folder.mkdir()
        state = {f"model.{key}": tensor for key, tensor in random_model(config.model).eval().state_dict().items()}
        torch.save({"state_dict": state}, run.checkpoint_path(20))
        return run.path

    return build


@pytest.fixture(scope="session")
def run_path(long_run) -> Path:
    """The run of multi-head attention."""
    return long_run()


@pytest.fixture(scope="session")
def subject(run_path) -> Subject:
    """That run, loaded."""
    return load_subject(run_path, torch.device("cpu"))


@pytest.fixture
def write_lines(tmp_path) -> Callable[..., Path]:
    """`write_lines("piqa.jsonl", rows)`: a file of JSON lines."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def log_probability(subject) -> Callable[[Sample, Question], list[float]]:
    """The log-probability of every option by one pass over the entire sequence, without a cache."""

    def measure(sample: Sample, question: Question) -> list[float]:
        before = (*sample.context, *question.prompt)
        found = []
        for option in question.options:
            ids = torch.tensor([[*before, *option]])
            with torch.inference_mode():
                logits = subject.logits(ids[:, :-1], None, None, len(option))[0].double().log_softmax(-1)
            found.append(logits[range(len(option)), list(option)].sum().item())
        return found

    return measure


def answer(*options: float, text: str = "") -> Answer:
    """An answer with one loss for each option."""
    return Answer(losses=tuple((loss,) for loss in options), top1=tuple((loss < 1,) for loss in options), text=text)


@pytest.fixture(scope="session")
def make_answer() -> Callable[..., Answer]:
    """`make_answer(1.0, 2.0, text="")`: the losses of the options, and generated text."""
    return answer
