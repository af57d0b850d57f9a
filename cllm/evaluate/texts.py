"""Sets to score: the tokens of a prepared folder or of a text file, and the bytes of text that they stand for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cllm.data.manifest import MANIFEST, text_label
from cllm.data.prepare.formats import TEXT, Text, kind_of, read_file
from cllm.data.store import TokenStore
from cllm.data.vocabulary import check_ids
from cllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cllm.evaluate.subjects import Subject

log = logging.getLogger(__name__)

TEXT_FIELD = "text"
_MOST_REPLACED = 0.3  # share of replaced characters above which a file is not taken for UTF-8 text
_ENCODE_TOGETHER = 256  # documents handed to the tokenizer at a time


class TokenSource(Protocol):
    """Tokens of concatenated documents, such as a `TokenStore`."""

    def __len__(self) -> int:
        """The number of tokens, every EOS included."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64 (stop - start,)."""

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Document ids from 0 and positions that restart at each document, int64 (stop - start,) each."""


class TextTokens:
    """Documents in memory, each followed by EOS. `texts` must not be empty."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase):
        pieces, texts = [], list(texts)
        for i in range(0, len(texts), _ENCODE_TOGETHER):
            # As in prepared data, a special token spelt out in a text is encoded as ordinary text.
            encoded = tokenizer(
                texts[i : i + _ENCODE_TOGETHER], add_special_tokens=False, split_special_tokens=True, verbose=False
            )
            pieces += [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded["input_ids"]]
        self._tokens = np.concatenate(pieces)
        self._starts = np.cumsum([0, *map(len, pieces)])[:-1]

    def __len__(self) -> int:
        """The number of tokens, every EOS included."""
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop): int64 (stop - start,)."""
        return self._tokens[start:stop]

    def documents(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TokenStore.documents`: an EOS belongs to the document it ends."""
        tokens = np.arange(start, stop)
        document = np.searchsorted(self._starts, tokens, side="right") - 1
        return document - document[:1], tokens - np.maximum(self._starts[document], start)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSet:
    """A set to score."""

    name: str
    """Used in the name of the result file and in TensorBoard tags."""
    path: Path
    split: str | None
    """None for a text file."""
    source: TokenSource
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of the text, after invalid bytes were replaced; EOS tokens count 0."""
    digest: str
    """Hex SHA-256 of the tokens as int64; of a prepared folder, its `Manifest.digest()`."""
    replaced: int = 0
    """Invalid byte sequences that became U+FFFD."""

    @property
    def label(self) -> str:
        """A name that is equal for equal texts of equal names: `validation 592c6512044d`."""
        return text_label(self.split or self.path.name, self.digest)


def open_prepared(name: str, path: Path, split: str, subject: Subject, digest: str | None = None) -> TextSet:
    """Open a split of a prepared folder to score it with `subject`.

    Args:
        digest: the `Manifest.digest()` that the folder must have; None: any.

    Raises:
        UserError: if the folder is missing or damaged, or was prepared with another tokenizer than the model's.
    """
    _check_start(subject)
    store = TokenStore(path, split, vocab_size=subject.vocab_size, whose=f"the embedding of {subject.name}")
    store.manifest.check_unchanged(digest, subject.folder)
    if not subject.tokenizes(store.manifest):
        raise UserError(
            f"{path}: was prepared with another tokenizer than that of {subject.name}, so its tokens mean nothing to "
            "the model; give a text file (.txt .md .jsonl) instead: that is tokenised with the model's own one"
        )
    totals = store.manifest.split(split)
    if totals.tokens == 0:
        raise UserError(f"{path}: its {split} split holds no tokens")
    return TextSet(
        name=name,
        path=path,
        split=split,
        source=store,
        n_documents=totals.documents,
        n_bytes=totals.bytes,
        digest=store.manifest.digest(),
    )


def _check_start(subject: Subject) -> None:
    """Refuse a model whose embedding lacks its start token."""
    start = np.array([] if subject.start_id is None else [subject.start_id], dtype=np.int64)
    check_ids(start, subject.vocab_size, f"{subject.path}: its BOS or EOS", "its embedding")


def _check_is_text(path: Path, documents: list[Text]) -> None:
    """Refuse a file with a zero byte, or with many bytes that are not UTF-8."""
    for document in documents:
        if "\0" in document.text and kind_of(path) in TEXT:
            raise UserError(f"{path}: is no text file: it has a byte 0 at character {document.text.index(chr(0))}")
        if document.replaced > _MOST_REPLACED * len(document.text):
            raise UserError(
                f"{path}: is no text in UTF-8: {document.replaced} of a document's {len(document.text)} characters are "
                "invalid bytes; convert it to UTF-8 first"
            )


def open_text(name: str, path: Path, subject: Subject) -> TextSet:
    """Open a text file as one document, or a .jsonl file as one document per line; empty documents are left out.

    Raises:
        UserError: for a file that is missing, unreadable, empty or not text, a tokenizer without EOS, and tokens that
            the model's embedding lacks.
    """
    tokenizer = subject.tokenizer
    _check_start(subject)
    if not path.is_file():
        what = f"has no {MANIFEST}, so it is no prepared folder" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {what}; allowed: a prepared folder or a text file")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the model's tokenizer has no EOS token (eos_token), which has to end every document")
    documents = [document for document in read_file(path, TEXT_FIELD) if document.text.strip()]
    if not documents:
        raise UserError(f"{path}: holds no text")
    _check_is_text(path, documents)
    replaced = sum(document.replaced for document in documents)
    if replaced:
        log.warning("%s: %d byte sequences are not UTF-8 and were replaced by U+FFFD", path, replaced)
    return _text_set(name, path, [document.text for document in documents], subject, replaced)


def hold_texts(name: str, texts: Sequence[str], subject: Subject) -> TextSet:
    """A set of documents in memory; empty ones are left out.

    Raises:
        UserError: if all are empty, for a tokenizer without EOS, and tokens that the model's embedding lacks.
    """
    _check_start(subject)
    path = Path(f"<{name}>")
    if subject.tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the model's tokenizer has no EOS token (eos_token), which has to end every document")
    if not (documents := [text for text in texts if text.strip()]):
        raise UserError(f"{path}: holds no text")
    return _text_set(name, path, documents, subject)


def _text_set(name: str, path: Path, texts: list[str], subject: Subject, replaced: int = 0) -> TextSet:
    source = TextTokens(texts, subject.tokenizer)
    tokens = source.read(0, len(source))
    check_ids(tokens, subject.vocab_size, str(path), f"the embedding of {subject.name}")
    return TextSet(
        name=name,
        path=path,
        split=None,
        source=source,
        n_documents=len(texts),
        n_bytes=sum(len(text.encode()) for text in texts),
        digest=hashlib.sha256(tokens.tobytes()).hexdigest(),
        replaced=replaced,
    )


class TokenBytes:
    """Bytes of text that each token stands for, to count the bytes of a part of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    @cached_property
    def _serialized(self) -> dict:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return json.loads(backend.to_str()) if backend else {}

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._serialized.get("decoder") or {}
        return "ByteLevel" in [part.get("type") for part in (decoder, *decoder.get("decoders", []))]

    @property
    def exact(self) -> bool:
        """Whether the bytes of a text's tokens add up to the text's: for byte-level tokenizers without normaliser."""
        return self._byte_level and self._serialized.get("normalizer") is None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each token id, int64 (vocabulary,): 0 for special tokens.

        In a byte-level vocabulary each character of a token is a byte. In others (SentencePiece) `<0x0A>` is a byte,
        `▁` a space, and every other character counts with its UTF-8 bytes.
        """
        tokenizer = self._tokenizer
        added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab()
        lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, i in vocabulary.items():
            if i in special:
                continue
            if self._byte_level and i not in added:
                lengths[i] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode())
        return lengths
