"""LongBench's English tasks: prompts, lengths of answers, and metrics (arXiv 2308.14508, tables 1 and 6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.tasks.language.rows import Row, read_rows, read_text
from cllm.evaluate.tasks.longbench import metrics

Metric = Callable[[str, str, Sequence[str]], float]
"""(generated text, reference, classes) -> 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongTask:
    """A task of LongBench."""

    name: str
    """The `dataset` field of its rows."""
    metric: Metric
    generate: int
    """Tokens of an answer, at most."""
    prompt: str
    """The prompt, with `{context}` once and perhaps `{input}`."""
    first_line: bool = False
    """Whether only the first line of an answer is scored."""

    def parts(self, row: Row) -> tuple[str, str]:
        """The prompt of a row: the text up to the end of the context, and the text after it."""
        question = row.text("input")
        before, after = self.prompt.split("{context}")
        return before.replace("{input}", question) + row.text("context"), after.replace("{input}", question)

    def score(self, text: str, references: Sequence[str], classes: Sequence[str]) -> float:
        """The score (0 to 1) of a generated text: that of the reference that it fits best."""
        if self.first_line:
            text = text.lstrip("\n").split("\n")[0]
        return max((self.metric(text, reference, classes) for reference in references), default=0.0)


_QUESTION = "{context}\n\nQuestion: {input}\nAnswer:"
_EXAMPLES = "{context}\n{input}"
_CODE = "Please complete the code given below. \n{context}"


def _task(name: str, metric: Metric, generate: int, prompt: str, first_line: bool = False) -> LongTask:
    return LongTask(name=name, metric=metric, generate=generate, prompt=prompt, first_line=first_line)


TASKS = {
    task.name: task
    for task in (
        _task("narrativeqa", metrics.f1, 128, _QUESTION),
        _task("qasper", metrics.f1, 128, _QUESTION),
        _task("multifieldqa_en", metrics.f1, 64, _QUESTION),
        _task("hotpotqa", metrics.f1, 32, _QUESTION),
        _task("2wikimqa", metrics.f1, 32, _QUESTION),
        _task("musique", metrics.f1, 32, _QUESTION),
        _task("gov_report", metrics.rouge_l, 512, "{context}\n\nSummary:"),
        _task("qmsum", metrics.rouge_l, 512, "{context}\n\nQuery: {input}\nAnswer:"),
        _task("multi_news", metrics.rouge_l, 512, "{context}\n\nSummary:"),
        _task("trec", metrics.classification, 64, _EXAMPLES, first_line=True),
        _task("triviaqa", metrics.f1, 32, _EXAMPLES, first_line=True),
        _task("samsum", metrics.rouge_l, 128, _EXAMPLES, first_line=True),
        _task("passage_count", metrics.count, 32, "{context}\n\nNumber of different paragraphs:"),
        _task("passage_retrieval_en", metrics.retrieval, 32, "{context}\n\n{input}\n\nIt is from"),
        _task("lcc", metrics.code, 64, f"{_CODE}Next line of code:\n"),
        _task("repobench-p", metrics.code, 64, f"{_CODE}{{input}}Next line of code:\n"),
    )
}
"""The tasks by name. Prompts of the code tasks are the benchmark's; the others are plain ones."""
CODE_TASKS = ("lcc", "repobench-p")


def configured(prompts: str | None, lengths: str | None) -> dict[str, LongTask]:
    """The tasks with prompts and lengths from the benchmark's dataset2prompt.json and dataset2maxlen.json.

    Raises:
        UserError: naming the file and the task, if a prompt or length cannot be used.
    """
    tasks = dict(TASKS)
    for name, prompt in _values(prompts, str):
        if name in tasks:
            if prompt.count("{context}") != 1:
                raise UserError(f"{prompts}: {name}: has {{context}} {prompt.count('{context}')} times; allowed: once")
            tasks[name] = replace(tasks[name], prompt=prompt)
    for name, length in _values(lengths, int):
        if name in tasks:
            if not 1 <= length <= 8192:
                raise UserError(f"{lengths}: {name}: is {length}; allowed: 1 to 8192 tokens")
            tasks[name] = replace(tasks[name], generate=length)
    return tasks


def _values(file: str | None, kind: type) -> list[tuple[str, Any]]:
    if file is None:
        return []
    path = Path(file).expanduser()
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict) or not all(type(value) is kind for value in values.values()):
        raise UserError(f"{path}: must be a JSON object of task names and {'texts' if kind is str else 'numbers'}")
    return list(values.items())


def task_rows(path: str, names: Sequence[str]) -> list[tuple[str, Row]]:
    """The rows of the named tasks from a file or a folder, with the name of each. LongBench-E's `_e` is left out of it.

    Raises:
        UserError: if a name is unknown or the files have no row of it, and as `read_rows` does.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"tasks={unknown[0]}: not an English task of LongBench; allowed: {', '.join(TASKS)}")
    folder = Path(path).expanduser()
    rows = [(row.text("dataset").removesuffix("_e"), row) for file in _files(folder, names) for row in read_rows(file)]
    wanted = [(name, row) for name, row in rows if name in (names or TASKS)]
    if missing := [name for name in names if name not in {found for found, _ in wanted}]:
        raise UserError(f"{folder}: has no rows of tasks={missing[0]}")
    if not wanted:
        raise UserError(f"{folder}: has no rows of an English task of LongBench; allowed: {', '.join(TASKS)}")
    return wanted


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Of a folder, the JSONL files of the tasks; LongBench-E's only where the other is missing."""
    if not folder.is_dir():
        return [folder]
    wanted = names or tuple(TASKS)
    files = [next((f for f in (folder / f"{n}.jsonl", folder / f"{n}_e.jsonl") if f.exists()), None) for n in wanted]
    if not any(files):
        raise UserError(f"{folder}: has no file such as {wanted[0]}.jsonl")
    if names and None in files:
        raise UserError(f"{folder / wanted[files.index(None)]}.jsonl: no such file")
    return [file for file in files if file is not None]
