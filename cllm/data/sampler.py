"""The sequences of each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from cllm.errors import UserError


class StepBatchSampler(Sampler[list[int]]):
    """An endless series of micro-batches; those of a step depend on its number alone.

    Optimizer step s takes sequences [s G, s G + G), G the global batch. Its accumulation round a on rank r takes the B
    sequences from s G + (a W + r) B, where B is the micro batch and W the world size. So a step trains on the same
    sequences for any number of ranks, workers and accumulation rounds, and `start_step` resumes exactly.

    Raises:
        UserError: if G is not a multiple of B W.
    """

    def __init__(self, micro_batch: int, global_batch: int, rank: int = 0, world_size: int = 1, start_step: int = 0):
        if global_batch <= 0 or micro_batch <= 0 or global_batch % (micro_batch * world_size):
            raise UserError(
                f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch} "
                f"x {world_size} device{'s' if world_size > 1 else ''} = {micro_batch * world_size}"
            )
        self.micro_batch, self.global_batch = micro_batch, global_batch
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches as lists of sequence indices, from the first of `start_step` on."""
        step = self.start_step
        while True:
            for round_ in range(self.accumulation):
                first = step * self.global_batch + (round_ * self.world_size + self.rank) * self.micro_batch
                yield list(range(first, first + self.micro_batch))
            step += 1
