"""The size of a haystack that fills a context, and samples that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm.errors import UserError
from cllm.evaluate.tasks.ruler.draft import Draft, Task

log = logging.getLogger(__name__)

_INTERPOLATIONS = 8
_FULL = 0.9
"""Share of the length below which a haystack that has ended is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A draft as token ids."""

    context: tuple[int, ...]
    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def tokens(self, generate: int) -> int:
        """Tokens of the prompt, and of the longest text that follows it."""
        return len(self.context) + len(self.prompt) + max(generate, *map(len, self.options))


class TooLong(UserError):
    """A task that needs a longer context."""

    def __init__(self, task: Task, needed: int):
        super().__init__(
            f"--suite ruler: {task.name} needs at least length={needed} with this tokenizer, and length={task.length} "
            "is asked for; take a larger length, or name other tasks"
        )
        self.task, self.needed = task.name, needed

    def beyond(self, name: str, context: int) -> UserError:
        """The error for a model whose context is shorter than what the task needs."""
        return UserError(
            f"--suite ruler: {self.task} needs at least length={self.needed} with this tokenizer, and the context of "
            f"{name} is {context}; name other tasks"
        )


Encode = Callable[[Sequence[Draft]], list[Encoded]]


def largest_size(
    count: Callable[[int], int], limit: int, *, smallest: int, step: int, largest: int | None = None
) -> int | None:
    """Find the largest of smallest, smallest + step, ... whose count of tokens is at most `limit`.

    Counts need not grow strictly: the result fits in any case. It takes about 5 counts where they grow evenly.

    Returns:
        The size; None if not even the smallest fits.
    """
    low, low_count = 0, count(smallest)
    if low_count > limit:
        return None
    most = None if largest is None else max(0, (largest - smallest) // step)
    high, guess, tries = None, 1, 0
    slope = 0.0
    while (high is None or high - low > 1) and low != most:
        guess = guess if most is None else min(guess, most)
        tokens = count(smallest + guess * step)
        slope = (tokens - low_count) / (guess - low)
        if tokens <= limit:
            low, low_count = guess, tokens
        else:
            high = guess
        guess = low + max(1, int((limit - low_count) / slope)) if slope > 0 else 2 * low + 1
        tries += 1
        if high is not None:
            guess = min(guess, high - 1) if tries < _INTERPOLATIONS else (low + high) // 2
    return smallest + low * step


def fill(task: Task, encode: Encode, samples: int, *, room: int | None = None) -> list[tuple[Draft, Encoded]]:
    """Write `samples` samples of a task, each at most `task.length` tokens long.

    The size is found with the first sample. A sample that is too long shrinks by one step until it fits.

    Args:
        task: the task.
        encode: makes ids of texts.
        samples: their number.
        room: tokens to generate after the prompt; None: those of the task.

    Raises:
        TooLong: if a sample of the smallest size is too long; it names the task and the length that it needs.
    """

    generated = task.generate if room is None else room

    def count(size: int) -> int:
        return encode([task.draft(0, size)])[0].tokens(generated)

    smallest, step = task.smallest, task.step
    size = largest_size(count, task.length, smallest=smallest, step=step, largest=task.largest)
    if size is None:
        raise TooLong(task, count(smallest))
    if task.largest is not None and size + step > task.largest and (used := count(size)) < _FULL * task.length:
        log.warning("ruler: %s has no more text: %d of %d tokens are used", task.name, used, task.length)
    done: list[tuple[Draft, Encoded] | None] = [None] * samples
    left = list(range(samples))
    while left:
        drafts = [task.draft(index, size) for index in left]
        encoded = encode(drafts)
        needed = [one.tokens(generated) for one in encoded]
        for index, draft, one, tokens in zip(left, drafts, encoded, needed, strict=True):
            if tokens <= task.length:
                done[index] = (draft, one)
        left = [index for index, tokens in zip(left, needed, strict=True) if tokens > task.length]
        if left and size == smallest:
            raise TooLong(task, max(needed))
        size = max(smallest, size - step)
    return [pair for pair in done if pair is not None]
