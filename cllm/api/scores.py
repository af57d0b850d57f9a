"""Perplexity of models, and caches compressed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cllm.api.arguments import count_of, device_of, path_of, paths_of, texts_of, token_ids_of, wrong_type
from cllm.api.caches import check_cache
from cllm.data.manifest import MANIFEST, Manifest
from cllm.errors import UserError
from cllm.evaluate.calibration import check_is_used
from cllm.evaluate.perplexity import Settings, open_sets
from cllm.evaluate.subjects import MemorySubject, Subject, load_subject
from cllm.evaluate.suites.perplexity import Perplexity
from cllm.evaluate.suites.posthoc import Posthoc
from cllm.evaluate.suites.suite import Job, Record, Suite
from cllm.evaluate.texts import hold_texts
from cllm.hub.export import as_pretrained
from cllm.model.decoder import Decoder
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

AnyPath = str | os.PathLike[str]


class Scores(list[Record]):
    """Records of measurements, as docs/evaluation.md and docs/posthoc.md describe them; printed, their table.

    `loss`, `perplexity` and `bits_per_byte` are those of the first record.
    """

    def __init__(self, records: Sequence[Record], suite: Suite):
        super().__init__(records)
        self._suite = suite

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return self[0]["loss"]

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return self[0]["perplexity"]

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of text. Raises `KeyError` for scores of compressed caches, which have none."""
        return self[0]["bits_per_byte"]

    def __str__(self) -> str:
        return self._suite.table(self)

    __repr__ = __str__


def score(
    model: AnyPath | nn.Module,
    data: AnyPath | Sequence[AnyPath] = (),
    *,
    text: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    posthoc: str | Sequence[str] = (),
    calibration: AnyPath | None = None,
    prefix: int | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    save: bool = False,
) -> Scores:
    """Measure perplexity and bits per byte, as `cllm evaluate` does.

    With `posthoc`, the first half of each window is compressed by each method, and the rest is scored.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or a model in memory.
        data: prepared folders, of which the validation split is scored, or text files; default: a run's own sets.
        text: instead of data, one document or several.
        tokenizer: that of a model in memory; default: that of the prepared folder in `data`.
        posthoc: methods such as `xkv:group=4,ratio=4`, or `none`.
        calibration: with posthoc, a text file or prepared folder (its train split) on which methods calibrate; None:
            the first prefixes of what is scored.
        prefix: with posthoc, tokens of each window to compress; None: half of it.
        window: tokens that the model reads at once; None: its training length, or its context up to 2048.
        max_tokens: score only the first tokens of each set.
        device: of a model that is loaded: `auto`, `cpu` or `cuda`. A model in memory stays where it is.
        save: write the results to the run's `evaluation/`, where `compare` finds them.

    Returns:
        A record for each set, and with posthoc for each method.

    Raises:
        UserError: for a model, text or method that cannot be used, and a window longer than the context.

    Examples:
        >>> import cllm
        >>> cllm.score("runs/tiny", text="three fine days").perplexity > 1
        True
        >>> scores = cllm.score("runs/tiny", posthoc=["none", "xkv:group=4,ratio=2"])
        >>> [record["spec"] for record in scores]
        ['none', 'xkv:group=4,ratio=2']
    """
    paths, specs = paths_of("score: data", data), texts_of("score: posthoc", posthoc)
    for spec in specs:
        parse(spec, "score: posthoc")
    named = None if calibration is None else path_of("score: calibration", calibration)
    check_is_used(named, specs, "score: calibration")
    prefix, window = count_of("score: prefix", prefix), count_of("score: window", window)
    max_tokens = count_of("score: max_tokens", max_tokens)
    documents = None if text is None else texts_of("score: text", text)
    if prefix is not None and not specs:
        raise UserError(f"score: prefix is {prefix}; it needs posthoc=, which says how to compress the prefix")
    if text is not None and paths:
        raise UserError("score: give either data or text=")
    if save and isinstance(model, nn.Module):
        raise UserError("score: save=True needs a run or a folder, and the model is in memory")
    subject, place = _subject(model, paths, tokenizer, device)
    suite: Suite = Posthoc() if specs else Perplexity()
    settings = Settings(window=window, max_tokens=max_tokens, calibration=named)
    options = argparse.Namespace(posthoc=specs, prefix=prefix, generate=0)
    texts = open_sets(subject, paths) if documents is None else [hold_texts("text", documents, subject)]
    records = []
    with _evaluating(subject.model):
        for found in texts:
            job = Job(settings=settings, device=place, options=options, text=found)
            records += suite.run(subject, job)
    if save:
        for record in records:
            suite.save(subject, record)
    return Scores(records, suite)


