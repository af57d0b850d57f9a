"""Perplexity of text after a compressed prefix: what a compressed cache costs in quality, in bytes and in time.

Ordinary perplexity does not depend on cache compression, because a prefill attends to exact keys and values. Here every
window of W + 1 tokens is split: the first s tokens fill a cache, the cache is compressed, and the next W - s are fed
teacher-forced. The score is the loss of the W - s last tokens; the reference is their loss with the uncompressed cache.
Windows do not overlap. Methods calibrate on the prefixes of the first batch, which are not scored, or on a text of
their own (`calibration.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.environment import environment
from cllm.errors import UserError
from cllm.evaluate.calibration import calibration_of, calibration_tokens
from cllm.evaluate.generation import Agreement, greedy
from cllm.evaluate.perplexity import Settings, perplexity
from cllm.evaluate.subjects import Subject
from cllm.evaluate.texts import TextSet
from cllm.evaluate.units import calibration_slug
from cllm.evaluate.windows import Stream, pieces
from cllm.files import write_atomic
from cllm.posthoc import UNCOMPRESSED
from cllm.posthoc.compress import mean_errors
from cllm.posthoc.method import Compressor, Engine
from cllm.posthoc.registry import parse
from cllm.posthoc.tensor_tree import fp32_numbers, total_bytes
from cllm.progress import ProgressMeter
from cllm.signals import raise_if_stopped


@dataclass
class _Tally:
    """Sums over the windows, for one method."""

    nll: float = 0.0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Time of compression, per batch."""
    nbytes: int = 0
    """Of the caches after the prefix."""
    bf16_nbytes: int = 0
    """Of the same caches if the model's keys and values were bf16."""
    host_nbytes: int = 0
    """Of the same caches in host memory, which the other bytes leave out."""
    bf16_host_nbytes: int = 0
    end_nbytes: int = 0
    """Of the caches at the end of the windows."""
    errors: list[dict[int, dict[str, float]]] = field(default_factory=list)
    """Means over the sequences of each batch."""
    sequences: list[int] = field(default_factory=list)
    """Of each batch."""
    read_flops: int = 0
    """Operations of matrix products that rebuild the caches' keys and values once."""
    written: Agreement = field(default_factory=Agreement)


@dataclass
class _Scored:
    """A spec, and its sums over the windows."""

    spec: str
    method: Compressor
    tally: _Tally = field(default_factory=_Tally)
    refused: bool = False

    @contextlib.contextmanager
    def refusing(self, reasons: dict[str, str] | None) -> Iterator[None]:
        """Put a `UserError` of the method into `reasons` by its spec, and go on; without `reasons` it is raised."""
        try:
            yield
        except UserError as error:
            raise_if_stopped(error)
            if reasons is None:
                raise
            self.refused = True
            reasons[self.spec] = str(error)


@dataclass
class _Reference:
    """Sums over the windows, for the uncompressed cache."""

    tally: _Tally = field(default_factory=_Tally)
    sequences: int = 0
    seconds: list[float] = field(default_factory=list)
    """Time of the prefill, per batch."""
    mha_nbytes: int = 0
    mha_bf16_nbytes: int = 0


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
    if settings.max_tokens is not None and settings.max_tokens <= window:
        raise UserError(
            f"--max-tokens is {settings.max_tokens}; allowed with --posthoc and a window of {window}: {window + 1} or "
            "more, one window and a token after it"
        )
    return window, prefix, batch


def _batches(pieces: Iterator[np.ndarray], size: int) -> Iterator[Tensor]:
    while batch := list(itertools.islice(pieces, size)):
        yield torch.from_numpy(np.stack(batch))


