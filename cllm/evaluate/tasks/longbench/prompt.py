"""Token ids of a long prompt: the middle cut out if it is too long, then divided into a context and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cllm.errors import UserError
from cllm.evaluate.tasks.sample import Question, Sample
from cllm.evaluate.tasks.text import continuations, n_bytes, pieces, start

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

Ids = tuple[int, ...]


def middle_cut(context: Ids, prompt: Ids, limit: int) -> tuple[Ids, Ids]:
    """The first and the last half of `limit` tokens of a context and the prompt after it; all of them if they fit.

    The prompt has at least one token, so that every score depends on what was read after the context.
    """
    ids = context + prompt
    half = limit // 2
    kept = range(len(ids)) if len(ids) <= limit else [*range(half), *range(len(ids) - half, len(ids))]
    end = sum(position < len(context) for position in kept)
    end = min(end, len(kept) - 1)
    chosen = tuple(ids[position] for position in kept)
    return chosen[:end], chosen[end:]


def limit_of(subject: Subject, length: int | None, name: str) -> int:
    """Tokens of prompt and answer together: `length`, else the model's context. Raises `UserError` if too large."""
    limit = length or subject.context or 4096
    if subject.context is not None and limit > subject.context:
        raise UserError(
            f"--suite {name}: length={limit}; allowed: up to the context of {subject.name}, {subject.context}"
        )
    return limit


def long_sample(
    subject: Subject,
    context: str,
    after: str,
    *,
    task: str,
    references: Sequence[str],
    question: Question,
    limit: int,
) -> Sample:
    """A sample of a long context, the text after it, and an answer: the first reference, whose loss is measured.

    Args:
        question: its other properties, such as `generate` and `facts`.
        limit: tokens of start token, prompt and answer together.

    Raises:
        UserError: if `limit` leaves no room for a prompt.
    """
    before, (answer,) = continuations(subject, context + after, references[:1])
    first = start(subject)
    room = limit - len(first) - max(question.generate, len(answer))
    if room < 2:
        longest = limit - len(first) - room
        raise UserError(
            f"{task}: an answer has up to {longest} tokens, and length={limit} leaves {max(room, 0)} for the prompt; "
            "allowed: 2 or more"
        )
    end = len(pieces(subject, context, after + references[0])[0])
    kept, prompt = middle_cut(before[:end], before[end:], room)
    question = replace(
        question, prompt=prompt, options=(answer,), option_bytes=n_bytes(references[:1]), references=tuple(references)
    )
    return Sample(task=task, context=(*first, *kept), questions=(question,))
