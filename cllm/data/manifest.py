"""What a prepared folder holds.

`manifest.json` is written last, so a folder that has one is complete. `Manifest.load` checks what costs nothing
(versions, file sizes, the tokenizer's hash); `Manifest.verify` reads every byte and compares the hashes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cllm.errors import DataError
from cllm.trust import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
INDEX_DTYPE = np.dtype("<i8")
"""An index file is (documents, 2): for each document, where its tokens and its UTF-8 bytes end within the shard."""
INDEX_ROW = 2 * INDEX_DTYPE.itemsize


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """The hash that says two prepared folders speak the same tokens.

    It covers what decides the tokens of a text, and neither the layout of `tokenizer.json` nor the parts that a data
    set does not use, which programs rewrite when they save it again.
    """
    content = json.loads((folder / "tokenizer.json").read_bytes())
    parts = [content[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def partial_folder(folder: Path) -> Path:
    """Where a prepared folder is built, beside the place it will be renamed to."""
    return folder.with_name(folder.name + ".partial")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Shard(_Record):
    """One token file and its document index; whole documents only, each ending in EOS."""

    file: str
    index: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str


class Split(_Record):
    """Totals over a split's shards. `bytes` counts the UTF-8 bytes of the text, `tokens` includes every EOS."""

    tokens: int
    documents: int
    bytes: int
    shards: list[Shard]


class Counts(_Record):
    """What happened to documents on their way in."""

    invalid_utf8_documents: int = 0
    """Kept documents that held bytes which are not UTF-8."""
    replaced_sequences: int = 0
    """How many such byte sequences became U+FFFD."""
    empty_documents: int = 0
    """Left out: nothing but white space."""
    short_documents: int = 0
    """Left out: fewer characters than `min_chars`."""


class Manifest(_Record):
    """The content of `manifest.json`, and the folder it was read from."""

    format_version: Literal[1] = 1
    name: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    splits: dict[str, Split]
    counts: Counts
    recipe: dict[str, Any]
    source_sha256: str
    """Over the names and sizes of the source's files, or the name and revision of a hub data set."""
    versions: dict[str, str]
    folder: Path = Field(default=Path(), exclude=True)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a prepared folder. Raises `DataError` naming the file that is missing or damaged."""
        manifest = cls.read(folder)
        for split in manifest.splits.values():
            for shard in split.shards:
                manifest._check_size(shard.file, shard.tokens * manifest.token_dtype.itemsize)
                manifest._check_size(shard.index, shard.documents * INDEX_ROW)
        manifest._check_tokenizer()
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest alone, without looking at the other files. Raises `DataError`."""
        folder = Path(folder)
        path = folder / MANIFEST
        command = f"`python data/prepare.py --config RECIPE.yaml --out {folder}`"
        if not folder.exists() and partial_folder(folder).exists():
            raise DataError(f"{folder}: is only half prepared; give the same command again to finish it: {command}")
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of prepared data; make it with {command}")
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: missing, so {folder} is not a prepared folder; make one with {command}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        version = record.get("format_version") if isinstance(record, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {version!r}, not {FORMAT_VERSION}; prepare it again")
        try:
            return cls.model_validate({**record, "folder": folder})
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        temporary = folder / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(folder / MANIFEST)

    @property
    def token_dtype(self) -> np.dtype:
        """Little-endian, as in the files."""
        return np.dtype(self.dtype).newbyteorder("<")

    def split(self, name: str) -> Split:
        """A split by name. Raises `DataError` naming the folder and the splits it has."""
        if name not in self.splits:
            raise DataError(f"{self.folder}: has no {name} split, only {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text for each token, EOS included: bits per byte = loss in nats / ln 2 / bytes per token."""
        totals = self.split(split)
        return totals.bytes / totals.tokens

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the tokens were made with, as Hugging Face loads it. Raises `UserError` as `load_tokenizer`."""
        return load_tokenizer(self.folder / TOKENIZER)

    def digest(self) -> str:
        """A hex SHA-256 of the whole record: equal for two folders that hold the same tokens of the same tokenizer."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read every shard and compare its hash. Raises `DataError` naming the first file that differs."""
        for split in self.splits.values():
            for shard in split.shards:
                for file, expected in ((shard.file, shard.sha256), (shard.index, shard.index_sha256)):
                    found = sha256_of(self.folder / file)
                    if found != expected:
                        raise DataError(f"{self.folder / file}: damaged: expected sha256 {expected}, found {found}")

    def _check_size(self, file: str, expected: int) -> None:
        path = self.folder / file
        try:
            found = path.stat().st_size
        except OSError:
            raise DataError(f"{path}: missing; the manifest expects {expected} bytes") from None
        if found != expected:
            raise DataError(f"{path}: damaged: expected {expected} bytes, found {found}")

    def _check_tokenizer(self) -> None:
        path = self.folder / TOKENIZER / "tokenizer.json"
        try:
            found = tokenizer_sha256(path.parent)
        except OSError:
            raise DataError(f"{path}: missing; it came with the data, prepare the folder again") from None
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: damaged: {error!r}") from None
        if found != self.tokenizer_sha256:
            raise DataError(
                f"{path}: is not the tokenizer that made these tokens: sha256 is {found}, "
                f"the manifest says {self.tokenizer_sha256}"
            )
