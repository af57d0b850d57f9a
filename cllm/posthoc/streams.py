"""Independent work side by side on a GPU.

Factorising one group of slots is a chain of small kernels, Cholesky factors above all: they leave most of a GPU idle,
and launching them takes about as long as running them. Groups do not need each other, so each has a stream, and a
thread that launches: torch's operators do not hold Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Job = Callable[[], None]

_MOST = 8
_pools: dict[torch.device, list[torch.cuda.Stream]] = {}


def side_by_side(jobs: Sequence[Job], device: torch.device) -> None:
    """Do `jobs`, which launch work on `device`: on a CPU, or where there is one, in turn.

    On a GPU each begins after all that was launched before on the current stream, and what is launched there afterwards
    waits for all of them. What a job raises is raised, after the others have ended.
    """
    if device.type != "cuda" or len(jobs) < 2:
        for job in jobs:
            job()
        return
    pool = _pools.setdefault(device, [])
    if not pool:  # torch loads its linear algebra at the first use, which several threads at once must not be
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    while len(pool) < min(len(jobs), _MOST):
        pool.append(torch.cuda.Stream(device))
    used, current = pool[: len(jobs)], torch.cuda.current_stream(device)
    gradients = torch.is_grad_enabled()

    def launch(stream: torch.cuda.Stream, mine: Sequence[Job]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream), torch.set_grad_enabled(gradients):
            for job in mine:
                job()

    for stream in used:
        stream.wait_stream(current)
    try:
        with ThreadPoolExecutor(len(used)) as threads:
            list(threads.map(launch, used, [jobs[i :: len(used)] for i in range(len(used))]))
    finally:
        for stream in used:
            current.wait_stream(stream)
