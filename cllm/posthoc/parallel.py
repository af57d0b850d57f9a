"""Independent GPU work in parallel.

Factorising one group of slots launches a chain of small kernels, mostly Cholesky factorisations. They leave most of a
GPU idle, and launching them takes about as long as running them. Groups are independent, so each gets a CUDA stream and
a thread that launches on it; torch's operators release Python's global lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

Job = Callable[[], object]

_MAX_STREAMS = 8
_workers: dict[torch.device, list[tuple[torch.cuda.Stream, ThreadPoolExecutor]]] = {}
"""Streams, each always with the same launching thread: libraries allocate a workspace per pair of the two."""


def run_in_parallel(jobs: Sequence[Job], device: torch.device) -> None:
    """Run `jobs`, which launch work on `device`: in parallel on a GPU, else in turn.

    On a GPU the jobs start after all work launched before on the current stream, and work launched there later waits
    for all of them. An exception of a job is raised after the others have ended.
    """
    if device.type != "cuda" or len(jobs) < 2:
        for job in jobs:
            job()
        return
    workers = _workers.setdefault(device, [])
    if not workers:  # torch loads its linear algebra library on first use, which is not thread-safe
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    while len(workers) < min(len(jobs), _MAX_STREAMS):
        workers.append((torch.cuda.Stream(device), ThreadPoolExecutor(1, "cllm-compress")))
    used, current = workers[: len(jobs)], torch.cuda.current_stream(device)
    gradients = torch.is_grad_enabled()

    def launch(stream: torch.cuda.Stream, jobs: Sequence[Job]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream), torch.set_grad_enabled(gradients):
            for job in jobs:
                job()

    for stream, _ in used:
        stream.wait_stream(current)
    futures = [thread.submit(launch, stream, jobs[i :: len(used)]) for i, (stream, thread) in enumerate(used)]
    wait(futures)
    for stream, _ in used:
        current.wait_stream(stream)
    for future in futures:
        future.result()
