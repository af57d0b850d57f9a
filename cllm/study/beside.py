"""The designs of a study in one table with other models: the section of `beside`, as `cllm compare` prints it."""

from __future__ import annotations

from pathlib import Path

from cllm.errors import UserError
from cllm.evaluate.answers import answers
from cllm.evaluate.answers_table import markdown
from cllm.evaluate.measured import read_measured
from cllm.evaluate.score_choice import parse_score_choice
from cllm.evaluate.suites.registry import suites
from cllm.study.summary import Summary

_NOTE = "Other models were trained on other text, with other tokenizers and for other times: compare within one model."


def beside(summary: Summary, results: Path) -> list[str]:
    """The section of the report; empty without `beside` in the study.

    Args:
        summary: the study's results; those of the search are not in the table.
        results: the folder of their files.

    Raises:
        UserError: for a file of `beside` that cannot be read, and for a score that no model has.
    """
    chosen = summary.study.beside
    if not chosen.results or not summary.rows:
        return []
    largest = summary.rows_of(summary.budgets[0])
    files = [results / f"{result.name}.json" for row in largest for result in row.results]
    try:
        models, left_out = read_measured([*files, *map(Path, chosen.results)])
        if left_out:
            raise UserError(f"{left_out[0]} cannot be read")
        own = {result.name for row in largest for result in row.results if row.variant.design == summary.study.baseline}
        baseline = next((model.label for model in models if model.name in own), None)
        scores = [parse_score_choice(text, suites()) for text in chosen.scores]
        table = markdown(answers(models, scores, specs=chosen.posthoc or ["none"], baseline=baseline))
    except UserError as error:
        raise UserError(f"study {summary.study.name}: beside: {error}") from None
    return ["## Beside other models", table.rstrip(), _NOTE]
