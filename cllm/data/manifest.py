"""The record of a prepared folder.

`manifest.json` is written last, so a folder that has one is complete. `Manifest.load` makes the cheap checks (versions,
totals, file sizes, the tokenizer's hash); `cllm/data/integrity.py` reads the files.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from cllm.data.vocabulary import TOKENIZER_FILE, backend_sha256, read_tokenizer, same_tokenizer, tokenizer_sha256
from cllm.errors import DataError
from cllm.files import target_outside, write_atomic
from cllm.progress import ProgressMeter
from cllm.section import Section
from cllm.trust import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
INDEX_DTYPE = np.dtype("<i8")
"""An index file is (documents, 2): for each document, the end of its tokens and of its UTF-8 bytes within the shard."""
INDEX_ROW = 2 * INDEX_DTYPE.itemsize


def text_label(name: str, digest: str) -> str:
    """The name of a text by a split or a file, and its digest: `validation 592c6512044d`."""
    return f"{name} {digest[:12]}"


def partial_folder(folder: Path) -> Path:
    """The folder in which a prepared folder is built, before it is renamed."""
    return folder.with_name(folder.name + ".partial")


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(name: str) -> str:
    """`name`, if it is the name of a file without any folder. Raises `ValueError` if not."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is not the plain name of a file in this folder")
    return name


FileName = Annotated[str, AfterValidator(plain_name)]
Count = Annotated[int, Field(ge=0)]


class Shard(Section):
    """One token file and its document index. No document is split between shards; each ends in EOS."""

    file: FileName
    index: FileName
    tokens: Count
    documents: Count
    bytes: Count
    sha256: str
    index_sha256: str


class Split(Section):
    """Totals over a split's shards. `bytes` counts the UTF-8 bytes of the text, `tokens` includes every EOS."""

    tokens: Count
    documents: Count
    bytes: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _totals(self) -> Self:
        for name in ("tokens", "documents", "bytes"):
            found = sum(getattr(shard, name) for shard in self.shards)
            if found != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but its shards have {found} together")
        return self


class File(NamedTuple):
    """A token file or an index, as the manifest has it."""

    name: str
    n_bytes: int
    sha256: str


class Checksums(Section):
    """The file with the CRC-32 of every block of every shard, with which a sample of the data can be checked."""

    file: FileName
    """uint32, little-endian: for each split by name, for each shard, the token file's blocks, then the index's."""
    block_bytes: Annotated[int, Field(gt=0)]
    """The last block of a file may be shorter."""
    sha256: str
    """Hash of the file of checksums."""


class Counts(Section):
    """Documents that were changed or left out."""

    invalid_utf8_documents: Count = 0
    """Kept documents with bytes that are not UTF-8."""
    replaced_sequences: Count = 0
    """Invalid byte sequences that became U+FFFD."""
    empty_documents: Count = 0
    """Left out: empty, or only white space."""
    short_documents: Count = 0
    """Left out: fewer characters than `min_chars`."""


