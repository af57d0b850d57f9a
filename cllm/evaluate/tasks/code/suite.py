"""The suite of code completion: LongBench's LCC and RepoBench-P, or lines from a folder of source code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, Field

from cllm.errors import UserError
from cllm.evaluate.tasks.code.edit import completed_line, edit_similarity
from cllm.evaluate.tasks.code.snippets import EXTENSIONS, NextLine, Source, next_lines, read_sources, shown, snippets
from cllm.evaluate.tasks.longbench.prompt import limit_of
from cllm.evaluate.tasks.longbench.suite import answer_bits, row_samples
from cllm.evaluate.tasks.longbench.table import CODE_TASKS, configured, task_rows
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import Score, TaskSuite, share, value
from cllm.evaluate.tasks.text import n_bytes, pieces, start
from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

_CHARACTERS = 8
"""Characters of context for each token of room; more would be cut off again."""


class CodeSettings(Section):
    """Options of the suite `code`."""

    path: str | None = None
    """LongBench's lcc.jsonl or repobench-p.jsonl, or a folder with both."""
    folder: str | None = None
    """Instead of `path`: a folder of source code, from which tasks are generated."""
    extensions: list[str] = Field(list(EXTENSIONS), min_length=1)
    """Endings of the source files in `folder`."""
    length: int | None = Field(None, ge=64, le=MAX_TOKENS)
    """Tokens of prompt and answer; null: the model's context."""
    generate: int = Field(64, ge=1, le=1024)
    """Tokens to generate for a line."""
    samples: int = Field(200, ge=0, le=MAX_COUNT)
    """Lines of each task; 0: all."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Selects lines, and orders the files of a context."""


class CodeCompletion(TaskSuite):
    """The next line of code: similarity of a generated line, and the loss of the right one."""

    name = "code"
    help = "the next line of code: LCC and RepoBench-P (LongBench), or lines of a folder of source code"
    settings: ClassVar[type[BaseModel]] = CodeSettings
    main = "edit_similarity"
    numbers: ClassVar[tuple[Score, ...]] = (
        share("edit_similarity", "edit similarity"),
        share("exact_match"),
        value("bits_per_byte", "line bits/byte"),
    )

    def tokens_of_samples(self, settings: CodeSettings) -> float:
        return (settings.samples or 500) * (settings.length or 4096)

    def samples(self, subject: Subject, settings: CodeSettings) -> Sequence[Sample]:
        if (settings.path is None) == (settings.folder is None):
            raise UserError(
                "--suite code: needs path=FILE (LongBench's JSONL) or folder=DIR (source code), one of them"
            )
        if settings.path is not None:
            rows = [(name, row) for name, row in task_rows(settings.path, ()) if name in CODE_TASKS]
            if not rows:
                raise UserError(f"{settings.path}: has no rows of {' or '.join(CODE_TASKS)}")
            tasks = {name: replace(task, generate=settings.generate) for name, task in configured(None, None).items()}
            return row_samples(subject, rows, tasks, settings, self.name)
        assert settings.folder is not None
        sources = read_sources(Path(settings.folder).expanduser(), settings.extensions)
        lines = next_lines(sources, settings.samples, settings.seed)
        if not lines:
            raise UserError(f"{settings.folder}: no file uses a name that exactly one other file defines")
        limit = limit_of(subject, settings.length, self.name)
        return [self._sample(subject, line, sources, settings, limit) for line in lines]

    def _sample(
        self, subject: Subject, line: NextLine, sources: Sequence[Source], settings: CodeSettings, limit: int
    ) -> Sample:
        """The other files, cut at their beginning, then the file's text before the line, at most half of the tokens."""
        # A token has a character or more: so many of the defining file fit into the context's half of the tokens.
        size = max(
            1,
            (limit - settings.generate) // 2 - len(line.definition.path) - len("# Path: \n\n\n") - len(start(subject)),
        )
        shown_files = "".join(shown(source) for source in snippets(line, sources, size, settings.seed))
        own = shown(Source(path=line.file.path, text="")).rstrip("\n") + "\n" + line.before
        context, prompt, answer = pieces(subject, shown_files[-_CHARACTERS * limit :], own, line.answer)
        first = start(subject)
        room = limit - len(first) - max(settings.generate, len(answer))
        if room < 2:
            longest = limit - len(first) - room
            raise UserError(
                f"--suite code: an answer has up to {longest} tokens, and length={limit} leaves {max(room, 0)} for the "
                "prompt; allowed: 2 or more"
            )
        prompt = prompt[-(room // 2) :]
        question = Question(
            prompt=prompt,
            options=(answer,),
            option_bytes=n_bytes([line.answer]),
            generate=settings.generate,
            references=(line.answer,),
            facts={"file": line.file.path, "line": line.line, "name": line.name, "definition": line.definition.path},
        )
        return Sample(task="folder", context=(*first, *context[-(room - len(prompt)) :]), questions=(question,))

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        line = completed_line(answer.text)
        return {
            "edit_similarity": edit_similarity(answer.text, question.references),
            "exact_match": float(line.strip() in {reference.strip() for reference in question.references}),
            "bits_per_byte": answer_bits(question, answer),
        }
