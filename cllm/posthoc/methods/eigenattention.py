"""EigenAttention (arXiv 2408.05646): keys and values on bases of those of a calibration text."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from cllm.posthoc.code import Code
from cllm.posthoc.fixed_bases import Spectrum
from cllm.posthoc.later_rows import extend_factors
from cllm.posthoc.lowrank import LowRank, low_rank_already
from cllm.posthoc.method import Engine
from cllm.posthoc.projecting import Allocation, Place, ProjectingMethod
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register("eigenattention", summary="keys and values on bases of the keys and values of calibration tokens")
class EigenAttention(ProjectingMethod):
    """EigenAttention: one basis for the keys before RoPE of all heads of a slot, and one for its values, from the
    singular value decompositions of the keys and of the values of a calibration text,

        [k_1, ..., k_T] = U Σ Vᵀ,    cached: U_rᵀ k,    read: U_r U_rᵀ k

    Ranks are the smallest that keep the same share of the sum of singular values. This is the paper's method for models
    with RoPE; without it the paper also stacks queries. With `allocation=errors`, as in the paper, that share differs
    between slots: each gets the least at which the outputs of layers have a relative error within one bound.

    For projections without a bias and without a norm on keys this equals `palu:heads=null` with the same ranks. Heads
    that are normalised by themselves can share a basis here, because it is fitted to keys and not to weights.
    """

    allocation: Allocation = "energy"
    """`errors`, the paper's: as each slot needs for one bound on the relative errors of the outputs of layers, which is
    found by the budget. `energy`: as needed for the same share of the singular values everywhere. `uniform`: one rank;
    `fisher`: in proportion to the mean absolute gradient of the loss in a projection; `progressive`: falling with
    depth; `search`: as in `asvd`."""
    basis: Literal["calibration", "prompt"] = "calibration"
    """Fit the bases to the calibration tokens, or to each prompt, with which they are then stored; the ranks come from
    the calibration tokens in both cases."""

    @model_validator(mode="after")
    def _one_basis_for_a_prompt(self) -> Self:
        if self.basis == "prompt" and self.heads is not None:
            raise ValueError("basis=prompt has one basis for all heads of a slot; allowed: without heads")
        return self

    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        cache = engine.new_cache()
        engine.hidden(ids, cache)
        cached = engine.compressible(cache)
        found: dict[Place, Spectrum] = {}
        for keys, values in cached.tensors(before_rope=True, sinks=cached.sinks(self.sinks)):
            for tensors in (keys, values):
                if values is None or tensors is None:
                    raise low_rank_already(self.name)
                for i, slot in enumerate(tensors.slots):
                    rows = tensors.flat(i).flatten(0, 1)
                    channels = rows.shape[1] if self.heads is None else self.heads * tensors.data[i].shape[-1]
                    found[slot, tensors.kind] = Spectrum.of(rows.mT @ rows, None, channels)
        return found

    @property
    def adapts_solver(self) -> bool:
        return self.basis == "prompt"

    def weight_bytes(self) -> int:
        return 0 if self.basis == "prompt" else super().weight_bytes()

    def stored_rows(self, width: int) -> int:
        return width if self.basis == "prompt" else 0

    def _extend(self, code: Code, tensors: SlotTensors, i: int) -> Code:
        if not isinstance(code, LowRank):
            return super()._extend(code, tensors, i)
        return extend_factors([code], [tensors.flat(i)], self.extended, tensors.dtype)[0]

    def _code(self, tensors: SlotTensors, i: int) -> Code:
        if self.basis == "calibration":
            return super()._code(tensors, i)
        rows = tensors.flat(i)
        rank = self._ranks[tensors.slots[i], tensors.kind][0]
        vectors = self.leading_vectors(rows, rank, tensors.dtype)
        b = vectors.to(tensors.dtype).contiguous()
        return LowRank(self.stored(rows @ vectors, tensors.dtype, [rank]), b, tuple(tensors.data[i].shape[2:]))
