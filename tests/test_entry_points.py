"""Every command ends on a signal with one line: its main function has `@one_line` and `@stoppable(...)`."""

from __future__ import annotations

import ast
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.decode.results import Results
from benchmarks.posthoc_methods import Rows, TooLong
from benchmarks.record import KEPT, Record
from cllm.errors import one_line
from cllm.signals import stoppable

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("benchmarks", "cllm", "experiments") for file in sorted((ROOT / folder).rglob("*.py"))]
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
OTHERWISE = {
    "cllm/commands/cli.py": "it only calls the main function of a command",
    "cllm/commands/study_point.py": "it only calls that of `cllm evaluate`, several times",
}
"""Commands that need no `stoppable`, and why."""


def decorators() -> dict[str, list[str]]:
    """The files with a function `main`, and the names of its decorators."""
    found = {}
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
                found[name] = [ast.unparse(d) for d in called]
    return found


def test_every_main_function_is_stoppable() -> None:
    found = decorators()
    assert found.keys() >= OTHERWISE.keys()
    assert found == {name: ["one_line"] + ["stoppable"] * (name not in OTHERWISE) for name in found}


def test_every_program_calls_such_a_function() -> None:
    """Its own, or that of a command of `cllm`."""
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                assert [ast.unparse(line)[: len("sys.exit(main(")] for line in node.body] == ["sys.exit(main("], name
                lines = [ast.unparse(line) for line in tree.body]
                others = ("from cllm.commands.cli import main", "main = functools.partial(")
                assert name in decorators() or any(line.startswith(others) for line in lines), name


def replaced() -> dict[str, float]:
    """A measurement during which a signal comes, and whose library replaces its exception by an error of its own."""
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        raise ImportError("no module")


def late() -> dict[str, float]:
    """The same with the exception of a time limit."""
    try:
        return replaced()
    except ImportError as error:
        raise TooLong("took more than 1 s") from error


def attempt(measure: Callable[[], dict[str, float]]) -> None:
    Rows(Record({}, None)).attempt("8B", "compress", "int8", 60.0, measure)


def decode(measure: Callable[[], dict[str, float]]) -> None:
    Results({}, None, torch.device("cpu"), 60.0).measure("mha", {}, measure)


@pytest.mark.parametrize(("run", "measure"), [(attempt, replaced), (attempt, late), (decode, replaced)])
def test_a_signal_during_a_measurement_is_no_failed_measurement(
    run: Callable[[Callable[[], dict[str, float]]], None],
    measure: Callable[[], dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert one_line(stoppable(kept=KEPT)(lambda: run(measure)))() == 128 + signal.SIGTERM
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(f"interrupted by SIGTERM; {KEPT}")
