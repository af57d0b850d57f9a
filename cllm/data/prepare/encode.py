"""Documents to tokens on several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from cllm.data.prepare.corpus import Document
from cllm.data.prepare.tokenizer import SavedTokenizer
from cllm.errors import DataError

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_SIGNAL_SECONDS = 0.5
_BATCHES_PER_WORKER = 3  # in flight: enough to keep a worker busy while the main process writes


class Encoded(NamedTuple):
    """Consecutive documents as tokens, without their texts."""

    tokens: np.ndarray
    """uint16 or uint32 (sum of lengths,), each document followed by EOS."""
    lengths: list[int]
    """Tokens of each document, EOS included."""
    splits: list[str]
    n_bytes: list[int]
    position: int
    """`Document.position` of the last one."""


class Encoder:
    """Tokenises texts. Special tokens spelt out in a text are encoded as ordinary text."""

    def __init__(self, saved: SavedTokenizer):
        self._tokenizer = Tokenizer.from_file(saved.file)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos = np.array([saved.eos_id], dtype=saved.dtype)
        self._dtype = saved.dtype

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=self._dtype)
            pieces += [ids, self._eos]
            lengths.append(len(ids) + 1)
        return np.concatenate(pieces), lengths


def encode(documents: Iterable[Document], saved: SavedTokenizer, workers: int) -> Generator[Encoded]:
    """Tokenise in order, in constant memory. Raises `DataError` if a worker process dies."""
    if workers == 1:
        encoder = Encoder(saved)
        for batch in _batches(documents):
            yield _encoded(batch, *encoder([document.text for document in batch]))
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe under the tokenizers' threads
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(saved,))
    pending: deque[tuple[list[Document], Future]] = deque()
    try:
        for batch in _batches(documents):
            future = pool.submit(_run, [document.text for document in batch])
            pending.append(([document._replace(text="") for document in batch], future))
            if len(pending) >= _BATCHES_PER_WORKER * workers:
                yield _finish(pending)
        while pending:
            yield _finish(pending)
    except BrokenProcessPool:
        time.sleep(_SIGNAL_SECONDS)  # a signal to the entire process group also ends this process, here
        raise DataError("a tokenising process was killed, perhaps for memory; try fewer `workers`") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.n_bytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Document], tokens: np.ndarray, lengths: list[int]) -> Encoded:
    splits, n_bytes = [document.split for document in batch], [document.n_bytes for document in batch]
    return Encoded(tokens, lengths, splits, n_bytes, batch[-1].position)


def _finish(pending: deque[tuple[list[Document], Future]]) -> Encoded:
    batch, future = pending.popleft()
    return _encoded(batch, *future.result())


# One encoder for each worker process, created when it starts.
_encoder: Callable[[list[str]], tuple[np.ndarray, list[int]]]


def _start_worker(saved: SavedTokenizer) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(saved)


def _exit_with_parent() -> None:
    """End this worker when its parent has been killed; otherwise it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    return _encoder(texts)