def measure(
    subject: Subject,
    text: TextSet,
    settings: Settings,
    specs: Sequence[str],
    device: torch.device,
    *,
    prefix: int | None = None,
    generate: int = 0,
    refused: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One record for each of `specs`, as described in docs/posthoc.md.

    With `generate`, prefixes are also continued greedily by this many tokens. With `refused`, a spec that cannot
    compress the subject's cache gets no record, and the reason is put there.

    Raises:
        UserError: if settings do not fit the subject or the text, a spec is wrong, or a loss is not finite.
    """
    window, prefix, batch = resolve(subject, settings, prefix, device)
    room = (subject.context or prefix + generate + 1) - prefix
    if not 0 <= generate <= room:
        raise UserError(f"--generate is {generate}; allowed after a prefix of {prefix} tokens: 0 to {room}")
    scored, reference = [_Scored(spec, parse(spec)) for spec in specs], _Reference()
    engine = subject.engine()
    stream = Stream(text.source, start_id=subject.start_id, limit=settings.max_tokens)
    total = len(stream) // (window + 1)
    with ProgressMeter(total, f"{subject.name} on {text.name}", "window") as progress:
        for n, tokens in enumerate(_batches(pieces(subject, stream, window), batch)):
            tokens = tokens.to(device)
            try:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16"):
                    if n == 0:
                        ids = calibration_tokens(subject, settings.calibration, tokens[:, :prefix])
                        for each in scored:
                            with each.refusing(refused):
                                each.method.prepare(engine, ids)
                    _score(engine, scored, tokens, prefix, reference, generate, refused)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory with {batch} windows of {window} tokens; lower --batch") from None
            progress.update(len(tokens))
    if not reference.sequences:
        inside = " inside of one document" if subject.document_mask else ""
        raise UserError(f"{text.path}: too short: it has no {window + 1} tokens{inside}; lower --window")
    scored = [each for each in scored if not each.refused]
    for each in scored:
        each.tally = each.tally if each.tally.tokens else reference.tally  # `none` of a plan that no method compresses
    for spec, tally in (("no compression", reference.tally), *((each.spec, each.tally) for each in scored)):
        if not math.isfinite(tally.nll):
            raise UserError(f"{subject.path}: {spec}: its loss on {text.path} is {tally.nll}")
    shared = {
        "run": subject.name, "path": str(subject.folder.resolve()), "kind": subject.kind,
        "checkpoint": subject.checkpoint, "step": subject.step, "trained_tokens": subject.trained_tokens,
        "parameters": sum(p.numel() for p in subject.model.parameters()), **fingerprints(subject, text),
        "design": subject.design, "set": text.name, "data": str(text.path), "split": text.split,
        "text": text.label,
        "window": window, "prefix": prefix, "batch": batch, "max_tokens": settings.max_tokens,
        "windows": reference.sequences, "generate": generate, "precision": subject.precision,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": {name: text for name, text in environment().items() if name != "command"},
    }  # fmt: skip
    return [
        shared
        | calibration_fingerprint(calibration_of(settings.calibration, each.method))
        | _figures(each.spec, each.method, each.tally, reference, prefix)
        for each in scored
    ]


@torch.inference_mode()
def _score(
    engine: Engine,
    scored: Sequence[_Scored],
    tokens: Tensor,
    prefix: int,
    ref: _Reference,
    generate: int = 0,
    refused: dict[str, str] | None = None,
) -> None:
    """Score the tokens after the prefix, with the prefix's cache compressed by each method, and uncompressed."""
    began = _now(tokens)
    cache = engine.new_cache()
    engine.hidden(tokens[:, :prefix], cache)
    ref.seconds.append(_now(tokens) - began)
    scored = [each for each in scored if not each.refused]
    if watching := [each for each in scored if each.method.watches]:
        cache = engine.new_cache()  # filled again, because watching would slow the prefill that is timed
        with contextlib.ExitStack() as stack:
            for each in watching:
                with each.refusing(refused):
                    stack.enter_context(each.method.watch(engine))
            engine.hidden(tokens[:, :prefix], cache)
    element, can_compress = _element_size(engine, cache, scored, refused)
    scored = [each for each in scored if can_compress and not each.refused]
    ref.mha_nbytes += engine.mha_nbytes(tokens=prefix, batch=len(tokens), element=element)
    ref.mha_bf16_nbytes += engine.mha_nbytes(tokens=prefix, batch=len(tokens), element=2)
    ref.sequences += len(tokens)
    narrow = element == 4
    for each in scored:
        method, tally = each.method, each.tally
        with each.refusing(refused):
            compressed = engine.compress(cache, method)
        if each.refused:
            continue
        tally.errors.append(compressed.outcome.errors)
        tally.sequences.append(len(tokens))
        tally.read_flops += compressed.outcome.read_flops
        tally.bf16_nbytes += _bf16_nbytes(engine, compressed, narrow)
        host = engine.host_tensors(compressed)
        tally.host_nbytes += total_bytes(host)
        tally.bf16_host_nbytes += total_bytes(host) - (2 * fp32_numbers(host) if narrow else 0)
        _read(engine, compressed, tokens, prefix, tally, chunk=method.pass_size)
        tally.seconds.append(compressed.seconds)  # repeated compressions included
    if generate:
        first = tokens[:, prefix : prefix + 1]
        scored = [each for each in scored if not each.refused]
        texts = [greedy(engine, engine.compress(cache, e.method, measure=False), first, generate) for e in scored]
        uncompressed = engine.new_cache()
        engine.hidden(tokens[:, :prefix], uncompressed)
        exact = greedy(engine, uncompressed, first, generate)
        for each, continuation in zip(scored, texts, strict=True):
            each.tally.written.add(continuation, exact)
    for each in watching:
        each.method.release()
    ref.tally.bf16_nbytes += _bf16_nbytes(engine, cache, narrow)
    _read(engine, cache, tokens, prefix, ref.tally, chunk=None)


def _element_size(
    engine: Engine, cache: Any, scored: Sequence[_Scored], refused: dict[str, str] | None
) -> tuple[Literal[0, 2, 4], bool]:
    """Bytes of a number in the cache's slots, 0 if it has none; and whether methods can compress the plan.

    If none can, specs but `none` are refused, and `none` is the uncompressed cache itself.
    """
    try:
        slots = list(engine.compressible(cache).slots.values())
    except UserError:
        for each in scored:
            if each.spec != UNCOMPRESSED:
                with each.refusing(refused):
                    raise
        return (4 if engine.fp32_numbers(cache) else 2), False
    return ((4 if slots[0].k.element_size() == 4 else 2) if slots else 0), True


def _bf16_nbytes(engine: Engine, cache: Any, narrow: bool) -> int:
    """Bytes of `cache` with two for every number in fp32 if keys and values are fp32 (`narrow`), else as stored."""
    return engine.nbytes(cache) - (2 * engine.fp32_numbers(cache) if narrow else 0)


def _read(engine: Engine, cache: Any, tokens: Tensor, prefix: int, tally: _Tally, *, chunk: int | None) -> None:
    """Add the loss of the tokens after the prefix, given `cache`, to which they are added."""
    tally.nbytes += engine.nbytes(cache)
    inputs, targets = tokens[:, prefix:-1], tokens[:, prefix + 1 :]
    size = chunk or inputs.shape[1]
    for ids, target_ids in zip(inputs.split(size, dim=1), targets.split(size, dim=1), strict=True):
        for row, target in zip(engine.logits(ids, cache), target_ids, strict=True):
            tally.nll += F.cross_entropy(row.float(), target, reduction="sum").double().item()
    tally.tokens += targets.numel()
    tally.end_nbytes += engine.nbytes(cache)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _warm(seconds: list[float]) -> float:
    """The sum without the first batch, in which libraries are loaded and kernels compiled; of one batch, its time."""
    return sum(seconds[1:] or seconds)


def _figures(spec: str, method: Compressor, tally: _Tally, reference: _Reference, prefix: int) -> dict[str, Any]:
    """The part of a record that differs between the methods of a measurement."""
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
        "bf16_bytes_per_token": tally.bf16_nbytes * per_token,
        "host_bytes_per_token": tally.host_nbytes * per_token,
        "bf16_host_bytes_per_token": tally.bf16_host_nbytes * per_token,
        "own_bf16_bytes_per_token": own.bf16_nbytes * per_token,
        "mha_bf16_bytes_per_token": reference.mha_bf16_nbytes * per_token,
        "ratio_to_own": own.nbytes / tally.nbytes,
        "ratio_to_mha": reference.mha_nbytes / tally.nbytes,
        "end_ratio_to_own": own.end_nbytes / tally.end_nbytes,
        "read_flops_per_token": tally.read_flops * per_token,
        "weight_bytes": method.weight_bytes(),
        "facts": method.facts(),
        "prefill_seconds": (prefill := _warm(reference.seconds)),
        "compression_seconds": (compression := _warm(tally.seconds)),
        "compression_share_of_prefill": compression / prefill,
        "errors": mean_errors(tally.errors, tally.sequences),
        **tally.written.figures(),
    }


