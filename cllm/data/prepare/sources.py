"""The documents of a corpus, always in the same order."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from cllm.data.manifest import plain_name
from cllm.data.prepare import formats, recipe
from cllm.data.prepare.formats import read_file
from cllm.data.prepare.mqar import mqar_texts
from cllm.errors import DataError

log = logging.getLogger(__name__)

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class SourceDocument(NamedTuple):
    """One document of a source."""

    text: str
    replaced: int
    """Byte sequences that were not UTF-8 and became U+FFFD."""
    position: int
    """Bytes of the source read so far."""


class Source(Protocol):
    """Documents that can be read again, in the same order."""

    n_bytes: int | None
    """The last `position`, if it is known."""

    def documents(self) -> Iterator[SourceDocument]:
        """Every document. Raises `DataError`."""

    def fingerprint(self) -> list[list[str | int]]:
        """Names and numbers that identify the content without reading it."""


class Files:
    """Local files, one after the other."""

    def __init__(self, paths: list[Path], names: list[str], text_field: str):
        self.paths, self.names, self.text_field = paths, names, text_field
        self.sizes = [path.stat().st_size for path in paths]
        self.n_bytes: int | None = sum(self.sizes)

    def documents(self) -> Iterator[SourceDocument]:
        start = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            for text, replaced, progress in read_file(path, self.text_field):
                yield SourceDocument(text, replaced, start + int(size * progress))
            start += size

    def fingerprint(self) -> list[list[str | int]]:
        return [[name, size] for name, size in zip(self.names, self.sizes, strict=True)]


class Hub:
    """A Hugging Face data set, streamed: its text is not stored."""

    def __init__(self, spec: recipe.Source):
        self.spec = spec
        self.n_bytes: int | None = None

    def documents(self) -> Iterator[SourceDocument]:
        spec, field, position = self.spec, self.spec.text_field, 0
        for number, row in enumerate(self._rows(), start=1):
            where = f"{spec.dataset} row {number}"
            if field not in row:
                raise formats.missing_field(where, field, row)
            text, replaced = formats.text_of(row[field], where, field)
            position += len(text.encode())
            yield SourceDocument(text, replaced, position)

    def _rows(self) -> Iterator[dict]:
        spec = self.spec
        # The network stack under `datasets` raises exceptions of many types; all are reported in one line.
        try:
            import datasets

            yield from datasets.load_dataset(
                spec.dataset, spec.config, split=spec.split, revision=spec.revision, streaming=True
            )
        except Exception as error:
            raise DataError(f"source.dataset {spec.dataset}: cannot be read: {type(error).__name__}: {error}") from None

    def fingerprint(self) -> list[list[str | int]]:
        spec = self.spec
        return [[str(spec.dataset), str(spec.config), spec.split, str(spec.revision)]]


class MqarTexts:
    """Sequences of multi-query associative recall, computed from their seed."""

    def __init__(self, spec: recipe.Mqar):
        self.spec = spec
        self.n_bytes: int | None = None

    def documents(self) -> Iterator[SourceDocument]:
        position = 0
        for text in mqar_texts(self.spec):
            position += len(text)
            yield SourceDocument(text, 0, position)

    def fingerprint(self) -> list[list[str | int]]:
        return [["mqar", self.spec.model_dump_json()]]


def open_source(spec: recipe.Source) -> Source:
    """Open the source of a recipe. Raises `DataError` for a path that is missing or of an unsupported type."""
    if spec.kind == "hub":
        return Hub(spec)
    if spec.mqar is not None:
        return MqarTexts(spec.mqar)
    if spec.kind == "files":
        return open_files(spec.paths, spec.text_field, "source.paths")
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted((name for name in names if not _NOT_STDLIB.intersection(name.parts)), key=Path.as_posix)
    return Files([root / name for name in names], [name.as_posix() for name in names], spec.text_field)


def open_files(patterns: list[str], text_field: str, key: str) -> Files:
    """Local files by path, folder or glob; a file that is named twice is read once. Raises `DataError`."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        if expanded.is_dir():
            found |= dict.fromkeys(_files_in(expanded))
        elif expanded.exists():
            found[expanded] = None
        else:
            matches = sorted(Path(match) for match in glob.glob(str(expanded), recursive=True))
            if not matches:
                raise DataError(f"{key}: {pattern}: no such file, folder or match")
            found |= dict.fromkeys(match for match in matches if match.is_file())
    for path in found:
        if formats.kind_of(path) is None:
            raise DataError(f"{path}: unsupported file type; {formats.SUPPORTED}")
    return Files(list(found), [path.as_posix() for path in found], text_field)


def _files_in(folder: Path) -> list[Path]:
    """The supported files under a folder, sorted by name. Others are logged, except hidden files."""
    state = folder / "state.json"
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"{folder}: holds several splits ({', '.join(splits)}); name the folder of one")
    if state.exists():
        return [folder / name for name in _saved_files(state)]
    files = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    supported = [path for path in files if formats.kind_of(path)]
    others = Counter(path.suffix or path.name for path in files if not formats.kind_of(path))
    if others:
        left_out = ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items()))
        if not supported:
            raise DataError(f"{folder}: no supported file among {left_out}; {formats.SUPPORTED}")
        log.info("%s: left out files of other types: %s", folder, left_out)
    return supported


def _saved_files(state: Path) -> list[str]:
    """The files that `state.json` of `datasets.save_to_disk` lists. Raises `DataError` for names outside the folder."""
    try:
        return [plain_name(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{state}: not a list of files as datasets.save_to_disk writes it: {error}") from None


def fingerprint_sha256(sources: list[Source]) -> str:
    """A hash of the sources' fingerprints."""
    record = [source.fingerprint() for source in sources]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
