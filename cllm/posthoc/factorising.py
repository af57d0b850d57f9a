"""The base of methods with singular value decompositions, whose records name the solver."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor

from cllm.posthoc.lowrank import Solver, choose_solver
from cllm.posthoc.method import Compressor


class Factorising(Compressor):
    """A method that computes singular vectors, of cached tensors, of calibration tokens or of weights.

    All of them call `singular_vectors`, `leading_vectors` or, for a decomposition with code of its own, `note_solver`.
    So `facts` of every such method have the solver as `svd` and `products`. Of several solvers the last one counts.
    """

    _used: dict[str, str] = PrivateAttr(default_factory=dict)
    """`Solver.facts` of the last decomposition. Copies of the method, which compressed caches keep, share it."""

    @property
    def adapts_solver(self) -> bool:
        """Whether `choose_solver` chooses the solver. A record without it may be of an earlier version, in which
        another one was used."""
        return False

    def note_solver(self, solver: Solver) -> None:
        """Remember `solver` for `facts`."""
        self._used.update(solver.facts())

    def singular_vectors(self, x: Tensor, rank: int | None, solver: Solver) -> tuple[Tensor, Tensor | None]:
        """`right_vectors` (lowrank.py) of `x` (B, n, C) by `solver`."""
        self.note_solver(solver)
        return solver.right_vectors(x, rank)

    def leading_vectors(self, x: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """Leading right singular vectors (B, C, r) fp32 of `x` (B, n, C) fp32, of a cache in `dtype`, by
        `choose_solver`.

        r is `rank`, or less if `x` has fewer rows or columns.
        """
        return self.singular_vectors(x, rank, choose_solver(dtype))[0]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **self._used}

    @property
    def needed_facts(self) -> frozenset[str]:
        return super().needed_facts | (Solver.FACTS if self.adapts_solver else frozenset())