def fingerprints(subject: Subject, text: TextSet) -> dict[str, str]:
    """Hashes of the sizes and times of the weights' and the data's files, which change if the files are replaced."""
    weights = subject.folder / "checkpoints" / subject.checkpoint if subject.kind == "run" else subject.path
    return {"weights": _stamp(weights), "data_files": _stamp(text.path)}


def calibration_fingerprint(calibration: str | None) -> dict[str, str | None]:
    """The text that a method calibrates on, None for tokens of the set, and its hash as in `fingerprints`."""
    files = None if calibration is None else _stamp(Path(calibration))
    return {"calibration": calibration, "calibration_files": files}


def _stamp(path: Path) -> str:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    lines = [f"{file.name} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The settings by which the file of a record is named."""

    set_name: str
    spec: str
    prefix: int
    window: int
    max_tokens: int | None = None
    generate: int = 0
    checkpoint: str | None = None
    """The checkpoint's file or folder; None for the newest of a run."""
    calibration: str | None = None
    """The text that the method calibrates on; None: tokens of the set, or the method does not calibrate."""

    def path(self, results: Path) -> Path:
        """The file of the record in a subject's folder of results."""
        slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", self.spec)
        limit = f"-n{self.max_tokens}" if self.max_tokens else ""
        limit += f"-g{self.generate}" if self.generate else ""
        limit += "" if self.checkpoint is None else f"-{Path(self.checkpoint).stem}"
        limit += calibration_slug(self.calibration)
        return results / "posthoc" / self.set_name / f"{slug}-p{self.prefix}-w{self.window}{limit}.json"


def save(subject: Subject, record: dict[str, Any], out: Path | None = None) -> Path:
    """Write a record below `out` (default: `subject.results`). Raises `UserError` if it cannot be written."""
    settings = {key: record[key] for key in ("spec", "prefix", "window", "max_tokens", "generate", "calibration")}
    checkpoint = None if subject.latest else record["checkpoint"]
    path = Measurement(set_name=record["set"], checkpoint=checkpoint, **settings).path(subject.results(out))
    try:
        write_atomic(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    return path
