"""Independent work side by side on a GPU.

Factorising one group of slots is a chain of small kernels, Cholesky factors above all: they leave most of a GPU idle,
and launching them takes about as long as running them. Groups do not need each other, so each has a stream, and a
thread that launches: torch's operators do not hold Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

Job = Callable[[], None]

_MOST = 8
_lanes: dict[torch.device, list[tuple[torch.cuda.Stream, ThreadPoolExecutor]]] = {}
"""Streams, each with the thread that launches on it, always the same: libraries keep a workspace for every pair."""


def side_by_side(jobs: Sequence[Job], device: torch.device) -> None:
    """Do `jobs`, which launch work on `device`: on a CPU, or where there is one, in turn.

    On a GPU each begins after all that was launched before on the current stream, and what is launched there afterwards
    waits for all of them. What a job raises is raised, after the others have ended.
    """
    if device.type != "cuda" or len(jobs) < 2:
        for job in jobs:
            job()
        return
    lanes = _lanes.setdefault(device, [])
    if not lanes:  # torch loads its linear algebra at the first use, which several threads at once must not be
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    while len(lanes) < min(len(jobs), _MOST):
        lanes.append((torch.cuda.Stream(device), ThreadPoolExecutor(1, "cllm-compress")))
    used, current = lanes[: len(jobs)], torch.cuda.current_stream(device)
    gradients = torch.is_grad_enabled()

    def launch(stream: torch.cuda.Stream, mine: Sequence[Job]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream), torch.set_grad_enabled(gradients):
            for job in mine:
                job()

    for stream, _ in used:
        stream.wait_stream(current)
    under_way = [thread.submit(launch, stream, jobs[i :: len(used)]) for i, (stream, thread) in enumerate(used)]
    wait(under_way)
    for stream, _ in used:
        current.wait_stream(stream)
    for one in under_way:
        one.result()