def _subject(
    model: AnyPath | nn.Module, paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase | None, device: str
) -> tuple[Subject, torch.device]:
    if not isinstance(model, nn.Module):
        if tokenizer is not None:
            raise UserError(f"score: tokenizer= goes with a model in memory; {model} has one")
        place = device_of("score: device", device)
        return load_subject(path_of("score: model", model, "a path, or a model in memory"), place), place
    if isinstance(model, Decoder):
        model = as_pretrained(model)
    if tokenizer is None:
        prepared = [path for path in paths if (path / MANIFEST).exists()]
        if not prepared:
            raise UserError("score: a model in memory needs tokenizer=, or a prepared folder as data")
        tokenizer = Manifest.load(prepared[0]).tokenizer()
    if not callable(tokenizer):
        raise wrong_type("score: tokenizer", tokenizer, "a tokenizer of transformers, as cllm.load_tokenizer loads it")
    return MemorySubject(model, tokenizer), next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def compress(model: nn.Module, cache: Cache | Tensor, method: str, *, calibration: Tensor | None = None) -> Any:
    """Compress a filled cache, or the cache of a prompt. Later tokens are added exactly, unless `method` has `every` or
    `recompress`.

    Args:
        model: a model of cllm or of transformers, in memory.
        cache: a cache that `model` has filled, which is not changed; or the prompt, (B, T) int64, of which it is
            filled. Methods that record what the prefill computes need the prompt, and so do those that calibrate on
            tokens unless `calibration` is given.
        method: a method with its options, such as `xkv:group=4,ratio=4`; `cllm evaluate --list-posthoc` lists them.
        calibration: tokens (B, T) int64 on which a method that calibrates does so; None: the prompt.

    Returns:
        A cache for `past_key_values=` of the model and of `generate`. `nbytes()` counts its bytes, `outcome.errors` has
        the relative error of each layer's keys and values, and `seconds` the time that compression took.

    Raises:
        UserError: for an unknown method or option, and a model or cache that it cannot compress.

    Examples:
        >>> import cllm, torch
        >>> model = cllm.build("mha", d_model=64, n_layers=4, vocab_size=256)
        >>> tokens = torch.randint(256, (1, 32))
        >>> compressed = cllm.compress(model, tokens, "xkv:group=4,ratio=4")
        >>> exact = cllm.compress(model, tokens, "none")
        >>> compressed.nbytes() < exact.nbytes() / 2
        True
        >>> model(tokens[:, :1], past_key_values=compressed).logits.shape
        torch.Size([1, 1, 256])
    """
    from transformers import Cache, PreTrainedModel

    if not isinstance(model, Decoder | PreTrainedModel):
        raise wrong_type("compress: model", model, "a model in memory, as cllm.load returns it")
    if not isinstance(method, str):
        raise wrong_type("compress: method", method, "a method with its options, such as kivi:bits=4")
    engine, compressor = engine_of(model), parse(method, "compress: method")
    head: Any = engine.head
    device, size = next(model.parameters()).device, head.weight.shape[0]
    if calibration is not None:
        if not compressor.calibrates:
            raise UserError(f"compress: calibration: {method} does not calibrate on tokens; leave it out")
        with _evaluating(model):
            compressor.prepare(engine, token_ids_of("compress: calibration", calibration, size).to(device))
    if isinstance(cache, Cache):
        check_cache(engine, model, cache)
        if compressor.watches:
            raise UserError(
                f"{method}: records what the prefill computes; give the prompt's token ids, (B, T), instead of a cache"
            )
        if compressor.calibrates and calibration is None:
            raise UserError(
                f"{method}: calibrates on tokens; give calibration=, (B, T), or the prompt's token ids instead of a "
                "cache"
            )
        return engine.compress(cache, compressor)
    ids = token_ids_of("compress: cache", cache, size).to(device)
    with _evaluating(model):
        if calibration is None:
            compressor.prepare(engine, ids)
        filled = engine.new_cache()
        with compressor.watch(engine):
            engine.hidden(ids, filled)
        compressed = engine.compress(filled, compressor)
    compressor.release()
    return compressed
