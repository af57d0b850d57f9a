"""Perplexity of text after a compressed prefix: what a compressed cache costs in quality, in bytes and in time.

Ordinary perplexity does not see a compressed cache, because a prefill attends to exact keys and values. Here every
window of W tokens is cut in two: the first s fill a cache, the cache is compressed, and the rest is read
teacher-forced from it. Scored are the W - s tokens after each token that was read so; the same text from the cache as
it was is the reference. Windows do not overlap: what a method learns from, the prefixes of the first batch, is not
scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cllm.environment import environment
from cllm.errors import UserError
from cllm.evaluate.generation import Agreement, greedy
from cllm.evaluate.perplexity import Settings, perplexity
from cllm.evaluate.subjects import Subject
from cllm.evaluate.texts import TextSet
from cllm.evaluate.windows import Stream
from cllm.files import write_atomic
from cllm.posthoc.code import Compressor
from cllm.posthoc.compress import mean_errors
from cllm.posthoc.engine import Engine, engine_of
from cllm.posthoc.methods import parse


@dataclass
class _Tally:
    """Sums over the windows, for one method."""

    nll: float = 0.0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of compressing, a batch each."""
    nbytes: int = 0
    end_nbytes: int = 0
    errors: list[dict[int, dict[str, float]]] = field(default_factory=list)
    written: Agreement = field(default_factory=Agreement)


@dataclass
class _Reference:
    """Sums over the windows, for the cache as it was."""

    tally: _Tally = field(default_factory=_Tally)
    sequences: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of prefilling, a batch each."""
    mha_nbytes: int = 0


def resolve(subject: Subject, settings: Settings, prefix: int | None, device: torch.device) -> tuple[int, int, int]:
    """(window, prefix, batch). Raises `UserError` for a value outside its range."""
    if settings.stride is not None:
        raise UserError(f"--stride is {settings.stride}; with --posthoc windows do not overlap: leave it out")
    window, _, batch = settings.resolve(subject, device)
    prefix = window // 2 if prefix is None else prefix
    if window < 2:
        raise UserError(f"--window is {window}; allowed with --posthoc: 2 or more, a prefix and a token to score")
    if not 1 <= prefix < window:
        raise UserError(f"--prefix is {prefix}; allowed: 1 to {window - 1}, less than the window")
    return window, prefix, batch


def engine_for(subject: Subject) -> Engine:
    """What runs the subject's model with a cache."""
    return engine_of(subject.model)


def pieces(subject: Subject, stream: Stream, window: int) -> Iterator[np.ndarray]:
    """The tokens (window + 1,) of every window; those that cross documents are left out where documents are masked."""
    for start in range(0, len(stream) - window, window + 1):
        if subject.document_mask and len(set(stream.documents(start, start + window + 1)[0])) > 1:
            continue
        yield stream.read(start, start + window + 1)


def _batches(pieces: Iterator[np.ndarray], size: int) -> Iterator[Tensor]:
    held: list[np.ndarray] = []
    for piece in pieces:
        held.append(piece)
        if len(held) == size:
            yield torch.from_numpy(np.stack(held))
            held = []
    if held:
        yield torch.from_numpy(np.stack(held))


