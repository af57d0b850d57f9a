"""Perplexity and bits per byte of a subject on a set.

    loss = total nll / tokens scored      perplexity = e^loss      bits per byte = total nll / (ln 2 · bytes of text)

The loss is also given for the associative-recall slice and for all other tokens, see `cllm/data/recall.py`.

EOS tokens are scored and stand for no bytes: the end of a document has to be predicted too. Perplexity compares only
models of one tokenizer; bits per byte compares any models on the same text.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.data.manifest import MANIFEST
from cllm.data.recall import GROUPS, recall_distance, recall_figures, recall_sums
from cllm.data.vocabulary import check_ids
from cllm.environment import hardware, versions
from cllm.errors import UserError
from cllm.evaluate.subjects import Subject
from cllm.evaluate.texts import TextSet, TokenBytes, open_prepared, open_text
from cllm.evaluate.units import perplexity, set_label
from cllm.evaluate.windows import Stream, Window, batches, windows
from cllm.kernels.cross_entropy import IGNORE
from cllm.progress import ProgressMeter

_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # fed at once by default: enough to be fast, few enough for any vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Windows over a set. None: take the value from the subject (its training length) or the device."""

    split: str = "validation"
    """Split of prepared folders."""
    window: int | None = None
    """Tokens fed at once; None: the length the model was trained at."""
    stride: int | None = None
    """Tokens scored by each window; None: half the window."""
    batch: int | None = None
    """Windows in a batch; None: 2048 tokens of them on a CPU, 8192 on a GPU."""
    max_tokens: int | None = None
    """Use only the first tokens of the set; None: all."""
    calibration: Path | None = None
    """Text on which post-hoc methods calibrate; None: tokens of the set that are not scored."""

    def resolve(
        self, subject: Subject, device: torch.device, *, window_option: str = "--window"
    ) -> tuple[int, int, int]:
        """(window, stride, batch) with every default filled in.

        Raises:
            UserError: naming the option, for a value outside its range.
        """
        for name in ("window", "stride", "batch", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = window_option if name == "window" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {value}; allowed: 1 or more")
        window = self.window or subject.window
        if subject.context is not None and window > subject.context:
            raise UserError(
                f"{window_option} is {window}; allowed: up to the context of {subject.name}, {subject.context}"
            )
        stride = self.stride or max(window // 2, 1)
        if stride > window:
            raise UserError(f"--stride is {stride}; allowed: up to the window, {window}: a longer one skips tokens")
        return window, stride, self.batch or max(_BATCH_TOKENS.get(device.type, 2048) // window, 1)


class Scored(NamedTuple):
    """A batch of predictions, (B, n) each on the CPU, in the order of the stream."""

    targets: Tensor
    """int64: the tokens predicted."""
    nll: Tensor
    """fp32, nats."""
    counted: Tensor
    """bool: False for the first token of a document that sees no other."""
    distance: Tensor
    """int64: tokens since the previous occurrence of the bigram that the token completes in its window and, with
    document masks, in its document; 0 if it is new."""


@torch.inference_mode()
def score(
    subject: Subject, stream: Stream, *, window: int, stride: int, batch: int, device: torch.device
) -> Iterator[Scored]:
    """The nll of every token of `stream` except the first, batch by batch. Raises `UserError` if memory runs out."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=subject.precision == "bf16")
    for spans in batches(windows(len(stream), window, stride), batch):
        last = spans[0].scored
        inputs, targets, positions, document_ids, counted, distance = _feed(stream, spans, subject.document_mask)
        try:
            with autocast:
                logits = subject.logits(
                    inputs.to(device),
                    None if positions is None else positions.to(device),
                    None if document_ids is None else document_ids.to(device),
                    last,
                )
            # Row by row: an fp32 copy of all logits would be the largest tensor in memory.
            rows = zip(logits, targets.to(device), strict=True)
            nll = torch.stack([F.cross_entropy(row.float(), target, reduction="none") for row, target in rows])
        except torch.OutOfMemoryError:
            raise UserError(f"out of GPU memory with {batch} windows of {window} tokens; lower --batch") from None
        yield Scored(targets, nll.cpu(), counted, distance)


def _feed(
    stream: Stream, spans: Sequence[Window], document_mask: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Inputs (B, T), targets (B, n), positions and document ids (B, T) or None, mask of counted targets (B, n), and
    their distances (B, n) as `Scored` has them."""
    last = spans[0].scored
    tokens = torch.from_numpy(np.stack([stream.read(span.start, span.stop + 1) for span in spans]))
    inputs, targets = tokens[:, :-1], tokens[:, -last:]
    if not document_mask:
        distance = recall_distance(inputs, tokens[:, 1:])[:, -last:]
        return inputs, targets, None, None, torch.ones_like(targets, dtype=torch.bool), distance
    pairs = [stream.documents(span.start, span.stop + 1) for span in spans]
    ids, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
    same = ids[:, 1:] == ids[:, :-1]
    distance = recall_distance(inputs, tokens[:, 1:].where(same, IGNORE), ids[:, :-1])[:, -last:]
    return inputs, targets, positions[:, :-1], ids[:, :-1], same[:, -last:], distance


def open_sets(
    subject: Subject,
    data: Sequence[str | Path] = (),
    *,
    split: str = "validation",
    name: str | None = None,
    only: int | None = None,
) -> Iterator[TextSet]:
    """Open the sets to score, one after the other: those of `data`, or by default the subject's own.

    A set's name is that in the subject's config, the folder's name, or the file's name without its suffix; `name`
    overrides it if there is one set. A split other than validation is added to a folder's name. With `only`, the set of
    that number is opened, and the others are not.

    Raises:
        UserError: for data that is missing, empty or of another tokenizer, and for names that are not allowed or used
            twice.
    """
    paths = [Path(path) for path in data]
    named = [(path.stem if path.is_file() else path.resolve().name, path) for path in paths]
    named = named or list(subject.default_sets.items())
    if not named:
        raise UserError(f"{subject.path}: has no data of its own; say what to evaluate on with --data")
    if name is not None and len(named) > 1:
        raise UserError(f"--name {name}: names one set, and there are {len(named)}: {', '.join(n for n, _ in named)}")
    if split != "validation":
        named = [(f"{label}-{split}" if (path / MANIFEST).exists() else label, path) for label, path in named]
    named = [(name or set_label(label), path) for label, path in named]
    for label, _ in named:
        if not _SET_NAME.fullmatch(label):
            raise UserError(f"--name {label}: allowed: letters, digits, `.`, `_` and `-`, a letter or digit first")
        if [other for other, _ in named].count(label) > 1:
            raise UserError(f"--data: two sets would be called {label}; evaluate them one by one with --name")
    for label, path in named if only is None else named[only : only + 1]:
        if not data or (path / MANIFEST).exists():
            yield open_prepared(label, path, split, subject, None if data else subject.digests.get(path))
        else:
            yield open_text(label, path, subject)


def measure(subject: Subject, text: TextSet, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Score a set. Returns the content of `SET.json`, which docs/evaluation.md describes.

    Raises:
        UserError: if settings do not fit the subject, nothing can be scored, or the loss is not finite.
    """
    window, stride, batch = settings.resolve(subject, device)
    stream = Stream(text.source, start_id=subject.start_id, limit=settings.max_tokens)
    token_bytes = TokenBytes(subject.tokenizer)
    nll, tokens, n_bytes, started = 0.0, 0, 0, time.perf_counter()
    slices = torch.zeros(1 + len(GROUPS), 2, dtype=torch.float64)
    with ProgressMeter(len(stream) - 1, f"{subject.name} on {text.name}", "token") as progress:
        for scored in score(subject, stream, window=window, stride=stride, batch=batch, device=device):
            nll += scored.nll[scored.counted].sum(dtype=torch.float64).item()
            tokens += int(scored.counted.sum())
            slices += recall_sums(scored.nll, scored.distance, scored.counted)
            targets = scored.targets[scored.counted].numpy()
            check_ids(targets, len(token_bytes.lengths), str(text.path), f"the tokenizer of {subject.name}")
            n_bytes += int(token_bytes.lengths[targets].sum())
            progress.update(scored.nll.numel())
    seconds = time.perf_counter() - started
    complete = tokens == len(text.source)
    n_bytes = text.n_bytes if complete else n_bytes
    if not tokens or not n_bytes:
        raise UserError(f"{text.path}: too short: none of its {len(stream)} tokens can be scored")
    if not math.isfinite(nll):
        raise UserError(f"{subject.path}: its loss on {text.path} is {nll}: the weights are damaged or have diverged")
    return {
        "run": subject.name,
        "kind": subject.kind,
        "checkpoint": subject.checkpoint,
        "step": subject.step,
        "design": subject.design,
        "set": text.name,
        "data": str(text.path),
        "split": text.split,
        "documents": text.n_documents,
        "replaced_sequences": text.replaced,
        "tokens": len(text.source),
        "tokens_scored": tokens,
        "bytes": n_bytes,
        "bytes_exact": complete or token_bytes.exact,
        "nll": nll,
        "loss": nll / tokens,
        "perplexity": perplexity(nll / tokens),
        "bits_per_byte": nll / math.log(2) / n_bytes,
        **recall_figures(slices),
        "window": window,
        "stride": stride,
        "max_tokens": settings.max_tokens,
        "document_mask": subject.document_mask,
        "tokenizer_sha256": subject.tokenizer_sha256,
        "precision": subject.precision,
        "batch": batch,
        "seconds": round(seconds, 3),
        "hardware": hardware(device),
        "versions": versions(),
    }
