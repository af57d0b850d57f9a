"""A batch of questions read after their contexts: losses of options, and greedy generation.

Rows are samples of a batch. In each turn every row reads one option; a row that has none left reads padding. Shorter
options are padded on the right, which no token before the padding sees, so padding changes no score.

Shapes: R rows of a pass, T tokens of the longest option with its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.evaluate.tasks.caches import Context
from cllm.evaluate.tasks.sample import Question
from cllm.posthoc.method import Engine

Step = Callable[[Tensor], Tensor]
"""Logits (R, V) after one more token (R,) of every row."""
_MOST_LOGITS = 2**25
"""Logits computed at once, which bounds their memory: 128 MiB in fp32."""
_LOOK_EVERY = 8
"""Tokens generated on a GPU before the host looks whether all rows have ended."""


class Read(NamedTuple):
    """An option that a row reads."""

    question: int
    option: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class Scored(NamedTuple):
    """Losses in nats of an option's tokens, and whether each has the largest logit."""

    losses: tuple[float, ...]
    top1: tuple[bool, ...]


def reads_of(questions: Sequence[Question]) -> list[Read]:
    """Every option of a sample, the shortest first."""
    reads = [
        Read(i, j, question.prompt, option)
        for i, question in enumerate(questions)
        for j, option in enumerate(question.options)
    ]
    return sorted(reads, key=lambda read: len(read.prompt) + len(read.tokens))


