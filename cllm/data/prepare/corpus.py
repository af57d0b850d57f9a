"""The documents that a recipe keeps, each with its split."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from cllm.data.manifest import Counts
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.sources import Source, SourceDocument, fingerprint_sha256, open_files, open_source

TRAIN, VALIDATION = "train", "validation"


class Document(NamedTuple):
    """One kept document."""

    text: str
    split: str
    n_bytes: int
    """UTF-8 bytes of `text`."""
    position: int
    """Bytes of the corpus read so far, shown by the progress bar."""


def held_out(raw: bytes, fraction: float, seed: int) -> bool:
    """Whether a text belongs to the validation split. Equal texts are always in the same split."""
    digest = hashlib.blake2b(raw, digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class Corpus:
    """The documents of a recipe's source and validation files.

    Raises:
        DataError: for a path that is missing or of an unsupported type.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.counts = Counts()
        """Counts of the last, or current, pass over the documents."""
        self._source = open_source(recipe.source)
        self._validation: Source | None = None
        if recipe.validation.paths is not None:
            self._validation = open_files(recipe.validation.paths, recipe.source.text_field, "validation.paths")

    @property
    def _sources(self) -> list[Source]:
        return [self._source] if self._validation is None else [self._source, self._validation]

    @property
    def n_bytes(self) -> int | None:
        """The last `Document.position`, if it is known."""
        if self._source.n_bytes is None:
            return None
        return sum(source.n_bytes or 0 for source in self._sources)

    def fingerprint_sha256(self) -> str:
        """A hash that identifies the corpus without reading it: of names and sizes, or of a data set's revision."""
        return fingerprint_sha256(self._sources)

    def documents(self) -> Iterator[Document]:
        """Every kept document: the source's, then those of `validation.paths`. Each call starts from the beginning."""
        self.counts = Counts()
        position = n_documents = n_bytes = 0
        recipe = self.recipe
        for found, raw in self._kept(self._source):
            document = Document(found.text, self._split(raw), len(raw), found.position)
            yield document
            position, n_documents, n_bytes = document.position, n_documents + 1, n_bytes + document.n_bytes
            if n_documents == recipe.max_documents or (recipe.max_bytes and n_bytes >= recipe.max_bytes):
                break
        if self._validation is not None:
            for found, raw in self._kept(self._validation):
                yield Document(found.text, VALIDATION, len(raw), position + found.position)

    def sample(self, n_bytes: int) -> Iterator[str]:
        """The first training documents, up to the one that brings them to `n_bytes` UTF-8 bytes."""
        training = (document for document in self.documents() if document.split == TRAIN)
        taken = 0
        for document in training:
            yield document.text
            taken += document.n_bytes
            if taken >= n_bytes:
                return

    def _split(self, raw: bytes) -> str:
        fraction = self.recipe.validation.fraction
        return VALIDATION if fraction and held_out(raw, fraction, self.recipe.seed) else TRAIN

    def _kept(self, source: Source) -> Iterator[tuple[SourceDocument, bytes]]:
        """Documents that are neither empty nor short, with their UTF-8 bytes."""
        counts = self.counts
        for found in source.documents():
            if not found.text or found.text.isspace():
                counts.empty_documents += 1
            elif len(found.text) < self.recipe.min_chars:
                counts.short_documents += 1
            else:
                counts.invalid_utf8_documents += found.replaced > 0
                counts.replaced_sequences += found.replaced
                yield found, found.text.encode()


def after(documents: Iterator[Document], n: int) -> Iterator[Document]:
    """`documents` without the first `n`."""
    return itertools.islice(documents, n, None)
