"""Triton kernels without a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.warm import warm_executable

ROOT = Path(__file__).resolve().parents[2]


IMPORTED = ("pytest", "benchmarks.kernels.__main__", "cllm.kernels.decode", "cllm.kernels.lowrank_decode")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Path]:
    """A Python whose processes start with Triton imported, for which kernels run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(int(x) for x in version.split(".")[:2]) < (3, 7):
        pytest.skip(f"the interpreter of triton {version} cannot loop with numpy 2.4 or newer; needs triton 3.7")
    with warm_executable(IMPORTED, TRITON_INTERPRET="1") as file:
        yield file


@pytest.fixture
def run_interpreted(interpreter: Path) -> Callable[[str], None]:
    """`run_interpreted(__file__)`: run that file in another process, in which Triton kernels run on the CPU."""

    def run(file: str) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [interpreter, Path(__file__).with_name("interpret.py"), file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]

    return run
