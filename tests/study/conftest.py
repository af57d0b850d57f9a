"""A finished study, trained by `fake_trainer.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cllm.study.results import read_results
from cllm.study.schema import load_study
from cllm.study.summary import Summary, summarise
from tests.study.page import DOCS, EQUAL_BYTES, FOLDER, RESULTS


@pytest.fixture(scope="session")
def chaos(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    """The helpers of `chaos.py`."""
    return load_file(Path(__file__).with_name("chaos.py"))


@pytest.fixture(scope="session")
def finished(chaos: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study; `started` in it has the name of each training that was started."""
    folder = tmp_path_factory.mktemp("study")
    study = chaos.study_of(folder / "base.yaml")
    assert chaos.runner_of(study, folder, chaos.FakeCommands(0, folder / "started")).run() == 0
    return folder


@pytest.fixture(scope="session")
def summary() -> Summary:
    """The summary of the designs after 490 M tokens, in docs/results."""
    return summarise(load_study(RESULTS / "2026-11-27-study-490m.yaml"), read_results(FOLDER))


@pytest.fixture(scope="session")
def both() -> Summary:
    """The summary of designs at half and at a quarter of mha's cache after 100 M tokens, in docs/results."""
    return summarise(load_study(DOCS.parent / "configs/studies/equal_bytes.yaml"), read_results(EQUAL_BYTES))
