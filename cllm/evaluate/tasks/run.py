"""Answers of a subject to samples, for each way to compress the contexts' caches.

Contexts of one length form a batch, which is read once. Each `--posthoc` spec compresses that cache, and all questions
are read on top of the result. Scores do not depend on the size of batches or on the order of samples: methods that
choose ranks or budgets for an entire batch get one context at a time.

Methods that calibrate do so before anything is scored: on a text of their own (`evaluate/calibration.py`), or on a few
contexts. They see no question and no option, so all samples are scored. The contexts are chosen from the set of
samples, whatever its order.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.evaluate.calibration import calibration_of, calibration_tokens
from cllm.evaluate.subjects import Subject
from cllm.evaluate.tasks.batches import batches, default_rows, is_cyclic
from cllm.evaluate.tasks.caches import ForkedContext, StaticContext, can_be_static, uncompressed
from cllm.evaluate.tasks.reading import Reader, Step, reads_of
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.text import decode
from cllm.model.graph import StepGraph
from cllm.posthoc import UNCOMPRESSED
from cllm.posthoc.engine import DecoderEngine
from cllm.posthoc.method import Compressor, Engine
from cllm.posthoc.registry import parse
from cllm.posthoc.tensor_tree import total_bytes
from cllm.progress import ProgressMeter
from cllm.signals import raise_if_stopped

_CALIBRATION = 8
"""Contexts on which methods calibrate, at most."""


@dataclass(kw_only=True)
class Result:
    """The answers for one spec."""

    spec: str | None
    """None: the cache was not compressed."""
    answers: list[list[Answer] | None]
    """Of every question of every sample, in order; None for the samples of a task that was left out."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks with a context that the method cannot compress, and the reason."""
    seconds: float = 0.0
    """Time of compression, questions and generation."""
    nbytes: int = 0
    """Bytes of all contexts' caches, without those in host memory."""
    host_nbytes: int = 0
    """Bytes of those in host memory."""
    own_nbytes: int = 0
    """Bytes of the uncompressed ones."""
    weight_bytes: int = 0
    """See `Compressor.weight_bytes`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """See `Compressor.facts`."""
    calibration: str | None = None
    """See `calibration_of`."""


def run_samples(
    subject: Subject,
    samples: Sequence[Sample],
    specs: Sequence[str],
    device: torch.device,
    *,
    batch: int | None = None,
    label: str = "",
    refused: dict[str, str] | None = None,
    calibration: Path | None = None,
) -> list[Result]:
    """One result for each of `specs`; without specs, one of the uncompressed cache.

    Args:
        subject: the model.
        samples: contexts and questions, none longer than the subject's context.
        specs: as of `--posthoc`.
        device: of the subject's model.
        batch: samples computed together, at most; None: by memory. It changes speed only.
        label: before the progress bar.
        refused: gets the specs that compress no context, with the reason. They have no answers.
        calibration: text on which methods calibrate; None: contexts of `samples`.

    Raises:
        UserError: for a spec that is wrong, for a loss that is not finite, and if the GPU's memory runs out; without
            `refused`, if no spec compresses any context.
    """
    methods = [parse(spec) for spec in specs]
    results = [
        Result(spec=spec, answers=[None if sample.questions else [] for sample in samples]) for spec in specs or (None,)
    ]
    engine = _engine(subject, methods)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16")
    total = len(results) * sum(1 for sample in samples if sample.questions)
    with autocast, ProgressMeter(total, label, "sample") as progress:
        if methods:
            ids = calibration_tokens(subject, calibration, _longest_contexts(samples).to(device))
            _calibrate(engine, methods, samples, ids, results)
        rows = default_rows(engine, device) if batch is None else lambda longest: batch
        for alone in (False, True):  # methods that choose for a batch get one context at a time
            each: Sequence[Compressor | None] = methods or [None]
            pairs = zip(each, results, strict=True)
            own = [(m, result) for m, result in pairs if (m is not None and m.chooses_for_batch) == alone]
            parts = [m for m, _ in own if m is not None], [result for _, result in own]
            runner = _Runner(subject, engine, *parts, device)
            for indices in batches(samples, (lambda _: 1) if alone else rows, exact=is_cyclic(engine)) if own else ():
                runner.add_answers(samples, indices, progress)
    for result, method in zip(results, methods, strict=bool(methods)):
        result.weight_bytes, result.facts = method.weight_bytes(), method.facts()
        result.calibration = calibration_of(calibration, method)
    for result in results:
        result.answers = [
            None if sample.task in result.left_out else given
            for sample, given in zip(samples, result.answers, strict=True)
        ]
        _check_finite(subject, result)
    useless = [result for result in results if all(answers is None for answers in result.answers)]
    if refused is not None:
        refused |= {result.spec: next(iter(result.left_out.values())) for result in useless if result.spec is not None}
    elif len(useless) == len(results):
        raise UserError(f'--posthoc "{specs[0]}": {next(iter(results[0].left_out.values()))}')
    return results


def _engine(subject: Subject, methods: Sequence[Compressor]) -> Engine:
    """The subject's engine for samples; for a method with a cache class of transformers, the model's own."""
    needs_own = any(type(method).transformers_cache is not Compressor.transformers_cache for method in methods)
    return subject.engine() if needs_own else subject.sample_engine()


def _rounded_up(tokens: int) -> int:
    """A number of few significant bits, at most a quarter larger, so that static caches have few sizes."""
    unit = 2 ** max(tokens.bit_length() - 3, 0)
    return -(-tokens // unit) * unit


def _longest_contexts(samples: Sequence[Sample]) -> Tensor:
    """The longest contexts of one length, (B, T), a few at most."""
    contexts = sorted({sample.context for sample in samples if sample.context}, key=lambda ids: (-len(ids), ids))
    same = [ids for ids in contexts[:_CALIBRATION] if len(ids) == len(contexts[0])]
    return torch.tensor(same, dtype=torch.long)


def _calibrate(
    engine: Engine,
    methods: Sequence[Compressor],
    samples: Sequence[Sample],
    ids: Tensor,
    results: Sequence[Result],
) -> None:
    """Let methods calibrate on `ids`. Every task is left out of the result of a method that cannot."""
    for method, result in zip(methods, results, strict=True):
        try:
            method.prepare(engine, ids)
        except UserError as error:
            _leave_out(result, samples, error)


def _leave_out(result: Result, samples: Sequence[Sample], reason: UserError) -> None:
    """Leave the tasks of samples out of a result, unless the reason is that the command is asked to end."""
    raise_if_stopped(reason)
    result.left_out |= {sample.task: str(reason) for sample in samples}


def _is_left_out(result: Result, samples: Sequence[Sample]) -> bool:
    """Whether the tasks of all samples are left out of a result."""
    return all(sample.task in result.left_out for sample in samples)


def _check_finite(subject: Subject, result: Result) -> None:
    losses = (
        loss for answers in result.answers for answer in answers or () for option in answer.losses for loss in option
    )
    wrong = next((loss for loss in losses if not math.isfinite(loss)), None)
    if wrong is not None:
        raise UserError(f"{subject.path}: {result.spec or 'no compression'}: the loss of an option is {wrong}")


class _Runner:
    """Runs batches, and keeps what they share: static caches and CUDA graphs."""

    def __init__(
        self,
        subject: Subject,
        engine: Engine,
        methods: Sequence[Compressor],
        results: Sequence[Result],
        device: torch.device,
    ):
        self._subject, self._engine, self._methods, self._results = subject, engine, methods, results
        self._device = device
        self._static: StaticContext | None = None
        self._graph: StepGraph | None = None
        self._eos = _eos_ids(subject)

    def add_answers(self, samples: Sequence[Sample], indices: Sequence[int], progress: ProgressMeter) -> None:
        """Put the answers to the samples at `indices` into the results."""
        chosen = [samples[i] for i in indices]
        try:
            for result, answers in zip(self._results, self.run(chosen), strict=True):
                for i, given in zip(indices, answers, strict=True):
                    result.answers[i] = given
                progress.update(len(indices))
        except torch.OutOfMemoryError:
            size = f"{len(chosen)} samples of {max(sample.longest for sample in chosen)} tokens"
            raise UserError(f"out of GPU memory with {size}; lower --batch") from None

    def run(self, samples: Sequence[Sample]) -> Iterator[list[list[Answer]]]:
        """For each spec, the answers to every sample's questions."""
        nothing: list[list[Answer]] = [[] for _ in samples]
        if all(_is_left_out(result, samples) for result in self._results):
            yield from [nothing] * len(self._results)
            return
        room = _rounded_up(max(sample.longest for sample in samples) + 1)
        with torch.inference_mode():
            cache, last = self._prefill(samples)
            own = self._engine.nbytes(cache) if samples[0].context else 0
        for result, method in zip(self._results, self._methods or (None,), strict=True):
            if _is_left_out(result, samples):
                yield nothing
                continue
            with torch.inference_mode():
                began = self._now()
                try:
                    kept = method is None or result.spec == UNCOMPRESSED  # which every plan allows
                    filled = cache if method is None or kept else self._engine.compress(cache, method, measure=False)
                except UserError as error:
                    _leave_out(result, samples, error)
                    answers = nothing
                else:
                    result.own_nbytes += own
                    result.nbytes += own if kept else self._engine.nbytes(filled)
                    result.host_nbytes += 0 if kept else total_bytes(self._engine.host_tensors(filled))
                    reader = self._reader(filled, last, method, samples, room)
                    answers = self._answers(reader, samples)
                    del reader, filled
                result.seconds += self._now() - began
            yield answers
        for method in self._methods:
            method.release()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _prefill(self, samples: Sequence[Sample]) -> tuple[Any, Tensor | None]:
        """The cache of the contexts, and the hidden states of their last tokens."""
        cache = self._engine.new_cache()
        if not samples[0].context:
            return cache, None
        ids = torch.tensor([sample.context for sample in samples], dtype=torch.long, device=self._device)
        with contextlib.ExitStack() as stack:
            for method, result in zip(self._methods, self._results, strict=bool(self._methods)):
                if not method.watches or _is_left_out(result, samples):
                    continue
                try:
                    stack.enter_context(method.watch(self._engine))
                except UserError as error:
                    _leave_out(result, samples, error)
            return cache, self._engine.hidden(ids, cache)[:, -1:].clone()

    def _reader(
        self, cache: Any, last: Tensor | None, method: Compressor | None, samples: Sequence[Sample], room: int
    ) -> Reader:
        chunk = None if method is None else method.pass_size
        if last is None or not can_be_static(self._engine, cache):
            forked = ForkedContext(uncompressed(cache, self._engine), len(samples))
            return Reader(self._engine, forked, last, chunk=chunk, device=self._device)
        static = self._static_context(len(samples), room)
        static.load(cache)
        last = torch.cat((last, last.new_zeros(static.rows - len(samples), *last.shape[1:])))
        generates = any(question.generate for sample in samples for question in sample.questions)
        step = self._step(static) if generates and self._device.type == "cuda" else None
        return Reader(self._engine, static, last, chunk=chunk, device=self._device, step=step)

    def _static_context(self, rows: int, room: int) -> StaticContext:
        """A static cache for at least `rows` sequences of `room` tokens, the last one if it has the right size."""
        assert isinstance(self._engine, DecoderEngine)
        if self._device.type == "cuda":
            rows = 2 ** math.ceil(math.log2(rows))  # few sizes, because each needs a CUDA graph
        if self._static is None or (self._static.rows, self._static.cache.max_len) != (rows, room):
            self._static = self._graph = None  # freed before the next one is allocated
            self._static = StaticContext(self._engine, rows, room)
        return self._static

    def _step(self, static: StaticContext) -> Step:
        """A decode step as a CUDA graph; recording one leaves a token in windows, which `begin` restores."""
        assert isinstance(self._engine, DecoderEngine)
        if self._graph is None or not self._graph.is_valid:
            self._graph = StepGraph(self._engine.model, static.cache)
        return self._graph

    def _answers(self, reader: Reader, samples: Sequence[Sample]) -> list[list[Answer]]:
        """The answers to every sample's questions."""
        reads = [reads_of(sample.questions) for sample in samples]
        texts, scores = self._texts(reader, samples), reader.score(reads)
        answers: list[list[Answer]] = []
        for i, sample in enumerate(samples):
            by_place = {(read.question, read.option): score for read, score in zip(reads[i], scores[i], strict=True)}
            answers.append([])
            for n, question in enumerate(sample.questions):
                options = [by_place[n, m] for m in range(len(question.options))]
                ids = texts.get((i, n), ())
                answers[-1].append(
                    Answer(
                        losses=tuple(option.losses for option in options),
                        top1=tuple(option.top1 for option in options),
                        generated=ids,
                        text=_before(decode(self._subject, ids), question.stop) if ids else "",
                    )
                )
        return answers

    def _texts(self, reader: Reader, samples: Sequence[Sample]) -> dict[tuple[int, int], tuple[int, ...]]:
        """Generated tokens by sample and question."""
        asked = [[n for n, q in enumerate(sample.questions) if q.generate] for sample in samples]
        texts: dict[tuple[int, int], tuple[int, ...]] = {}
        for turn in range(max(map(len, asked))):
            places = {i: of[turn] for i, of in enumerate(asked) if turn < len(of)}
            questions = [sample.questions[places[i]] if i in places else None for i, sample in enumerate(samples)]
            generated = reader.generate(questions, lambda question, ids: self._kept(question, ids) is not None)
            for i, n in places.items():
                kept = self._kept(samples[i].questions[n], generated[i])
                texts[i, n] = tuple(generated[i][:kept])
        return texts

    def _kept(self, question: Question, ids: Sequence[int]) -> int | None:
        """The number of generated tokens before EOS, or up to the first stop; None if there is neither yet."""
        end = next((n for n, token in enumerate(ids) if token in self._eos), None)
        stops = question.stop
        if stops and any(stop in decode(self._subject, ids[:end]) for stop in stops):
            complete = (n for n in range(1, len(ids) + 1) if any(s in decode(self._subject, ids[:n]) for s in stops))
            return next(complete, end)
        return end


def _before(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _eos_ids(subject: Subject) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation config."""
    config = getattr(subject.model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = {subject.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return {token for token in ids if token is not None}
