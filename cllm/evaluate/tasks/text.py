"""Token ids of texts, cut into a context and what follows, and the text of generated tokens.

A tokenizer may join the end of one piece with the beginning of the next. So the pieces are encoded together and cut at
the longest common prefix of the ids with and without the next piece. The ids of all pieces together are always those of
the entire text. A leading space belongs to the piece that it leads: `pieces(subject, "Question: ...\nAnswer:", " no")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

Ids = tuple[int, ...]


def start(subject: Subject) -> Ids:
    """The token that begins a context, BOS or EOS; none for a model that was trained with document masks."""
    return () if subject.start_id is None else (subject.start_id,)


def encode(subject: Subject, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text, without special tokens; one that is spelt out in the text is ordinary text."""
    if not texts:
        return []
    encoded = subject.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def pieces(subject: Subject, *texts: str) -> tuple[Ids, ...]:
    """The ids of each of several consecutive texts, without a start token. Together they are those of the joined text.

    A token that spans two texts belongs to the later one.
    """
    joined = ["".join(texts[: i + 1]) for i in range(len(texts))]
    encoded = encode(subject, joined)
    ids, cuts = encoded[-1], [0]
    cuts += [max(cuts[-1], _common(part, ids)) for part in encoded[:-1]]
    return tuple(ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True))


def continuations(subject: Subject, before: str, options: Sequence[str]) -> tuple[Ids, tuple[Ids, ...]]:
    """The ids of `before`, without a start token, and of each option after it.

    If the tokenizer joins an option with the end of `before`, the ids of `before` end earlier, for all options alike.
    """
    first, *whole = encode(subject, [before, *(before + option for option in options)])
    cut = min(_common(first, ids) for ids in whole)
    return first[:cut], tuple(ids[cut:] for ids in whole)


def decode(subject: Subject, ids: Sequence[int]) -> str:
    """The text of token ids; special tokens are left out."""
    return str(subject.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def n_bytes(texts: Sequence[str]) -> tuple[int, ...]:
    """UTF-8 bytes of each text, as for `Question.option_bytes`."""
    return tuple(len(text.encode()) for text in texts)


def _common(first: Ids, second: Ids) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