def measure(
    subject: Subject,
    text: TextSet,
    settings: Settings,
    specs: Sequence[str],
    device: torch.device,
    *,
    prefix: int | None = None,
    generate: int = 0,
) -> list[dict[str, Any]]:
    """A record for each of `specs`, described in docs/posthoc.md.

    With `generate`, prefixes are also continued by so many tokens, greedily.

    Raises:
        UserError: where settings do not fit the subject or the text, a spec is wrong, or a loss is not finite.
    """
    window, prefix, batch = resolve(subject, settings, prefix, device)
    room = (subject.context or prefix + generate + 1) - prefix
    if not 0 <= generate <= room:
        raise UserError(f"--generate is {generate}; allowed after a prefix of {prefix} tokens: 0 to {room}")
    methods = [parse(spec) for spec in specs]
    engine = engine_for(subject)
    stream = Stream(text.source, start_id=subject.start_id, limit=settings.max_tokens)
    tallies, reference = [_Tally() for _ in specs], _Reference()
    total = len(stream) // (window + 1)
    with tqdm(total=total, desc=f"{subject.name} on {text.name}", unit="window", disable=None) as progress:
        for n, tokens in enumerate(_batches(pieces(subject, stream, window), batch)):
            tokens = tokens.to(device)
            try:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
                    if n == 0:
                        for method in methods:
                            method.prepare(engine, tokens[:, :prefix])
                    _score(engine, methods, tokens, prefix, tallies, reference, generate)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory with {batch} windows of {window} tokens; lower --batch") from None
            progress.update(len(tokens))
    if not reference.sequences:
        inside = " inside of one document" if subject.document_mask else ""
        raise UserError(f"{text.path}: too short: it has no {window + 1} tokens{inside}; lower --window")
    for spec, tally in zip(("no compression", *specs), (reference.tally, *tallies), strict=True):
        if not math.isfinite(tally.nll):
            raise UserError(f"{subject.path}: {spec}: its loss on {text.path} is {tally.nll}")
    shared = {
        "run": subject.name, "path": str(subject.folder.resolve()), "kind": subject.kind,
        "checkpoint": subject.checkpoint, "step": subject.step, **fingerprints(subject, text),
        "design": subject.design, "set": text.name, "data": str(text.path), "split": text.split,
        "window": window, "prefix": prefix, "batch": batch, "max_tokens": settings.max_tokens,
        "windows": reference.sequences, "generate": generate, "precision": subject.precision,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": {name: text for name, text in environment().items() if name != "command"},
    }  # fmt: skip
    return [
        shared | _figures(spec, method, tally, reference, prefix)
        for spec, method, tally in zip(specs, methods, tallies, strict=True)
    ]


@torch.inference_mode()
def _score(
    engine: Engine,
    methods: Sequence[Compressor],
    tokens: Tensor,
    prefix: int,
    tallies: list[_Tally],
    ref: _Reference,
    generate: int = 0,
) -> None:
    """Fill a cache with `tokens[:, :prefix]`, and read the rest from it compressed by each method, then as it was."""
    began = _now(tokens)
    cache = engine.new_cache()
    engine.hidden(tokens[:, :prefix], cache)
    ref.seconds.append(_now(tokens) - began)
    if watching := [method for method in methods if type(method).watch is not Compressor.watch]:
        cache = engine.new_cache()  # filled again, so that what they do is not in the time of a prefill
        with contextlib.ExitStack() as stack:
            for method in watching:
                stack.enter_context(method.watch(engine))
            engine.hidden(tokens[:, :prefix], cache)
    slots = list(engine.filled(cache).slots.values())
    element = slots[0].k.element_size() if slots else 0  # without slots, there is nothing to compress
    ref.mha_nbytes += engine.mha_nbytes(tokens=prefix, batch=len(tokens), element=element)
    ref.sequences += len(tokens)
    for method, tally in zip(methods, tallies, strict=True):
        compressed = engine.compress(cache, method)
        tally.errors.append(compressed.outcome.errors)
        _read(engine, compressed, tokens, prefix, tally, chunk=1 if method.chooses else method.recompress)
        tally.seconds.append(compressed.seconds)  # those on the way included
    if generate:
        first = tokens[:, prefix : prefix + 1]
        found = [greedy(engine, engine.compress(cache, m, measure=False), first, generate) for m in methods]
        again = engine.new_cache()
        engine.hidden(tokens[:, :prefix], again)
        exact = greedy(engine, again, first, generate)
        for tally, continuation in zip(tallies, found, strict=True):
            tally.written.add(continuation, exact)
    for method in watching:
        method.release()
    _read(engine, cache, tokens, prefix, ref.tally, chunk=None)


