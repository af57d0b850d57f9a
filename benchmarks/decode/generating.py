"""`generate` of transformers over a static cache, as a user calls it: this project's models and Hugging Face's Llama.

On top of the model's step come token choice, stopping criteria and masks of the library. The time of a token is the
host's clock between two tokens, with a sync after each. The first steps compile, record graphs and replay them for the
first time; they are reported separately.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.decode.designs import Design, Point
from benchmarks.decode.measure import build
from benchmarks.timing import wait
from cllm.hub.export import as_pretrained

SETTLED = 8
"""Tokens after which nothing is compiled or recorded any more."""


class _Clock(StoppingCriteria):
    """A criterion that never stops and stores the time after each token."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def own_model(design: Design, point: Point, device: torch.device, *, compiled: bool) -> nn.Module:
    """The design's model as a transformers model in bf16, with random weights."""
    most = max(point.context, design.model.max_seq_len)
    model = design.model.model_copy(update={"max_seq_len": most})
    decoder = build(design.config.model_copy(update={"model": model}), device)
    if compiled:
        decoder.compile_decoding()
    return as_pretrained(decoder).eval()


def measure_generate(model: Any, point: Point, new: int, device: torch.device) -> dict[str, Any]:
    """Decode `new` tokens greedily after a random prompt, up to `point.context` tokens, for `point.batch` sequences.

    `new` must be larger than `SETTLED`.
    """
    clock = _Clock(device)
    ids = torch.randint(model.config.vocab_size, (point.batch, point.context - new), device=device)
    wait(device)
    begin = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert out.shape == (point.batch, point.context)
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(clock.times)]
    settled = gaps[SETTLED - 1 :]
    ms = statistics.median(settled)
    return {
        "generate_ms": ms,
        "generate_ms_range": [min(settled), max(settled)],
        "generate_tokens_per_s": 1000 * point.batch / ms,
        "generate_settled_after_ms": 1000 * (clock.times[SETTLED - 1] - begin),
    }
