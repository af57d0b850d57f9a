"""The examples in the docstrings of all functions that `import cllm` offers, run in a folder with a trained run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import cllm

EXAMPLES = [
    example
    for name in ("plans", "runs", "models", "scores", "prefixes")
    for example in sorted(
        doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(f"cllm.api.{name}")),
        key=lambda example: example.lineno or 0,
    )
    if example.examples
]


def test_every_function_has_an_example_that_gives_what_it_shows(workspace: Path) -> None:
    functions = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert functions == set(cllm.__all__) - {"UserError"}
    reports: list[str] = []
    for example in EXAMPLES:
        doctest.DocTestRunner().run(example, out=reports.append)
    assert not reports, "".join(reports)
