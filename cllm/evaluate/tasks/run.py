"""Answers of a subject to samples, for each way to compress the contexts' caches."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cllm.errors import UserError
from cllm.evaluate.subjects import Subject
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.text import decode
from cllm.posthoc.method import Engine
from cllm.posthoc.registry import parse


@dataclass(kw_only=True)
class Result:
    """The answers for one spec."""

    spec: str | None
    """None: the cache was not compressed."""
    answers: list[list[Answer]] = field(default_factory=list)
    """Of every question of every sample, in order."""
    seconds: float = 0.0
    """Time of compressions, questions and generation."""
    weight_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def check_specs(samples: Sequence[Sample], specs: Sequence[str], suite: str) -> None:
    """Raise `UserError` for a spec that is wrong, or contexts that have no cache to compress."""
    for spec in specs:
        parse(spec)
    if specs and (empty := [sample.task for sample in samples if not sample.context]):
        raise UserError(f"--suite {suite}: samples of {empty[0]} have no context, so --posthoc has nothing to compress")


@torch.inference_mode()
def run_samples(
    subject: Subject,
    samples: Sequence[Sample],
    specs: Sequence[str],
    device: torch.device,
    *,
    batch: int | None = None,
    label: str = "",
) -> list[Result]:
    """The answers to `samples`: one result for each of `specs`, or one of the uncompressed cache without specs."""
    methods = [parse(spec) for spec in specs]
    results = [Result(spec=spec) for spec in specs or (None,)]
    engine = subject.engine()
    for sample in tqdm(samples, desc=label, unit="sample", disable=None):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
            context = torch.tensor([sample.context], dtype=torch.long, device=device)
            cache, last = engine.new_cache(), None
            if sample.context:
                last = engine.hidden(context, cache)[:, -1:]
            for result, method in zip(results, methods or (None,), strict=True):
                began = time.perf_counter()
                read = cache if method is None else engine.compress(cache, method, measure=False)
                result.answers.append([_answer(subject, engine, read, last, q, device) for q in sample.questions])
                result.seconds += time.perf_counter() - began
    return results


def _answer(
    subject: Subject, engine: Engine, cache: Any, last: Tensor | None, question: Question, device: torch.device
) -> Answer:
    losses, top1 = [], []
    for option in question.options:
        ids = torch.tensor([(*question.prompt, *option)], dtype=torch.long, device=device)
        hidden = engine.hidden(ids, copy.deepcopy(cache))
        hidden = hidden if last is None else torch.cat((last, hidden), dim=1)
        predicted = hidden[:, :-1][:, -len(option) :]
        logits = engine.head(predicted)[0].float()
        targets = ids[0, ids.shape[1] - len(logits) :]
        losses.append(tuple(F.cross_entropy(logits, targets, reduction="none").tolist()))
        top1.append(tuple((logits.argmax(-1) == targets).tolist()))
    generated: list[int] = []
    text = ""
    if question.generate:
        cache, state = copy.deepcopy(cache), last
        if question.prompt:
            state = engine.hidden(torch.tensor([question.prompt], device=device), cache)[:, -1:]
        while state is not None and len(generated) < question.generate:
            token = int(engine.head(state)[0, -1].argmax())
            if token == subject.tokenizer.eos_token_id:
                break
            generated.append(token)
            text = decode(subject, generated)
            if any(stop in text for stop in question.stop):
                break
            state = engine.hidden(torch.tensor([[token]], device=device), cache)
        text = text[: min((text.find(stop) for stop in question.stop if stop in text), default=len(text))]
    return Answer(losses=tuple(losses), top1=tuple(top1), generated=tuple(generated), text=text)