class Manifest(Section):
    """The content of `manifest.json`, and the folder it was read from."""

    format_version: Literal[1] = 1
    name: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    eos_id: Count
    tokenizer_sha256: str
    splits: dict[str, Split]
    counts: Counts
    recipe: dict[str, Any]
    source_sha256: str
    """Hash of the names and sizes of the source's files, or of the name and revision of a hub data set."""
    versions: dict[str, str]
    checksums: Checksums | None = None
    """None in folders of older versions, and in folders made without `prepare`."""
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _ids(self) -> Self:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, but the ids of vocab_size {self.vocab_size} are smaller")
        if self.vocab_size - 1 > np.iinfo(self.dtype).max:
            raise ValueError(f"dtype is {self.dtype}, which is too small for the ids of vocab_size {self.vocab_size}")
        return self

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a prepared folder and check its files' sizes and the tokenizer's hash.

        Raises:
            DataError: naming the file that is missing or damaged.
        """
        manifest = cls.read(folder)
        for file in manifest.files():
            manifest._check_file(file)
        manifest._check_tokenizer()
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest without checking the other files. Raises `DataError`."""
        folder = Path(folder)
        path = folder / MANIFEST
        command = f"`python data/prepare.py --config RECIPE.yaml --out {folder}`"
        try:
            if not folder.exists() and partial_folder(folder).exists():
                raise DataError(f"{folder}: is only half prepared; give the same command again to finish it: {command}")
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder of prepared data; make it with {command}")
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: missing, so {folder} is not a prepared folder; make one with {command}") from None
        except DataError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}: holds a {type(record).__name__}, not an object with a format_version")
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {repr(version)[:40]}, not {FORMAT_VERSION}; prepare it again")
        try:
            return cls.model_validate({**record, "folder": folder})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the record"
            raise DataError(f"{path}: {where[:200]}: {first['msg'].removeprefix('Value error, ')}") from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        write_atomic(folder / MANIFEST, json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n")

    def files(self, split: str | None = None) -> list[File]:
        """Every token file and index of one split, or of all (None), in the order of `Checksums.file`."""
        found: list[File] = []
        for name in sorted(self.splits) if split is None else [split]:
            for shard in self.split(name).shards:
                found.append(File(shard.file, shard.tokens * self.token_dtype.itemsize, shard.sha256))
                found.append(File(shard.index, shard.documents * INDEX_ROW, shard.index_sha256))
        return found

    @property
    def token_dtype(self) -> np.dtype:
        """Little-endian, as in the files."""
        return np.dtype(self.dtype).newbyteorder("<")

    def split(self, name: str) -> Split:
        """A split by name. Raises `DataError` naming the folder and its splits."""
        if name not in self.splits:
            raise DataError(f"{self.folder}: has no {name} split, only {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token, EOS included: bits per byte = loss in nats / ln 2 / bytes per token."""
        totals = self.split(split)
        return totals.bytes / totals.tokens

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the tokens were made with, as Hugging Face loads it. Raises `UserError` as `load_tokenizer`."""
        return load_tokenizer(self.folder / TOKENIZER)

    def digest(self) -> str:
        """A hex SHA-256 of the tokens and the tokenizer: equal if training on two folders gives the same result.

        It covers the hashes of shards and of the tokenizer, but not names, recipe, versions or checksums.
        """
        splits = {
            name: [[shard.tokens, shard.documents, shard.bytes, shard.sha256, shard.index_sha256] for shard in s.shards]
            for name, s in self.splits.items()
        }
        parts = [self.dtype, self.vocab_size, self.eos_id, self.tokenizer_sha256, splits]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check_unchanged(self, recorded: str | None, run: Path) -> None:
        """Refuse a folder whose content has changed since a run was started with it.

        Args:
            recorded: `digest()` of the folder as the run recorded it; None for runs that recorded none.
            run: the run's folder, for the message.

        Raises:
            DataError: if the digests differ.
        """
        if recorded is not None and recorded != self.digest():
            raise DataError(
                f"{self.folder}: holds other tokens, or another tokenizer, than when the run in {run} was started; "
                "bring the folder back as it was, or prepare the new data under another name"
            )

    def same_tokenizer(self, other: Manifest) -> bool:
        """Whether two folders were prepared with the same tokenizer; see `vocabulary.same_tokenizer`.

        Raises:
            DataError: if a tokenizer's file is needed and cannot be read.
        """
        if self.tokenizer_sha256 == other.tokenizer_sha256:
            return True
        return same_tokenizer(read_tokenizer(self.folder / TOKENIZER), read_tokenizer(other.folder / TOKENIZER))

    def is_tokenized_by(self, tokenizer: Tokenizer) -> bool:
        """Whether `tokenizer` makes the tokens of this folder, and has the same id for its EOS.

        Raises:
            DataError: if the file of the folder's tokenizer is needed and cannot be read.
        """
        if backend_sha256(tokenizer) == self.tokenizer_sha256:
            return True
        own = read_tokenizer(self.folder / TOKENIZER)
        return same_tokenizer(own, tokenizer) and own.id_to_token(self.eos_id) == tokenizer.id_to_token(self.eos_id)

    def verify(self, split: str | None = None, *, meter: ProgressMeter | None = None) -> None:
        """Read every shard of one split, or of all (None), and compare its hash. `meter` counts bytes.

        Raises:
            DataError: naming the first file that differs or cannot be read.
        """
        for file in self.files(split):
            path = self.folder / file.name
            try:
                found = sha256_of(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from None
            if found != file.sha256:
                raise DataError(f"{path}: damaged: expected sha256 {file.sha256}, found {found}")
            if meter is not None:
                meter.update(file.n_bytes)

    def _check_file(self, file: File) -> None:
        path, expected = self.folder / file.name, file.n_bytes
        self._check_inside(path, f"the entry {file.name!r} of {MANIFEST}")
        try:
            found = path.stat()
        except OSError:
            raise DataError(f"{path}: missing; the manifest expects {expected} bytes") from None
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: is not a file; the manifest expects one of {expected} bytes")
        if found.st_size != expected:
            raise DataError(f"{path}: damaged: expected {expected} bytes, found {found.st_size}")

    def _check_inside(self, path: Path, what: str) -> None:
        """Refuse a symbolic link that leaves the folder, or is a loop."""
        try:
            target = target_outside(self.folder, path)
        except OSError as error:
            raise DataError(f"{path}: {what} cannot be followed: {error}") from None
        if target is not None:
            raise DataError(f"{path}: {what} is a symbolic link that leaves the folder, to {target}")

    def _check_tokenizer(self) -> None:
        folder = self.folder / TOKENIZER
        path = folder / TOKENIZER_FILE
        self._check_inside(folder, "the tokenizer's folder")
        try:
            for file in sorted(folder.iterdir()):
                self._check_inside(file, "a file of the tokenizer")
            found = tokenizer_sha256(folder)
        except FileNotFoundError:
            raise DataError(f"{path}: missing; it came with the data, prepare the folder again") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{path}: damaged: {error}") from None
        if found != self.tokenizer_sha256:
            raise DataError(
                f"{path}: is not the tokenizer that made these tokens: sha256 is {found}, "
                f"the manifest says {self.tokenizer_sha256}"
            )
