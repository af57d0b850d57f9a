"""Subjects whose behaviour is known (`planted.py`), and one way to measure them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cllm.evaluate.perplexity import Settings
from cllm.evaluate.suites.suite import Job


@pytest.fixture(scope="session")
def planted(load_file) -> ModuleType:
    """The module `planted.py`."""
    return load_file(Path(__file__).with_name("planted.py"))


@pytest.fixture(scope="session")
def subject(planted, prepared) -> Callable[..., Any]:
    """`subject(model, context=256)`: a subject with a tokenizer of 300 tokens."""
    return lambda model, **options: planted.PlantedSubject(prepared(300), model, **options)


@pytest.fixture(scope="session")
def measure() -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """`measure(suite, subject, {"samples": 3}, ["none"], batch=2)`: the records by task and spec."""

    def run(suite: Any, subject: Any, settings: dict[str, Any], specs: Any = (), batch: int | None = None) -> Any:
        job = Job(
            settings=Settings(batch=batch),
            device=torch.device("cpu"),
            options=argparse.Namespace(posthoc=list(specs)),
            given=suite.settings.model_validate(settings),
        )
        suite.check(subject, job)
        return {(record["task"], record["spec"]): record for record in suite.run(subject, job)}

    return run
