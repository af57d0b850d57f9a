"""Independent work side by side on a GPU.

Factorising one group of slots is a chain of small kernels, Cholesky factors above all, that leave most of a GPU idle;
groups do not need each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_MOST = 8
_pools: dict[torch.device, list[torch.cuda.Stream]] = {}


def streams(tasks: int, device: torch.device) -> list[AbstractContextManager[None]]:
    """A context for each of `tasks`: what is launched inside may run beside what is launched in others.

    Each begins after all that was launched before it on the current stream, and what is launched there after its end
    waits for it. On a CPU, and for a single task, they do nothing.
    """
    if device.type != "cuda" or tasks < 2:
        return [nullcontext() for _ in range(tasks)]
    pool = _pools.setdefault(device, [])
    while len(pool) < min(tasks, _MOST):
        pool.append(torch.cuda.Stream(device))
    return [_beside(pool[n % _MOST], n == tasks - 1, pool) for n in range(tasks)]


@contextmanager
def _beside(stream: torch.cuda.Stream, last: bool, pool: list[torch.cuda.Stream]) -> Iterator[None]:
    """On `stream`; the current one waits for the whole pool after the last task only, or tasks would queue."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    if last:
        for one in pool:
            current.wait_stream(one)
