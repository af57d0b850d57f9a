"""A subject as a model of lm-evaluation-harness, with the cache of each context compressed if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm.errors import UserError
from cllm.evaluate.subjects import Subject
from cllm.evaluate.tasks.run import run_samples
from cllm.evaluate.tasks.sample import Answer, Question, Sample

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

_DEFAULT_LENGTH = 2048
"""Tokens of a model whose context is unknown, as lm-eval's `hf`."""
_DEFAULT_GENERATE = 256


def subject_lm(
    subject: Subject,
    device: torch.device,
    *,
    spec: str | None = None,
    start: bool = True,
    batch: int | None = None,
    calibration: Path | None = None,
) -> LM:
    """A model that lm-eval can evaluate; the arguments are those of `Requests`."""
    from lm_eval.api.model import TemplateLM

    class SubjectLM(Requests, TemplateLM):
        """`Requests` as a model of lm-eval, which encodes pairs of texts."""

    return SubjectLM(subject, device, spec=spec, start=start, batch=batch, calibration=calibration)


class Requests:
    """Answers lm-eval's requests through cllm's runner: the members that a `TemplateLM` needs.

    The context but for its last token is read first; that part's cache is compressed. Texts that are too long lose
    their beginning, as with lm-eval's model `hf`.

    Args:
        spec: a method of --posthoc; None: the cache is not compressed.
        start: put the start token (BOS or EOS) before every context. False: only the special tokens that the tokenizer
            adds, as `hf` does by default.
        calibration: as of `run_samples`.
    """

    def __init__(
        self,
        subject: Subject,
        device: torch.device,
        *,
        spec: str | None,
        start: bool,
        batch: int | None,
        calibration: Path | None = None,
    ):
        super().__init__()
        self.tokenizer: Any = subject.tokenizer
        self._subject, self._spec, self._batch, self._calibration = subject, spec, batch, calibration
        self._start = (subject.start_id,) if start and subject.start_id is not None else ()
        self._on = device
        self.max_length = subject.context or _DEFAULT_LENGTH
        self.refused: dict[str, str] = {}
        """`spec` with the reason, once it could not compress the contexts; the request has failed then."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._on

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's request cache."""
        return str(self._subject.path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """EOS. lm-eval puts it before a text without context, if there is no start token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, else EOS."""
        start = self._subject.start_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids, with the tokenizer's special tokens if the start token is not added anyway."""
        special = not self._start if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        positions: dict[tuple[int, ...], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            kept = self._kept(context, len(continuation))
            positions.setdefault(kept, []).append(n)
        samples = [
            self._sample(context, Question(options=tuple(tuple(requests[n][2]) for n in members)))
            for context, members in positions.items()
        ]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for answer, members in zip(self._answers(samples), positions.values(), strict=True):
            for n, losses, top1 in zip(members, answer.losses, answer.top1, strict=True):
                found[n] = (-sum(losses), all(top1))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of the context's length that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for n, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((("", ""), context, continuation))
                owners.append(n)
        totals = [0.0] * len(requests)
        for n, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[n] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to one of its `until` texts. Raises `UserError` for a task that samples."""
        samples = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1):
                raise UserError(f"--suite lm_eval: {request.task_name} samples text; allowed: greedy generation")
            until = options.get("until") or []
            stop = (until,) if isinstance(until, str) else tuple(until)
            length = int(options.get("max_gen_toks", options.get("max_new_tokens", _DEFAULT_GENERATE)))
            length = min(length, self.max_length - len(self._start) - 1)
            kept = self._kept(self.tok_encode(context), length)
            samples.append(self._sample(kept, Question(generate=length, stop=tuple(filter(None, stop)))))
        return [answer.text for answer in self._answers(samples)]

    def _kept(self, context: Sequence[int], after: int) -> tuple[int, ...]:
        """The start token and the end of a context that leaves room for `after` tokens."""
        start = () if tuple(context[:1]) == self._start else self._start
        room = self.max_length - len(start) - after
        if room < 1 and not start:
            raise UserError(
                f"--suite lm_eval: an answer has {after} tokens; allowed: below {self.max_length}, the context"
            )
        return (*start, *(context[-room:] if room > 0 else ()))

    def _sample(self, context: tuple[int, ...], question: Question) -> Sample:
        """The last token is read after the rest was compressed, unless it is the only one."""
        cut = max(1, len(context) - 1)
        return Sample(task="", context=context[:cut], questions=(replace(question, prompt=context[cut:]),))

    def _answers(self, samples: Sequence[Sample]) -> list[Answer]:
        specs = [] if self._spec is None else [self._spec]
        label = f"{self._subject.name} on lm_eval"
        (result,) = run_samples(
            self._subject,
            samples,
            specs,
            self._on,
            batch=self._batch,
            label=label,
            refused=self.refused,
            calibration=self._calibration,
        )
        if self.refused:
            raise UserError(f'--posthoc "{self._spec}": {self.refused[result.spec or ""]}')
        return [given[0] for given in result.answers if given is not None]
