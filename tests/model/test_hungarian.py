"""The Hungarian method against all matchings."""

from __future__ import annotations

import itertools

import pytest
import torch

from cllm.model.hungarian import hungarian


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_no_other_matching_scores_higher(n: int) -> None:
    for seed in range(20):
        score = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = hungarian(score)
        assert sorted(found) == list(range(n))
        best = max(sum(score[i, p] for i, p in enumerate(order)) for order in itertools.permutations(range(n)))
        assert sum(score[i, p] for i, p in enumerate(found)) == pytest.approx(float(best))


def test_ties_and_equal_scores_still_give_a_matching() -> None:
    assert sorted(hungarian(torch.zeros(7, 7))) == list(range(7))
    assert hungarian(torch.eye(40).flip(0)) == list(range(39, -1, -1))