class Reader:
    """Reads on top of the contexts of one batch.

    Args:
        engine: the model.
        context: the contexts' cache.
        last: final hidden states (R, 1, d_model) of the contexts' last tokens; None for empty contexts.
        chunk: tokens of a pass, for methods that treat later tokens in pieces; None: any number.
        device: of the model.
        step: a faster way to decode a token than the engine's, with the cache that `context.begin()` returns.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        last: Tensor | None,
        *,
        chunk: int | None,
        device: torch.device,
        step: Step | None = None,
    ):
        self._engine, self._context, self._last, self._chunk, self._device = engine, context, last, chunk, device
        self._step = step

    # ---- options -----------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[Sequence[Read]]) -> list[list[Scored]]:
        """The scores of every row's reads, in order."""
        scored: list[list[Scored]] = [[] for _ in rows]
        for n in range(max(map(len, rows), default=0)):
            turn = [reads[n] if n < len(reads) else None for reads in rows]
            reading = [i for i, read in enumerate(turn) if read is not None]
            for i, score in zip(reading, self._score_turn(turn), strict=True):
                scored[i].append(score)
        return scored

    def _score_turn(self, turn: Sequence[Read | None]) -> list[Scored]:
        """The scores of one read of every row, without the rows that have none."""
        texts = [() if read is None else read.prompt + read.tokens for read in turn]
        states = self._states([text[:-1] for text in texts])  # R, T + (0 or 1), d_model: state i predicts token i
        shift = 0 if self._last is not None else 1  # without a context, state i predicts token i + 1
        rows, places, targets, counts = list[int](), list[int](), list[int](), list[int]()
        for i, (read, text) in enumerate(zip(turn, texts, strict=True)):
            if read is None:
                continue
            first = max(len(read.prompt), shift)
            rows += [i] * (len(text) - first)
            places += range(first - shift, len(text) - shift)
            targets += text[first:]
            counts.append(len(text) - first)
        if not targets:
            return [Scored((), ()) for _ in counts]
        assert states is not None
        losses, right = self._losses(states[rows, places], torch.tensor(targets, device=self._device))
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [
            Scored(tuple(losses[end - n : end]), tuple(right[end - n : end]))
            for end, n in zip(ends, counts, strict=True)
        ]

    def _losses(self, states: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Losses and top-1 of `targets` (N,), predicted from `states` (N, d_model)."""
        vocabulary = getattr(self._engine.head, "out_features", 2**17)
        size = max(_MOST_LOGITS // vocabulary, 1)
        losses, right = [], []
        for part, target in zip(states.split(size), targets.split(size), strict=True):
            logits = self._engine.head(part[None])[0].float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(dim=-1) == target)
        return torch.cat(losses).tolist(), torch.cat(right).tolist()

    def _states(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """The states before and after each token of `texts`, padded: (R, 1 + T, d_model), or (R, T, d_model) without
        contexts. None if there is neither."""
        length = max(map(len, texts), default=0)
        if not length:
            return self._last
        hidden = self._feed(texts, length, self._context.begin())
        return hidden if self._last is None else torch.cat((self._last.to(hidden.dtype), hidden), dim=1)

    def _feed(self, texts: Sequence[Sequence[int]], length: int, cache: Any) -> Tensor:
        """Final hidden states (R, length, d_model) of `texts`, padded and added to `cache`."""
        padded = [[*text, *[0] * (length - len(text))] for text in texts]
        padded += [[0] * length] * (self._context.rows - len(texts))
        ids = torch.tensor(padded, dtype=torch.long, device=self._device)
        parts = ids.split(self._chunk or length, dim=1)
        return torch.cat([self._engine.hidden(part, cache) for part in parts], dim=1)

    # ---- generation --------------------------------------------------------------------------------------------------

    def generate(
        self, questions: Sequence[Question | None], ended: Callable[[Question, Sequence[int]], bool]
    ) -> list[list[int]]:
        """The greedy continuation of each row's question, up to `Question.generate` tokens.

        All rows are at the same position in every step: a row whose prompt is longer than the shortest reads its
        prompt while others generate.

        Args:
            questions: one for each row; None: the row reads padding.
            ended: whether the tokens generated for a question are enough.
        """
        prompts = [() if question is None else question.prompt for question in questions]
        asked = [0 if question is None else question.generate for question in questions]
        shared = min(len(prompt) for prompt, n in zip(prompts, asked, strict=True) if n)
        cache, state = self._context.begin(), self._last
        if shared:
            starts = [prompt[:shared] for prompt in prompts]
            state = self._feed(starts, shared, cache)[:, -1:]
        assert state is not None, "nothing was read before generation"
        step = self._step or self._engine_step(cache)
        chosen = self._engine.head(state)[:, -1].argmax(dim=-1)
        end = max(len(prompt) + n for prompt, n in zip(prompts, asked, strict=True) if n) - shared
        forced = self._forced(prompts, shared, end)
        columns: list[Tensor] = []
        look = _LOOK_EVERY if self._device.type == "cuda" else 1
        for n in range(end):
            chosen = torch.where(forced[n] >= 0, forced[n], chosen)
            columns.append(chosen)
            if n + 1 == end:
                break
            if (n + 1) % look == 0 and _all_ended(self._generated(columns, prompts, asked, shared), questions, ended):
                break
            chosen = step(chosen).argmax(dim=-1)
        return self._generated(columns, prompts, asked, shared)

    def _forced(self, prompts: Sequence[Sequence[int]], shared: int, steps: int) -> Tensor:
        """(steps, R): the tokens of the prompts after the first `shared`, -1 where a row generates."""
        forced = torch.full((steps, self._context.rows), -1, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            if len(prompt) > shared:
                forced[: len(prompt) - shared, i] = torch.tensor(prompt[shared:])[:steps]
        return forced.to(self._device)

    def _engine_step(self, cache: Any) -> Step:
        return lambda tokens: self._engine.logits(tokens[:, None], cache)[:, -1]

    def _generated(
        self, columns: list[Tensor], prompts: Sequence[Sequence[int]], asked: Sequence[int], shared: int
    ) -> list[list[int]]:
        tokens = torch.stack(columns, dim=1).tolist()
        starts = [max(len(prompt) - shared, 0) for prompt in prompts]
        return [row[start : start + n] for row, start, n in zip(tokens, starts, asked, strict=False)]


def _all_ended(
    generated: Sequence[Sequence[int]],
    questions: Sequence[Question | None],
    ended: Callable[[Question, Sequence[int]], bool],
) -> bool:
    pairs = [(ids, question) for ids, question in zip(generated, questions, strict=True) if question is not None]
    return all(len(ids) >= question.generate or ended(question, ids) for ids, question in pairs)
