"""A recipe: the settings of a preparation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, Section
from cllm.workers import usable_cores

MIN_VOCAB = 257
"""The 256 bytes and EOS."""

_KEYS_OF_KIND = {
    "stdlib": set[str](),
    "files": {"paths", "text_field"},
    "hub": {"dataset", "config", "split", "revision", "text_field"},
    "mqar": {"mqar"},
}
_REQUIRED_KEY = {"files": "paths", "hub": "dataset", "mqar": "mqar"}


class Mqar(Section, frozen=True):
    """Sequences of multi-query associative recall, a synthetic task (arXiv 2312.04927)."""

    numbers: Annotated[int, Field(ge=4, le=MAX_TOKENS)] = 64
    """Numbers from 0 on, that of EOS included; the lower half are keys, the upper half values."""
    length: Annotated[int, Field(ge=8, le=MAX_TOKENS)] = 40
    """Tokens of a document, EOS included; train with this `data.seq_len`."""
    pairs: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(default_factory=lambda: [2, 4, 8])
    """Key-value pairs of a document; documents take these numbers in turn."""
    documents: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 10_000
    """Number of documents."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of keys, values and places."""

    @model_validator(mode="after")
    def _room(self) -> Mqar:
        largest = min((self.length - 1) // 4, self.numbers // 2 - 1)
        if max(self.pairs) > largest:
            raise ValueError(
                f"pairs has {max(self.pairs)}, but {self.numbers} numbers and a length of {self.length} have room for "
                f"{largest}: a quarter of the length, and less than half of the numbers"
            )
        return self


class Source(Section, frozen=True):
    """The source of the documents."""

    kind: Literal["stdlib", "files", "hub", "mqar"] = "stdlib"
    """stdlib: the Python standard library of the running interpreter; files: local files; hub: a Hugging Face data set,
    streamed; mqar: a synthetic task."""
    paths: list[str] = Field(default_factory=list)
    """files: files, folders and glob patterns. They are read in this order, the files of a folder by name."""
    dataset: str | None = None
    """hub: the data set's name, such as HuggingFaceFW/fineweb-edu."""
    config: str | None = None
    """hub: the data set's configuration, if it has several."""
    split: str = "train"
    """hub: the data set's split."""
    revision: str | None = None
    """hub: a branch, tag or commit. With a commit, the recipe always gives the same data."""
    text_field: str = "text"
    """The field of a JSON line, table or data set that contains the text."""
    mqar: Mqar | None = None
    """mqar: the sequences."""

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> Source:
        foreign = self.model_fields_set - {"kind"} - _KEYS_OF_KIND[self.kind]
        if foreign:
            owners = [kind for kind, keys in _KEYS_OF_KIND.items() if min(foreign) in keys]
            raise ValueError(f"`{min(foreign)}` goes with kind: {' or '.join(owners)}, not with kind: {self.kind}")
        required = _REQUIRED_KEY.get(self.kind)
        if required and not getattr(self, required):
            raise ValueError(f"kind: {self.kind} needs `{required}`")
        return self


class TrainTokenizer(Section, frozen=True):
    """A byte-level BPE trained on the start of the training documents."""

    vocab_size: Annotated[int, Field(ge=MIN_VOCAB)]
    """Size of the vocabulary: 256 bytes, <|endoftext|> and the merges."""
    sample_bytes: Annotated[int, Field(gt=0)] = 100_000_000
    """UTF-8 bytes of text to train the tokenizer on."""


class TokenizerChoice(Section, frozen=True):
    """`train` a tokenizer, `load` one, or take whole `numbers` as tokens."""

    train: TrainTokenizer | None = None
    load: str | None = None
    """Name of a Hugging Face tokenizer, or a folder with one, such as data/prepared/NAME/tokenizer."""
    numbers: Annotated[int, Field(ge=2, le=MAX_TOKENS)] | None = None
    """For texts of whole numbers, as `kind: mqar` writes them: so many tokens, EOS as 0 and number n as token n."""

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizerChoice:
        if self.numbers is not None:
            if self.train is not None or self.load is not None:
                raise ValueError("numbers is given, and so is `train` or `load`; allowed: one of them")
            return self
        if (self.train is None) == (self.load is None):
            raise ValueError("say either `train` or `load` (set the other to null)")
        return self


class Validation(Section, frozen=True):
    """The documents of the validation split."""

    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the documents to hold out, from 0 to 1; chosen by a hash of each document's text and the seed."""
    paths: list[str] | None = None
    """Separate files for validation, read as `source.paths` are; the entire source is then for training."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Validation:
        if (self.fraction is None) == (self.paths is None):
            raise ValueError("say either `fraction` or `paths` (set the other to null)")
        return self


class Recipe(Section, frozen=True):
    """The settings of the preparation of one corpus."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the prepared data."""
    out: str | None = None
    """The prepared folder; null: data/prepared/NAME."""
    source: Source
    tokenizer: TokenizerChoice
    validation: Validation
    max_documents: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many documents of the source."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """Stop at the document that brings the source's text to this many UTF-8 bytes."""
    min_chars: Annotated[int, Field(ge=0)] = 0
    """Leave out documents with fewer characters. Empty documents are always left out."""
    shard_tokens: Annotated[int, Field(gt=0)] = 100_000_000
    """Largest number of tokens in a shard. Documents are not split: a longer one is in a shard alone."""
    workers: Annotated[int, Field(gt=0)] | None = None
    """Processes that tokenise; null: one for each CPU; 1: only the main process, with the tokenizer's threads.
    The result does not depend on it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the choice of validation documents."""

    @property
    def folder(self) -> Path:
        """The prepared folder."""
        return Path(self.out or f"data/prepared/{self.name}").expanduser()

    @property
    def n_workers(self) -> int:
        """The number of processes that tokenise."""
        if self.workers:
            return self.workers
        return usable_cores()

    @model_validator(mode="after")
    def _number_tokens(self) -> Recipe:
        numbers, task = self.tokenizer.numbers, self.source.mqar
        if task is not None and numbers != task.numbers:
            raise ValueError(
                f"tokenizer.numbers is {numbers}, but source.mqar.numbers is {task.numbers}; allowed: the same number"
            )
        return self

    def content(self) -> dict[str, Any]:
        """The settings that the output depends on: all except `out` and `workers`."""
        content = self.model_dump(mode="json", exclude={"out", "workers"})
        for section, key in (("source", "mqar"), ("tokenizer", "numbers")):  # newer than some prepared folders
            if content[section][key] is None:
                del content[section][key]
        return content

    def sha256(self) -> str:
        """A hash of `content()`."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()
