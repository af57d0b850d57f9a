"""Next-line tasks across the files of a folder of source code.

The line to complete is the first in its file to use a name that another file defines and this file does not, so that
the other file is the place to read how the name is used. This is the idea of RepoBench's `cross_file_first` setting
(arXiv 2306.03091). Definitions are found by patterns, which fit Python, JavaScript, TypeScript, Go, Rust, Java, C# and
C++ well enough; names that several files define are left out.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm.errors import UserError

EXTENSIONS = (".py", ".js", ".ts", ".go", ".rs", ".java", ".cs", ".cpp", ".cc", ".h")
_DEFINITION = re.compile(
    r"^[ \t]*(?:(?:export|default|public|private|protected|internal|static|abstract|final|async|pub|inline)\s+)*"
    r"(?:def|class|func|function|fn|struct|interface|enum|trait|type)\s+([A-Za-z_]\w{3,})",
    re.MULTILINE,
)
_CONSTANT = re.compile(r"^([A-Z][A-Z0-9_]{3,})\s*(?::[^=\n]+)?=", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_]\w{3,}")
_IMPORT = re.compile(r"^\s*(?:from|import|use|using|#include|package|require|export \{|\} from)\b|\brequire\(")
_COMMENT = ("#", "//", "/*", "*", '"""', "'''")
_SHORTEST, _LONGEST = 12, 160
"""Characters of a line to complete, without its indentation."""
_FIRST_LINE = 4
"""Lines of the file before it, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file of source code."""

    path: str
    """Relative to the folder, with forward slashes."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NextLine:
    """A line to complete."""

    file: Source
    line: int
    """Its number in the file, from 1."""
    name: str
    """The name that it uses."""
    definition: Source
    """The file that defines the name."""

    @property
    def before(self) -> str:
        """The file's text before the line."""
        return "".join(f"{line}\n" for line in self.file.text.split("\n")[: self.line - 1])

    @property
    def answer(self) -> str:
        """The line."""
        return self.file.text.split("\n")[self.line - 1]


def read_sources(folder: Path, extensions: Sequence[str] = EXTENSIONS) -> list[Source]:
    """The source files of a folder and its subfolders. Hidden folders, links and files not in UTF-8 are left out.

    Raises:
        UserError: if the folder cannot be read, or has fewer than two such files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; folder= takes a folder of source code")
    sources = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix in extensions and not file.is_symlink():
                try:
                    text = file.read_text(encoding="utf-8-sig").expandtabs(4)
                except (OSError, UnicodeDecodeError):
                    continue
                sources.append(Source(path=file.relative_to(folder).as_posix(), text=text))
    if len(sources) < 2:
        raise UserError(f"{folder}: has {len(sources)} source files ({' '.join(extensions)}); at least 2 are needed")
    return sources


def definitions(text: str) -> set[str]:
    """Names of functions, classes, types and constants that a file defines."""
    return {*_DEFINITION.findall(text), *_CONSTANT.findall(text)}


def excerpt(source: Source, name: str, size: int) -> Source:
    """A file of at most `size` characters: the entire file, or what follows the beginning of a name's definition."""
    if len(source.text) <= size:
        return source
    matches = (match for pattern in (_DEFINITION, _CONSTANT) for match in pattern.finditer(source.text))
    start = next(match.start() for match in matches if match[1] == name)
    return Source(path=source.path, text=source.text[start : start + size])


def _first_use(source: Source, owners: dict[str, Source | None], own: set[str]) -> list[NextLine]:
    """For each file whose names a file uses: the line with the first use, if it can be completed."""
    found: dict[str, NextLine | None] = {}
    seen: set[str] = set()
    for number, line in enumerate(source.text.split("\n"), start=1):
        if _IMPORT.search(line) or line.strip().startswith(_COMMENT):
            continue
        names = [name for name in _NAME.findall(line) if name not in seen and name not in own]
        seen.update(names)
        for name in names:
            owner = owners.get(name)
            if owner is None or owner is source or owner.path in found:
                continue
            fits = number > _FIRST_LINE and _SHORTEST <= len(line.strip()) <= _LONGEST
            fits = fits and not any(mark in line for mark in ("`", "#", "//"))
            found[owner.path] = (
                NextLine(file=source, line=number, name=name, definition=owner) if fits else None
            )  # fmt: skip
    return [task for task in found.values() if task is not None]


def next_lines(sources: Sequence[Source], count: int, seed: int) -> list[NextLine]:
    """At most `count` lines to complete (0: all), drawn evenly from the files, in the order of the files."""
    from cllm.evaluate.tasks.language.example import draw

    owners: dict[str, Source | None] = {}
    defined = [definitions(source.text) for source in sources]
    for source, names in zip(sources, defined, strict=True):
        for name in names:
            owners[name] = None if name in owners else source  # None: several files define it
    tasks = [task for source, own in zip(sources, defined, strict=True) for task in _first_use(source, owners, own)]
    return [tasks[i] for i in draw(tasks, count, lambda task: task.file.path, seed)]


def snippets(task: NextLine, sources: Sequence[Source], size: int, seed: int) -> list[Source]:
    """The other files in random order, and at most `size` characters of the one with the definition last.

    A context that is too long loses its beginning, hence never the definition.
    """
    others = [source for source in sources if source is not task.file and source is not task.definition]
    random.Random(f"{seed} {task.file.path} {task.line}").shuffle(others)
    return [*others, excerpt(task.definition, task.name, size)]


def shown(source: Source) -> str:
    """A file as a snippet: its path, then its text."""
    comment = "#" if source.path.endswith(".py") else "//"
    return f"{comment} Path: {source.path}\n{source.text.rstrip()}\n\n"
