"""Drafts as token ids of a subject, with its start token or its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cllm.errors import UserError
from cllm.evaluate.tasks import text
from cllm.evaluate.tasks.ruler.draft import Draft
from cllm.evaluate.tasks.ruler.lengths import Encoded
from cllm.evaluate.tasks.text import Ids

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject

_TOGETHER = 64
"""Drafts that are encoded at a time."""
_TAIL = 120
"""Characters at the end of a context that are encoded once more, to find where its tokens end."""
_MARK = "<<the text of the user>>"


class Encoder:
    """Encodes drafts.

    The entire text of each sample is encoded at once, so its ids are those that a user's prompt would have. Where the
    context and the options begin is found from the last characters alone, and where that is not exact, from
    everything.

    Args:
        chat: put the context and the question into a user's turn of the tokenizer's chat template; the answer prefix
            begins the assistant's turn.

    Raises:
        UserError: for `chat` and a tokenizer without a chat template, or with one that fails.
    """

    def __init__(self, subject: Subject, *, chat: bool = False):
        self._subject, self._chat = subject, chat
        self._start, self._between = self._turns() if chat else (text.start(subject), ())

    def _turns(self) -> tuple[Ids, Ids]:
        """The ids before and after a user's text, up to where the assistant begins."""
        tokenizer = self._subject.tokenizer
        whose = f"--suite ruler: chat=true: the tokenizer of {self._subject.name}"
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{whose} has no chat template; leave chat out")
        try:
            turn = [{"role": "user", "content": _MARK}]
            whole = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            before, after = whole.split(_MARK)
        except Exception as error:  # a template is a program of its author
            raise UserError(f"{whose} has a chat template that fails: {error}") from None
        before_ids, after_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return tuple(before_ids), tuple(after_ids)

    def count(self, string: str) -> int:
        """The tokens of a text."""
        return len(text.encode(self._subject, [string])[0])

    def __call__(self, drafts: Sequence[Draft]) -> list[Encoded]:
        """The ids of each draft."""
        return [one for i in range(0, len(drafts), _TOGETHER) for one in self._some(drafts[i : i + _TOGETHER])]

    def _some(self, drafts: Sequence[Draft]) -> Iterator[Encoded]:
        """As `__call__`, for a few drafts."""
        ends = [draft.question if self._chat else draft.question + draft.prefix for draft in drafts]
        wholes = [draft.context + end for draft, end in zip(drafts, ends, strict=True)]
        for draft, end, whole, ids in zip(drafts, ends, wholes, text.encode(self._subject, wholes), strict=True):
            cut = self._boundary(draft.context, end, ids)
            if self._chat:
                prefix, options = text.continuations(self._subject, draft.prefix.lstrip(), draft.options)
                prompt = ids[cut:] + self._between + prefix
            else:
                prompt, options = self._answers(end, whole, draft.options, ids)
                cut = min(cut, len(prompt))  # a token of an option may begin in the context
                prompt = prompt[cut:]
            yield Encoded(context=self._start + ids[:cut], prompt=prompt, options=options)

    def _boundary(self, context: str, end: str, ids: Ids) -> int:
        """The number of the tokens `ids` of context + end that belong to the context."""
        before, after = text.pieces(self._subject, _tail(context), end)
        cut = len(ids) - len(after)
        return cut if ids[cut - 1 :] == (*before[-1:], *after) else len(text.pieces(self._subject, context, end)[0])

    def _answers(self, end: str, whole: str, options: Sequence[str], ids: Ids) -> tuple[Ids, tuple[Ids, ...]]:
        """The ids of `whole`, which ends in `end`, and of each option after it, as `continuations` gives them."""
        tail = _tail(end)
        before, after = text.continuations(self._subject, tail, options)
        cut = len(ids) - (self.count(tail) - len(before))
        if ids[cut - 1 : cut] == before[-1:]:
            return ids[:cut], after
        return text.continuations(self._subject, whole, options)


def _tail(string: str) -> str:
    """The last characters of a text, from a space on."""
    tail = string[-_TAIL:]
    return tail if len(tail) == len(string) else tail[max(0, tail.find(" ")) :]
