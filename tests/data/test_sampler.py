"""A step's sequences depend on the step alone."""

from itertools import islice

import pytest

from cllm.data.sampler import StepBatchSampler
from cllm.errors import UserError


def steps(n, world_size, micro_batch, global_batch=12, start_step=0):
    """For each of n steps, the set of sequences all ranks take."""
    taken: list[list[int]] = [[] for _ in range(n)]
    for rank in range(world_size):
        sampler = StepBatchSampler(micro_batch, global_batch, rank, world_size, start_step)
        batches = islice(sampler, n * sampler.accumulation)
        for i, batch in enumerate(batches):
            assert len(batch) == micro_batch
            taken[i // sampler.accumulation] += batch
    return [sorted(step) for step in taken]


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 12), (1, 1), (1, 3), (2, 6), (2, 2), (3, 4), (4, 3), (12, 1)]
)
def test_a_step_takes_the_same_sequences_on_any_number_of_ranks(world_size, micro_batch):
    assert steps(4, world_size, micro_batch) == [list(range(12 * s, 12 * s + 12)) for s in range(4)]


def test_rounds_and_ranks():
    assert list(islice(StepBatchSampler(2, 8, rank=1, world_size=2), 4)) == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_is_skipping(rank):
    whole = list(islice(StepBatchSampler(2, 8, rank, 2), 20))
    assert list(islice(StepBatchSampler(2, 8, rank, 2, start_step=3), 14)) == whole[6:]


@pytest.mark.parametrize(("micro_batch", "global_batch", "world_size"), [(3, 8, 1), (2, 6, 2), (0, 8, 1), (4, 0, 1)])
def test_batches_that_do_not_divide(micro_batch, global_batch, world_size):
    with pytest.raises(UserError, match=rf"train.global_batch {global_batch} .*train.micro_batch {micro_batch} x"):
        StepBatchSampler(micro_batch, global_batch, 0, world_size)