def _read(engine: Engine, cache: Any, tokens: Tensor, prefix: int, tally: _Tally, *, chunk: int | None) -> None:
    """Add the loss of what follows the prefix, read from `cache`, which it grows."""
    tally.nbytes += engine.nbytes(cache)
    inputs, targets = tokens[:, prefix:-1], tokens[:, prefix + 1 :]
    size = chunk or inputs.shape[1]
    for part, wanted in zip(inputs.split(size, dim=1), targets.split(size, dim=1), strict=True):
        for row, target in zip(engine.logits(part, cache), wanted, strict=True):
            tally.nll += F.cross_entropy(row.float(), target, reduction="sum").double().item()
    tally.tokens += targets.numel()
    tally.end_nbytes += engine.nbytes(cache)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _warm(seconds: list[float]) -> float:
    """The sum without the first batch, in which libraries are loaded and kernels compiled, where there are others."""
    return sum(seconds[1:] or seconds)


def _figures(spec: str, method: Compressor, tally: _Tally, reference: _Reference, prefix: int) -> dict[str, Any]:
    """What a method's record adds to what all of a measurement share."""
    own, loss, exact = reference.tally, tally.nll / tally.tokens, reference.tally.nll / reference.tally.tokens
    per_token = 1 / (reference.sequences * prefix)
    return {
        "spec": spec,
        "method": method.name,
        "sinks": method.sinks,
        "tokens_scored": tally.tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        "uncompressed_loss": exact,
        "uncompressed_perplexity": perplexity(exact),
        "increase_percent": 100 * math.expm1(min(loss - exact, 700)),
        "bytes_per_token": tally.nbytes * per_token,
        "own_bytes_per_token": own.nbytes * per_token,
        "mha_bytes_per_token": reference.mha_nbytes * per_token,
        "ratio_to_own": own.nbytes / tally.nbytes,
        "ratio_to_mha": reference.mha_nbytes / tally.nbytes,
        "end_ratio_to_own": own.end_nbytes / tally.end_nbytes,
        "weight_bytes": method.weight_bytes(),
        "facts": method.facts(),
        "prefill_seconds": (prefill := _warm(reference.seconds)),
        "compression_seconds": (compression := _warm(tally.seconds)),
        "compression_share_of_prefill": compression / prefill,
        "errors": mean_errors(tally.errors),
        **tally.written.figures(),
    }


def fingerprints(subject: Subject, text: TextSet) -> dict[str, str]:
    """What tells the weights and the data of a record from others of the same names: sizes and times of their files."""
    weights = subject.folder / "checkpoints" / subject.checkpoint if subject.kind == "run" else subject.path
    return {"weights": _stamp(weights), "data_files": _stamp(text.path)}


def _stamp(path: Path) -> str:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    told = [f"{file.name} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def result_path(
    folder: Path,
    set_name: str,
    spec: str,
    *,
    prefix: int,
    window: int,
    max_tokens: int | None,
    checkpoint: str | None,
    generate: int = 0,
) -> Path:
    """Where the record of a point goes. `checkpoint` is a name for one that is not its run's newest."""
    slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", spec)
    limit = f"-n{max_tokens}" if max_tokens else ""
    limit += f"-g{generate}" if generate else ""
    return folder / "posthoc" / set_name / f"{slug}-p{prefix}-w{window}{limit}{checkpoint or ''}.json"


def save(subject: Subject, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a record below `out` (default: `subject.results`). Raises `UserError` where it cannot be."""
    path = result_path(
        subject.results(out),
        record["set"],
        record["spec"],
        prefix=record["prefix"],
        window=record["window"],
        max_tokens=record["max_tokens"],
        checkpoint=None if subject.latest else f"-{Path(record['checkpoint']).stem}",
        generate=record["generate"],
    )
    try:
        write_atomic(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    return path
