"""Groups side by side: who launches what, and who waits for whom. Streams are stand-ins that need no GPU; tests/gpu has
real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from cllm.posthoc import parallel
from cllm.posthoc.parallel import run_in_parallel

GPU = torch.device("cuda:0")


class Stream:
    waits: list[tuple[Stream, Stream]]

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        Stream.waits.append((self, other))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """The current `stream` of each thread; that of the one that calls is `main`, too."""
    current = threading.local()
    current.stream = current.main = Stream()
    Stream.waits = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current.stream = getattr(current, "stream", None), stream
        yield
        current.stream = before

    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda n, device: eye(n))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current.stream)
    monkeypatch.setattr(parallel, "_workers", {})
    return current


def jobs(count: int, here: threading.local, done: list[tuple[int, Any, str]]) -> list[Callable[[], None]]:
    def job(i: int) -> None:
        assert not torch.is_grad_enabled()
        time.sleep(0.02)  # long enough to be missed by who does not wait
        done.append((i, here.stream, threading.current_thread().name))

    return [lambda i=i: job(i) for i in range(count)]  # type: ignore[misc]


def test_every_stream_has_a_thread_of_its_own_and_keeps_it(here: threading.local) -> None:
    pairs: list[set[tuple[Any, str]]] = []
    for _ in range(2):
        done: list[tuple[int, Any, str]] = []
        Stream.waits.clear()
        with torch.no_grad():
            run_in_parallel(jobs(20, here, done), GPU)
        assert sorted(i for i, _, _ in done) == list(range(20))
        pairs.append({(stream, thread) for _, stream, thread in done})
        used = {stream for stream, _ in pairs[-1]}
        assert len(pairs[-1]) == len(used) == 8
        assert set(Stream.waits[:8]) == {(stream, here.main) for stream in used}, "after what was launched before"
        assert set(Stream.waits[8:]) == {(here.main, stream) for stream in used}, "before what is launched next"
    assert pairs[0] == pairs[1]


def test_what_a_job_raises_comes_after_the_others(here: threading.local) -> None:
    def fail() -> None:
        raise ValueError("no")

    done: list[tuple[int, Any, str]] = []
    with torch.no_grad(), pytest.raises(ValueError, match="no"):
        run_in_parallel([fail, *jobs(5, here, done)], GPU)
    assert len(done) == 5
    assert sum(first is here.main for first, _ in Stream.waits) == 6, "and nothing is left unwaited for"


def test_on_a_cpu_jobs_are_done_in_turn() -> None:
    done: list[int] = []
    run_in_parallel([lambda i=i: done.append(i) for i in range(3)], torch.device("cpu"))  # type: ignore[misc]
    assert done == [0, 1, 2]
