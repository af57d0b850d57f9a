"""The 13 tasks by name, and the files and packages that each one reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cllm.errors import UserError, nearest
from cllm.evaluate.tasks.ruler.counting import CommonWords, FrequentWords
from cllm.evaluate.tasks.ruler.draft import Task
from cllm.evaluate.tasks.ruler.essays import NO_ESSAYS, open_essays
from cllm.evaluate.tasks.ruler.needles import FORMS, Needles
from cllm.evaluate.tasks.ruler.qa import Answering, Corpus, read_hotpotqa, read_squad
from cllm.evaluate.tasks.ruler.tracking import Tracking

WITH_ESSAYS = frozenset(name for name, form in FORMS.items() if form.haystack == "essay")
QUESTIONS = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Tasks that need a file, and the setting that names it."""
NAMES = (*FORMS, "vt", "cwe", "fwe", *QUESTIONS)
ANY_REFERENCE = frozenset(QUESTIONS)
"""Tasks in which one reference found is a full score."""
UNORDERED = frozenset({"cwe"})
"""Tasks whose answers are a set, so that no order of them is the right one."""


def chosen_tasks(names: Sequence[str], files: Sequence[str]) -> tuple[str, ...]:
    """The tasks that a setting names, in the order of the benchmark.

    Args:
        names: `all` (every task whose files are there) or names.
        files: the settings of files that are given: `squad`, `hotpotqa`.

    Raises:
        UserError: for an unknown name, and a task whose file is not given.
    """
    for name in names:
        if name not in (*NAMES, "all"):
            raise UserError(f"--suite ruler: tasks: unknown task {name!r}; {nearest(name, (*NAMES, 'all'))}")
        if (file := QUESTIONS.get(name)) is not None and file not in files:
            raise UserError(f"--suite ruler: {name} needs {file}=FILE, a local copy of its data set")
    ready = (name for name in NAMES if QUESTIONS.get(name) in (None, *files))
    return tuple(name for name in ready if name in names or "all" in names)


class Tasks:
    """Makes tasks; what they read is read once, when a task needs it.

    Args:
        essays, squad, hotpotqa: as in `Settings`.
        count: the tokens of a text.
        options: further fields of every `Task`: seed, distractors.
    """

    def __init__(
        self,
        *,
        essays: str = "auto",
        squad: str | None = None,
        hotpotqa: str | None = None,
        count: Callable[[str], int],
        **options: Any,
    ):
        self._name_of_essays, self._squad, self._hotpotqa = essays, squad, hotpotqa
        self._count, self._options = count, options

    @cached_property
    def _corpus_of_squad(self) -> Corpus:
        assert self._squad is not None
        return read_squad(Path(self._squad))

    @cached_property
    def _corpus_of_hotpotqa(self) -> Corpus:
        assert self._hotpotqa is not None
        return read_hotpotqa(Path(self._hotpotqa))

    def task(self, name: str, length: int) -> Task:
        """The task `name` for contexts of `length` tokens.

        Raises:
            UserError: for files that are missing or cannot be read, and packages that are not installed.
        """
        given: dict[str, Any] = {"name": name, "length": length, **self._options}
        if name in FORMS:
            essays = open_essays(self._name_of_essays) if name in WITH_ESSAYS else NO_ESSAYS
            return Needles(form=FORMS[name], essays=essays, **given)
        if name == "vt":
            return Tracking(count=self._count, **given)
        if name in QUESTIONS:
            return Answering(corpus=self._corpus_of_squad if name == "qa_1" else self._corpus_of_hotpotqa, **given)
        return {"cwe": CommonWords, "fwe": FrequentWords}[name](**given)
