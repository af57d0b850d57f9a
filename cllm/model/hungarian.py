"""The Hungarian method: the one-to-one matching of rows and columns with the largest sum of scores."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def hungarian(score: Tensor) -> list[int]:
    """The column of every row of `score` (n, n) in the one-to-one matching with the largest sum.

    It grows shortest augmenting paths with dual variables (Jonker and Volgenant, 1987), O(n^3) in fp64.
    """
    cost = -score.detach().double().cpu().numpy()
    n = len(cost)
    row_of = np.full(n, -1)  # the row matched to each column
    u, v = np.zeros(n), np.zeros(n)
    for row in range(n):
        shortest, before = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        at, column, reached = row, -1, 0.0
        while True:
            through = reached + cost[at] - u[at] - v
            better = ~done & (through < shortest)
            shortest[better], before[better] = through[better], column
            column = int(np.where(done, np.inf, shortest).argmin())
            reached, done[column] = shortest[column], True
            if row_of[column] < 0:
                break
            at = int(row_of[column])
        scanned = done.copy()
        scanned[column] = False
        u[row] += reached
        u[row_of[scanned]] += reached - shortest[scanned]
        v[done] -= reached - shortest[done]
        while column >= 0:  # flip the matching along the path
            previous = int(before[column])
            row_of[column] = row if previous < 0 else row_of[previous]
            column = previous
    column_of = [0] * n
    for column, row in enumerate(row_of):
        column_of[int(row)] = column
    return column_of
