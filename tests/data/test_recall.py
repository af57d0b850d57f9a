"""The associative-recall slice against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from cllm.data.recall import GROUPS, recall_distance, recall_figures, recall_sums
from cllm.kernels.cross_entropy import IGNORE


def _loop(ids: list[int], labels: list[int], documents: list[int]) -> list[int]:
    """Distances, by comparing every place with every earlier one."""
    found = []
    for t in range(len(ids)):
        place = (documents[t], ids[t], labels[t])
        same = [s for s in range(t) if (documents[s], ids[s], labels[s]) == place and labels[t] != IGNORE]
        found.append(t - same[-1] if same else 0)
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_distances_and_sums_are_those_of_a_loop(masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, length = 3, 700
    ids = torch.randint(0, 12, (rows, length), generator=draw)
    labels = torch.randint(0, 12, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) < 0.05] = IGNORE
    ids[0, 5:600] = torch.arange(5, 600)  # no repetition in between: distances above 64 and 256
    documents = (torch.rand(rows, length, generator=draw) < 0.01).cumsum(1) if masked else None
    distance = recall_distance(ids, labels, documents)
    plain = torch.zeros(rows, length, dtype=torch.int64) if documents is None else documents
    parts = zip(ids.tolist(), labels.tolist(), plain.tolist(), strict=True)
    assert distance.tolist() == [_loop(*row) for row in parts]
    assert {0, 1} < set(distance.flatten().tolist())
    for row in range(rows):  # other rows of a batch change nothing
        alone = recall_distance(ids[[row]], labels[[row]], None if documents is None else documents[[row]])
        assert alone.tolist() == distance[[row]].tolist()

    losses, scored = torch.rand(rows, length, generator=draw), labels != IGNORE
    figures = recall_figures(recall_sums(losses, distance, scored))
    flat = [
        (d, loss) for d, loss, s in zip(*(x.flatten().tolist() for x in (distance, losses, scored)), strict=True) if s
    ]
    for name, low, high in zip(GROUPS, (1, 64, 256, 1024), (63, 255, 1023, 10**9), strict=True):
        members = [loss for d, loss in flat if low <= d <= high]
        assert figures[f"ar_tokens_{name}"] == len(members)
        assert figures[f"ar_loss_{name}"] == (pytest.approx(sum(members) / len(members)) if members else None)
    assert figures["ar_tokens_64_255"], "the drawn distances reach further groups"
    assert figures["ar_tokens"] + sum(d == 0 for d, _ in flat) == len(flat)
    assert figures["other_loss"] == pytest.approx(sum(loss for d, loss in flat if not d) / sum(not d for d, _ in flat))
