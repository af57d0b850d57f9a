"""Samples that are computed together: contexts of one length, as many as the memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from cllm.evaluate.tasks.reading import reads_of
from cllm.evaluate.tasks.sample import Sample
from cllm.posthoc.engine import DecoderEngine
from cllm.posthoc.method import Engine

_BATCH_TOKENS = {"cpu": 2**13, "cuda": 2**17}
"""Tokens of a batch by default, at most."""
_CACHE_SHARE = 0.04
"""Share of a GPU's memory for the uncompressed cache of a batch: compression needs a multiple of it."""
_MOST_ROWS = 1024


def batches(samples: Sequence[Sample], rows: Callable[[int], int], *, exact: bool = False) -> Iterator[list[int]]:
    """Indices of samples whose contexts have the same length, long contexts first; those without questions left out.

    Samples with questions of similar lengths are together. With `exact`, samples that generate are together only if the
    prompts to generate from have the same lengths.

    Args:
        samples: any.
        rows: the most samples of a batch, given the length of its longest sequence in tokens.
        exact: see above.
    """
    keys = {}
    for i, sample in enumerate(samples):
        prompts = tuple(len(question.prompt) for question in sample.questions if question.generate)
        lengths = tuple(len(read.prompt) + len(read.tokens) for read in reads_of(sample.questions))
        if sample.questions:
            keys[i] = (-len(sample.context), prompts, lengths)
    together: list[int] = []
    longest = 0
    for i in sorted(keys, key=lambda i: (keys[i], i)):
        alike = 2 if exact else 1
        longest = max(longest, samples[i].longest)
        if together and (len(together) >= rows(longest) or keys[i][:alike] != keys[together[0]][:alike]):
            yield together
            together, longest = [], samples[i].longest
        together.append(i)
    if together:
        yield together


def default_rows(engine: Engine, device: torch.device) -> Callable[[int], int]:
    """The most samples of a batch, by the length of its longest sequence."""
    tokens = _BATCH_TOKENS.get(device.type, 2**13)
    if device.type == "cuda":
        cache = engine.new_cache()
        with torch.inference_mode():
            engine.hidden(torch.zeros(1, 1, dtype=torch.long, device=device), cache)
        memory = torch.cuda.get_device_properties(device).total_memory
        tokens = min(tokens, int(memory * _CACHE_SHARE / max(engine.nbytes(cache), 1)))
    return lambda longest: min(max(tokens // max(longest, 1), 1), _MOST_ROWS)


def is_cyclic(engine: Engine) -> bool:
    """Whether layers read from above. They take a limited number of passes over the tokens that are read together, so
    that a long prompt gives another result if it is read in two parts."""
    return isinstance(engine, DecoderEngine) and engine.model.passes is not None
