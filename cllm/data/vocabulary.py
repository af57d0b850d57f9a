"""Comparison of tokenizers, and of token ids with a vocabulary.

Two tokenizers are the same if they turn every text into the same tokens. The layout of `tokenizer.json` does not count:
programs reorder it, write defaults out, or write one rule in two ways when they save it again. Special tokens that only
one of them has do not count either, since a special token spelt out in a text is ordinary text in prepared data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cllm import trust
from cllm.errors import DataError, UserError

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = (TOKENIZER_FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""A folder without any of these has no tokenizer."""
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Parts of `tokenizer.json` that determine the tokens of a text."""

_PROBE = (
    "The quick brown fox doesn't jump; I'LL say it's 12345.678e-9, OK?!  Two  spaces,   three\t\ttabs \n\n\n \r\n",
    "  leading and trailing  ",
    "def f(x_1, camelCase):\n    return {'a': [1, 22, 333, 4444]}  # comment --- *** === <!-- -->\n\n",
    "naïve café Ångström ÀÉÎÕÜ ß ẞ ſ İ ı Straße ﬁ ﬀ ½ ² № ™ … “quotes” ‘single’ – — ﹏ ＦＵＬＬ　ｗｉｄｔｈ",
    "e\u0301 A\u030a n\u0303 o\u0302\u0323 \u1112\u1161\u11ab 한글 \u3099か\u3099 ｶﾞ",  # decomposed letters
    "Русский текст, Ελληνικά Σς, עִבְרִית, العَرَبِيَّة ١٢٣, हिन्दी क्षि १२३, ไทยภาษา, 日本語と漢字。中文，句號！ ქართული",
    "🙂 👩\u200d👩\u200d👧 👍🏽 🇯🇵 ❤️ \u200b\u200d\ufeff \u00a0nbsp\u2003em\u3000wide \u2028 \u2029 \u0085",
    "\x01 \x0b \x0c \x00 \x7f \ufffd",
    "https://example.org/a?b=c&d=%20 user@example.com C:\\path\\to #tag @name $1,000.00 50% 3.14 1e10 0x1F v2.0.1",
    "▁under▁score _a_ __b__ Ġ Ċ ## ##ing <0x0A> </w> a.b,c;d:e!f?g(h)i[j]k{l}m/n\\o|p",
    "aaaaaaaaaaaaaaaaaaaa AAAAAAAA 00000000000 ................ ---------------- \n\n\n\n\n\n \t \t \t      x",
)
"""Texts that different normalisers and pre-tokenizers turn into different tokens."""


def tokenizer_sha256(folder: Path) -> str:
    """A hash of the parts of a folder's `tokenizer.json` that determine the tokens of a text, whatever its layout.

    Equal hashes mean the same tokenizer. Different hashes may be the same tokenizer too: see `same_tokenizer`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not the JSON of a tokenizer.
    """
    return _sha256((folder / TOKENIZER_FILE).read_bytes())


def backend_sha256(tokenizer: Tokenizer) -> str:
    """`tokenizer_sha256` of a tokenizer in memory."""
    return _sha256(_text_of(tokenizer))


def _sha256(text: str | bytes) -> str:
    try:
        content = json.loads(text)
        parts = [content[part] for part in _PARTS]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not the JSON of a tokenizer: {type(error).__name__}: {error}") from None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _text_of(tokenizer: Tokenizer) -> str:
    """The JSON of a tokenizer. Raises `UserError` if it has parts written in Python, which have no JSON."""
    try:
        return tokenizer.to_str()
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(f"a tokenizer that cannot be written as {TOKENIZER_FILE} cannot be compared: {error}") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's `tokenizer.json`, which made the tokens of the prepared data around it.

    Raises:
        DataError: if the file is missing or not a tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(f"{path}: missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise DataError(f"{path}: not a tokenizer: {error}") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint folder, as transformers loads it. No code from the folder is run.

    Depending on the class that `tokenizer_config.json` names, transformers may use other rules than `tokenizer.json`
    has. Preparation and evaluation use these rules, so comparisons do too.

    Raises:
        UserError: if there is no tokenizer, or none that the `tokenizers` library can run.
    """
    return backend_of(trust.load_tokenizer(folder), folder)


def backend_of(tokenizer: Any, folder: Path) -> Tokenizer:
    """The `tokenizers` object inside a transformers tokenizer. Raises `UserError` for a tokenizer without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{folder}: its tokenizer has no {TOKENIZER_FILE} form (a `fast` tokenizer), which is needed")
    return backend


def same_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether both turn every text into the same tokens, and have the same ids for special tokens that both have.

    The models (vocabulary, merges, scores) and the added tokens must be equal. Normalisers and pre-tokenizers may
    differ in JSON if they turn a set of probing texts in many scripts into the same tokens.
    """
    a, b = (json.loads(_text_of(tokenizer)) for tokenizer in (first, second))
    if all(a[part] == b[part] for part in _PARTS):
        return True
    if _model(a) != _model(b) or _ordinary_added(a) != _ordinary_added(b):
        return False
    ours, theirs = _special_added(a), _special_added(b)
    if any(ours[content] != theirs[content] for content in ours.keys() & theirs.keys()):
        return False
    added = [token["content"] for content in (a, b) for token in content["added_tokens"]]
    probe = [*_PROBE, *(f"word{token} {token}word {token}" for token in added)]
    return _encodings(first, probe) == _encodings(second, probe)


def _model(content: dict[str, Any]) -> dict[str, Any]:
    """The model without values that are null, empty or false: some programs write them, others do not."""
    return {key: value for key, value in content["model"].items() if value or key in ("vocab", "merges")}


def _ordinary_added(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {token["content"]: token for token in content["added_tokens"] if not token["special"]}


def _special_added(content: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}


def _encodings(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts as preparation encodes them. `tokenizer` is not changed."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return [encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)]


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, whose: str) -> None:
    """Refuse token ids that a vocabulary lacks.

    Args:
        tokens: int64, any shape.
        vocab_size: ids go from 0 to one less.
        where: the file or text of the tokens, for the message.
        whose: the vocabulary's owner, such as `the model in runs/a`, for the message.

    Raises:
        DataError: naming `where`, the largest or smallest id, and the allowed ones.
    """
    if not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"{where}: holds token {high if high >= vocab_size else low}, but {whose} has tokens 0 to {vocab_size - 1}"
        )
